// The live page: one WebSocket, one stream at a time. docs/reference/live_protocol.md describes the messages.

import { Form } from "./form.js";
import { makePlayer, playable } from "./player.js";
import { TimelineView } from "./timeline.js";

const $ = (id) => document.getElementById(id);
const REPORT_MS = 100;
const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;

const timeline = new TimelineView($("strip"), $("playhead"), $("segments"), (spelling) => form.describe(spelling));
const form = new Form(
  (change) => running() && send({ type: "update", id: form.sent(change), ...change }),
  () => running() && notice("This takes effect with the next start.", "start"),
  (message) => notice(message, "refused"),
);
let socket = null;
let retry = 500;
let player = null;
let stream = null; // {key, fps, width, height, startedAt, shown}
let chunks = [];
let preview = null;

function running() {
  return document.body.dataset.running === "true";
}

function state(name, text = "") {
  document.body.dataset.state = name;
  document.body.dataset.running = String(["queued", "starting", "playing", "waiting", "paused"].includes(name));
  $("start").textContent = running() ? "Restart" : "Start";
  $("start").disabled = name === "connecting";
  $("pause").textContent = name === "paused" ? "Resume" : "Pause";
  $("pause").disabled = !["playing", "waiting", "paused"].includes(name);
  $("stop").disabled = !running();
  $("message").textContent = text;
  $("message").hidden = !text;
}

function notice(text, code = "") {
  $("notice").textContent = text;
  $("notice").dataset.code = code;
  $("notice").hidden = !text;
}

function send(message) {
  if (socket?.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

// ---- connection

async function enter() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    history.replaceState(null, "", location.pathname + location.search);
    await login(given);
  }
  const answers = await Promise.all([fetch("models"), fetch("v1/methods")]).catch(() => []);
  if (answers[0]?.status === 401) {
    $("login").showModal();
    return;
  }
  if (!answers.length || !answers.every((answer) => answer.ok)) {
    lost();
    return;
  }
  form.setModels(...(await Promise.all(answers.map((answer) => answer.json()))));
  connect();
}

async function login(token) {
  const body = JSON.stringify({ token });
  const answer = await fetch("login", { method: "POST", body, headers: { "content-type": "application/json" } });
  const said = answer.ok ? "" : ((await answer.json()).detail ?? "refused");
  $("login-error").textContent = said;
  $("login-error").hidden = !said;
}

