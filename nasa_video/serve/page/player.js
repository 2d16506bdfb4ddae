// Shows a stream's pictures: a <video> fed through MediaSource, or JPEG frames on a <canvas>.
// Both have push(data), frame(), pause(), resume(), setRate(), destroy(), and tell `seen` of each frame that is shown.

const Source = window.ManagedMediaSource || window.MediaSource;
const TYPES = {
  mp4: 'video/mp4; codecs="avc1.42C028"',
  webm: 'video/webm; codecs="vp09.00.40.08"',
  av1: 'video/webm; codecs="av01.0.08M.08"',
};
const KEPT_SECONDS = 20;

// What this browser can show, best first.
export function playable(only = "") {
  const video = Object.keys(TYPES).filter((kind) => Source && Source.isTypeSupported(TYPES[kind]));
  const kinds = [...video, "jpeg"];
  return only ? [only] : kinds;
}

export function makePlayer(kind, elements, options) {
  elements.video.hidden = kind === "jpeg";
  elements.canvas.hidden = kind !== "jpeg";
  return kind === "jpeg" ? new CanvasPlayer(elements.canvas, options) : new VideoPlayer(elements.video, options);
}

class VideoPlayer {
  constructor(video, { mime, fps, firstFrame, seen, failed, waiting }) {
    Object.assign(this, { video, fps, firstFrame, seen, failed, waiting });
    this.queue = [];
    this.source = new Source();
    this.url = URL.createObjectURL(this.source);
    this.alive = true;
    this.held = false;
    this.source.addEventListener("sourceopen", () => this.open(mime), { once: true });
    this.listeners = {
      error: () => this.fail(),
      waiting: () => this.waiting(true),
      playing: () => this.waiting(false),
    };
    for (const [name, listener] of Object.entries(this.listeners)) video.addEventListener(name, listener);
    video.src = this.url;
    this.watch();
  }

  open(mime) {
    if (!this.alive) return;
    try {
      this.buffer = this.source.addSourceBuffer(mime);
      this.buffer.addEventListener("updateend", () => this.feed());
      this.buffer.addEventListener("error", () => this.fail());
    } catch {
      this.fail();
    }
    this.feed();
  }

  push(data) {
    this.queue.push(data);
    this.feed();
  }

  feed() {
    if (!this.alive || !this.buffer || this.buffer.updating || this.source.readyState !== "open") return;
    try {
      const old = this.video.currentTime - KEPT_SECONDS;
      if (this.buffer.buffered.length && this.buffer.buffered.start(0) < old - KEPT_SECONDS) {
        this.buffer.remove(0, old); // An endless stream must not fill the browser's memory.
      } else if (this.queue.length) {
        const size = this.queue.reduce((sum, part) => sum + part.byteLength, 0);
        const all = new Uint8Array(size);
        let at = 0;
        for (const part of this.queue.splice(0)) {
          all.set(new Uint8Array(part), at);
          at += part.byteLength;
        }
        this.buffer.appendBuffer(all);
        if (!this.held && this.video.paused) this.video.play().catch(() => {});
      }
    } catch {
      this.fail();
    }
  }

  // Exact where the browser tells of every frame; by the clock otherwise.
  watch() {
    if (!this.alive) return;
    if (this.video.requestVideoFrameCallback) {
      this.video.requestVideoFrameCallback((now, frame) => {
        if (this.alive) this.seen(this.firstFrame + Math.round(frame.mediaTime * this.fps));
        this.watch();
      });
    } else {
      requestAnimationFrame(() => {
        if (this.alive && this.video.readyState > 1) this.seen(this.frame());
        this.watch();
      });
    }
  }

  frame() {
    return this.firstFrame + Math.floor(this.video.currentTime * this.fps + 0.01);
  }

  pause() {
    this.held = true;
    this.video.pause();
  }

  resume() {
    this.held = false;
    this.video.play().catch(() => {});
  }

  setRate(rate) {
    if (Math.abs(this.video.playbackRate - rate) > 0.02) this.video.playbackRate = rate;
  }

  end() {
    if (this.alive && this.source.readyState === "open" && this.buffer && !this.buffer.updating && !this.queue.length) {
      this.source.endOfStream();
    } else if (this.alive && this.queue) {
      setTimeout(() => this.end(), 100);
    }
  }

  fail() {
    if (!this.alive) return;
    this.destroy();
    this.failed();
  }

  destroy() {
    this.alive = false;
    for (const [name, listener] of Object.entries(this.listeners)) this.video.removeEventListener(name, listener);
    URL.revokeObjectURL(this.url);
  }
}

class CanvasPlayer {
  constructor(canvas, { fps, firstFrame, width, height, seen, waiting }) {
    Object.assign(this, { canvas, fps, seen, waiting, rate: 1, next: firstFrame });
    canvas.width = width;
    canvas.height = height;
    this.frames = new Map();
    this.due = 0;
    this.held = false;
    this.alive = true;
    this.starved = true;
    requestAnimationFrame((now) => this.draw(now));
  }

  async push(data) {
    const number = new DataView(data).getUint32(0);
    const picture = await createImageBitmap(new Blob([data.slice(4)], { type: "image/jpeg" }));
    if (this.alive) this.frames.set(number, picture);
    else picture.close();
  }

  draw(now) {
    if (!this.alive) return;
    const picture = this.frames.get(this.next);
    if (!this.held && now >= this.due) {
      if (picture) {
        this.canvas.getContext("2d").drawImage(picture, 0, 0, this.canvas.width, this.canvas.height);
        picture.close();
        this.frames.delete(this.next);
        this.seen(this.next);
        this.next += 1;
        const step = 1000 / (this.fps * this.rate);
        // The clock goes on from when the frame was due, unless that is long ago.
        this.due = Math.max(this.due + step, now - step);
      }
      if (this.starved !== !picture) this.waiting((this.starved = !picture));
    }
    requestAnimationFrame((time) => this.draw(time));
  }

  frame() {
    return this.next;
  }

  pause() {
    this.held = true;
  }

  resume() {
    this.held = false;
  }

  setRate(rate) {
    this.rate = rate;
  }

  end() {}

  destroy() {
    this.alive = false;
    for (const picture of this.frames.values()) picture.close();
    this.frames.clear();
  }
}