function connect() {
  const url = new URL("ws", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  socket.onmessage = ({ data }) => (typeof data === "string" ? hear(JSON.parse(data)) : player?.push(data));
  socket.onclose = (event) => lost(event.reason);
}

function lost(reason = "") {
  const seconds = Math.round(retry / 100) / 10;
  const wasRunning = running();
  drop();
  $("connection").textContent = `${reason || "connection lost"}; trying again in ${seconds} s`;
  state("connecting", wasRunning ? "The connection was lost. What was shown can still be saved." : "");
  setTimeout(enter, retry);
  retry = Math.min(8000, retry * 2);
}

function drop() {
  player?.pause();
  player?.destroy();
  player = null;
}

// ---- messages

const hearing = {
  hello(message) {
    retry = 500;
    document.title = message.preview ? "nasa-video preview" : document.title;
    $("connection").textContent = "connected";
    form.maxNegatives = message.limits.negatives;
    state("ready", 'Say what to show, then press "Start".');
    preview = message.preview ?? null;
    if (preview) {
      form.fill(preview);
      form.drawChips();
      for (const control of [...$("form").elements, ...$("chips").querySelectorAll("*")]) control.disabled = true;
      $("replay").remove();
      start();
    }
  },
  queued({ place }) {
    state("queued", `All places are taken. Yours in the line: ${place}`);
  },
  started(message) {
    chunks = [];
    Object.assign(stream, { key: message.stream, ...message });
    timeline.clear(message.fps);
    $("plays").textContent = `${message.fps} FPS`;
    $("stage").style.setProperty("--ratio", message.width / message.height);
    caption(message.guidance ?? form.guidance);
    $("captions").hidden = !message.compare;
    offerDownloads(false);
    begin(message, 0);
    state("starting", "Making the first pictures …");
  },
  media(message) {
    begin({ ...stream, ...message }, message.first_frame);
  },
  chunk(chunk) {
    chunks.push(chunk);
    if (chunks.length > 100) chunks.shift();
    timeline.add(chunk);
    if (chunk.first_frame === 0) {
      stream.firstSeconds = chunk.seconds;
      offerDownloads(true);
    }
    $("made").textContent = `${chunk.fps.toFixed(1)} FPS`;
    // Slower than it plays: rather evenly slow than halting.
    const rate = chunk.fps / stream.fps;
    const played = rate < 0.97 ? Math.max(0.25, 0.95 * rate) : 1;
    player?.setRate(played);
    $("plays").textContent = played < 1 ? `${(played * stream.fps).toFixed(1)} of ${stream.fps} FPS` : `${stream.fps} FPS`;
  },
  accepted({ from_chunk, id }) {
    notice("");
    form.accepted(id);
    document.body.dataset.accepted = from_chunk;
  },
  note({ message }) {
    notice(message, "note");
  },
  state(message) {
    if (message.state === "paused") player?.pause();
    else player?.resume();
    state(message.state);
  },
  error({ code, message, id }) {
    notice(message, code);
    form.refused(id);
    if (code === "busy") state("ready", "Start again in a while.");
    else if (["refused", "malformed"].includes(code) && id === undefined && !stream?.key) {
      state("ready", 'Press "Start" to try again.');
    }
  },
  ended({ reason, frames, stream: key }) {
    if (key !== stream?.key) {
      if (!stream?.key) state("ready", 'Press "Start" to try again.');
      return;
    }
    const why = {
      finished: "",
      stopped: "",
      failed: 'It ended. Press "Start" to try again.',
      "turn over": 'Others are waiting, so this stream has ended. Press "Start" to stand in line again.',
    }[reason];
    player?.end();
    form.pending.clear();
    document.body.dataset.frames = frames;
    state("ended", why);
  },
};

function hear(message) {
  hearing[message.type]?.(message);
}

function caption(guidance) {
  $("with").textContent = guidance === "none" ? "unguided as well" : `with ${form.describe(guidance)}`;
}

function begin(message, firstFrame) {
  drop();
  document.body.dataset.media = message.media;
  player = makePlayer(
    message.media,
    { video: $("video"), canvas: $("canvas") },
    {
      ...message,
      firstFrame,
      seen,
      waiting(is) {
        const name = document.body.dataset.state;
        if (is && name === "playing") state("waiting");
        if (!is && name === "waiting") state("playing");
      },
      failed() {
        notice("This browser could not play the video, so it gets single pictures.", "media");
        send({ type: "media", media: ["jpeg"] });
      },
    },
  );
}

// A frame is on the screen.
function seen(frame) {
  if (!stream) return;
  stream.shown = frame;
  document.body.dataset.frame = frame;
  const chunk = chunks.findLast((one) => one.first_frame <= frame);
  if (["starting", "waiting"].includes(document.body.dataset.state)) {
    if (document.body.dataset.state === "starting") firstPicture();
    state("playing");
  }
  timeline.show(frame);
  if (!chunk) return;
  document.body.dataset.chunk = chunk.index;
  $("counter").textContent = `frame ${frame + 1} · chunk ${chunk.index} · ${((frame + 1) / stream.fps).toFixed(1)} s`;
  caption(chunk.guidance);
  const effect = chunk.effect;
  $("change").textContent = effect ? percent(effect.relative_change) : "no negative";
  $("share").textContent = effect ? percent(effect.negative_share) : "–";
  $("change-meter").value = effect?.relative_change ?? 0;
  $("share-meter").value = effect?.negative_share ?? 0;
}

function firstPicture() {
  const seconds = (performance.now() - stream.startedAt) / 1000;
  document.body.dataset.firstPicture = seconds.toFixed(3);
  document.body.dataset.firstChunk = stream.firstSeconds;
  $("first").textContent = `${seconds.toFixed(2)} s`;
}

function offerDownloads(now) {
  if ($("replay")) $("replay").hidden = !now;
  for (const [id, file] of [["save-video", "video.mp4"], ["save-timeline", "timeline.yaml"]]) {
    $(id).setAttribute("aria-disabled", String(!now));
    if (now) $(id).href = `v1/streams/${stream.key}/${file}`;
    else $(id).removeAttribute("href");
  }
}

// ---- what the person does

function start() {
  drop();
  notice("");
  stream = { startedAt: performance.now(), shown: -1 };
  for (const name of ["frame", "chunk", "firstPicture", "accepted", "frames"]) delete document.body.dataset[name];
  for (const id of ["counter", "made", "first", "change", "share"]) $(id).textContent = "–";
  send({ ...form.start(), media: playable($("media").value) });
  form.store();
  form.started();
  state("starting", "Making the first pictures …");
}

$("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  await form.add($("negative").value);
  start();
});
$("pause").addEventListener("click", () => send({ type: document.body.dataset.state === "paused" ? "resume" : "pause" }));
$("stop").addEventListener("click", () => send({ type: "stop" }));
$("login").addEventListener("close", async () => {
  await login($("token").value);
  enter();
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea, select, button, a, summary");
  if (event.key === " " && !typing && !$("pause").disabled) {
    event.preventDefault();
    $("pause").click();
  }
});
setInterval(() => {
  if (running() && stream?.key && player) send({ type: "position", stream: stream.key, frame: player.frame() });
}, REPORT_MS);

enter();
