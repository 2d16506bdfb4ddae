"""The parts of the server that need no socket: messages, queue to a client, scheduler, store, timelines."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nasa_video.errors import InputError, OutputError
from nasa_video.files.live_sinks import PushSink
from nasa_video.guidance.methods import METHODS, Nasa, setting
from nasa_video.guidance.terms import Negative, parse_terms
from nasa_video.models.presets import OnChange
from nasa_video.serve.media import LIMIT_BYTES, Gone, Outgoing
from nasa_video.serve.preview import Ring
from nasa_video.serve.protocol import MessageError, Start, Update, describe_methods, parse_message
from nasa_video.serve.scheduler import Busy, Scheduler
from nasa_video.serve.security import Bucket, Buckets, client_of, is_loopback
from nasa_video.serve.server_state import ExpiringStore
from nasa_video.serve.states import LiveStates
from nasa_video.video.engine import InitialLatents
from nasa_video.video.pipeline import Chunk, VideoPipeline
from nasa_video.video.request import LoraFile, PromptRequest, PromptState, VideoRequest


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> VideoPipeline:
    return VideoPipeline.from_pretrained(str(model_folder), device="cpu")


@pytest.mark.parametrize(
    "text",
    [
        "null",
        '{"type":"update","scale":NaN}',
        '{"type":"update","surprise":1}',
        '{"type":"position","stream":"a","frame":-1}',
        '{"type":"start","prompt":"\\ud800"}',
        '{"type":"start","prompt":"a","media":[]}',
        '{"type":"start","prompt":"a","seed":9007199254740993}',
        '{"type":"start","prompt":"a","negatives":[{"text":"b","weight":0}]}',
        '{"type":"start","prompt":"a","negatives":"\\"b"}',
        '{"type":"start","prompt":" "}',
        '{"type":"start","prompt":"a","start":{"kind":"image","path":"/etc/passwd","sha256":""}}',
        '{"type":"start","prompt":"a","loras":["/etc/passwd"]}',
        '{"type":"start","prompt":"a","width":1024}',
        '{"type":"start","prompt":"a","scale":[]}',
        '{"type":"start","prompt":"a","timeline":[{"at":0}]}',
        '{"type":"start","prompt":"a","guidance":"nosuch"}',
        "[" * 60_000,
    ],
)
def test_messages_that_are_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraFile, "parse", lambda text: pytest.fail("what is sent was looked for on the disk"))
    with pytest.raises(MessageError):
        parse_message(text)


def test_a_start_in_full() -> None:
    text = '{"type":"start","prompt":"a ball","negatives":[{"text":"red"}],"guidance":"nasa:2","media":["webm","jpeg"]}'
    message = parse_message(text)
    assert isinstance(message, Start)
    assert (message.prompt, message.negatives, message.guidance) == ("a ball", (Negative("red"),), "nasa:2")
    assert message.frames is None


def test_negatives_are_read_by_the_one_grammar() -> None:
    """What is typed on the page is what ``--neg`` takes."""
    text = 'rain:0.4, "black, white", clock 10:30'
    for given in (text, [text], ["rain:0.4", {"text": "black, white"}, "clock 10:30"]):
        message = parse_message(json.dumps({"type": "update", "negatives": given}))
        assert isinstance(message, Update)
        assert message.negatives == parse_terms(text)


def test_a_slow_client_holds_up_its_own_media_only() -> None:
    async def scene() -> None:
        outgoing = Outgoing(asyncio.get_running_loop())
        block = bytes(LIMIT_BYTES // 4)
        sent = []

        def produce() -> None:
            try:
                for number in range(100):
                    outgoing.send_media(block)
                    sent.append(number)
            except Gone:
                sent.append(-1)

        thread = threading.Thread(target=produce)
        thread.start()
        await asyncio.sleep(0.2)
        assert len(sent) == 4, "four blocks fill the queue"
        outgoing.say("state", state="paused")
        for _ in range(4):
            assert isinstance(await outgoing.get(), bytes)
        assert "paused" in str(await outgoing.get())
        outgoing.close()
        await asyncio.to_thread(thread.join, 5)
        assert sent[-1] == -1
        assert await outgoing.get() is None

    asyncio.run(scene())


class Counting:
    """A task that notes its turns."""

    def __init__(self, name: str, turns: list[str], steps: int = 10**9, endless: bool = False) -> None:
        self.name, self.turns, self.left, self.endless = name, turns, steps, endless
        self.places: list[int] = []
        self.errors: list[BaseException] = []
        self.expired = False

    def ready(self) -> bool:
        return True

    def step(self) -> bool:
        self.turns.append(self.name)
        self.left -= 1
        time.sleep(0.002)
        if self.name == "bad":
            raise ValueError("bad")
        return self.left > 0

    def fail(self, error: BaseException) -> None:
        self.errors.append(error)

    def expire(self) -> None:
        self.expired = True

    def queued(self, place: int) -> None:
        self.places.append(place)


def _until(what: Any) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_scheduler_is_fair_and_keeps_the_line() -> None:
    turns: list[str] = []
    scheduler = Scheduler(max_active=2, max_waiting=2, turn_seconds=60)
    tasks = [Counting(name, turns, 30) for name in "abcd"]
    for task in tasks:
        scheduler.submit(task)
    with pytest.raises(Busy):
        scheduler.submit(Counting("e", turns))
    assert tasks[2].places == [1]
    assert tasks[3].places == [2]
    scheduler.start()
    _until(lambda: scheduler.counts == (0, 0))
    assert turns[:60].count("a") == 30, "two at once, in turns"
    assert all(set(turns[i : i + 2]) == {"a", "b"} for i in range(0, 58, 2))
    assert tasks[3].places[-1] == 0
    scheduler.stop()
    assert not scheduler.alive


def test_one_that_fails_leaves_the_others_alone() -> None:
    turns: list[str] = []
    scheduler = Scheduler(2, 2, 60)
    bad, good = Counting("bad", turns), Counting("good", turns, 20)
    scheduler.submit(bad)
    scheduler.submit(good)
    scheduler.start()
    _until(lambda: scheduler.counts == (0, 0))
    assert isinstance(bad.errors[0], ValueError)
    assert turns.count("good") == 20
    scheduler.stop()


def test_an_endless_one_gives_way_and_a_removed_one_frees_its_place() -> None:
    turns: list[str] = []
    scheduler = Scheduler(1, 2, 0.05)
    endless = Counting("endless", turns, endless=True)
    scheduler.submit(endless)
    scheduler.start()
    time.sleep(0.2)
    assert not endless.expired, "nobody waits"
    following = Counting("following", turns)
    scheduler.submit(following)
    _until(lambda: endless.expired and "following" in turns)
    scheduler.remove(following)
    assert scheduler.counts == (0, 0)
    scheduler.stop()


class Kept:
    def __init__(self, key: str, finished_at: float | None) -> None:
        self.key, self.finished_at, self.discarded = key, finished_at, False

    def join(self, timeout: float) -> None: ...

    def discard(self) -> None:
        self.discarded = True


def test_the_store_forgets_the_oldest_and_keeps_what_runs() -> None:
    store: ExpiringStore[Kept] = ExpiringStore(limit=2, seconds=100)
    now = time.monotonic()
    running, stale = Kept("running", None), Kept("stale", now - 200)
    finished = [Kept(f"f{i}", now - 10 + i) for i in range(3)]
    for thing in (running, stale, *finished):
        store.put(thing)
    assert stale.discarded
    assert [thing.discarded for thing in finished] == [True, False, False]
    assert store.get("running") is running
    store.clear()
    assert running.discarded


def test_a_bucket_lets_the_rate_pass() -> None:
    bucket = Bucket(10)
    assert sum(bucket.take() for _ in range(100)) == 20
    time.sleep(0.25)
    assert 1 <= sum(bucket.take() for _ in range(100)) <= 20


def test_the_ring_keeps_the_newest_and_never_repeats() -> None:
    ring = Ring(max_bytes=3 * 12 * 16 * 16 * 3)
    frames = np.zeros((12, 16, 16, 3), np.uint8)

    def chunk(index: int) -> Any:
        return Chunk(index, frames, None, PromptState.of("a"), None, [0.0]), None  # type: ignore[arg-type]

    taken: list[int] = []
    reader = ring.read(taken.append)
    ring.add(chunk(0))
    assert next(reader)[0].index == 0
    assert not ring.has(taken[-1])
    for index in range(1, 8):
        ring.add(chunk(index))
    assert [pair[0].index for pair in reader] == [5, 6, 7], "a slow reader skips what is gone"
    ring.done = True
    assert ring.has(taken[-1])


def test_a_timeline_says_what_changed_and_gives_the_same_states(pipeline: VideoPipeline) -> None:
    states = LiveStates(pipeline, PromptRequest(prompt="a ball"))
    history = [states(0), states(1)]
    states.change(
        PromptRequest.read({"negatives": "red:0.5", "guidance": ":0.7,conflict=1", "on_change": "regenerate"})
    )
    assert states.next_chunk == 2
    history.append(states(2))
    states.change(PromptRequest.read({"prompt": "a star", "negatives": [], "guidance": "nag", "scale": 2.0}))
    states.change(PromptRequest(guidance="none"))
    history += [states(3), states(4)]
    request = VideoRequest(model="tiny", seed=5)
    timeline = states.timeline(request, pipeline.frames_until(5))
    assert timeline.timeline is not None
    assert [entry.at for entry in timeline.timeline] == [0, 1.75, 2.75]
    assert timeline.timeline[1].prompt is None
    assert timeline.timeline[1].guidance == "nasa-centred:0.7,conflict=1,limit=0.3"
    read = VideoRequest.read(yaml.safe_load(timeline.to_yaml())).resolved(pipeline.preset)
    state_of = read.states(pipeline.preset, lambda chunk: pipeline.frames_until(chunk) / 12)
    assert [state_of(chunk) for chunk in range(5)] == history
    assert len(states.timeline(request, 9).timeline or ()) == 1, "what was not shown is left out"


def test_a_timeline_keeps_what_the_stream_was_asked_for(pipeline: VideoPipeline) -> None:
    states = LiveStates(pipeline, PromptRequest(prompt="a ball"))
    states(0)
    made = states.timeline(VideoRequest(model="tiny", seed=5, steps=1, first_chunk_steps=2, compare=True), 9)
    assert (made.model, made.seed, made.steps, made.first_chunk_steps, made.compare) == ("tiny", 5, 1, 2, None)


def test_states_refuse_what_a_running_stream_cannot_do(pipeline: VideoPipeline) -> None:
    states = LiveStates(pipeline, PromptRequest(prompt="a ball"))
    states(0)
    with pytest.raises(InputError, match="classifier-free"):
        states.change(PromptRequest(guidance="cfg"))
    with pytest.raises(InputError, match="prompt itself"):
        states.change(PromptRequest.read({"negatives": "A Ball"}))
    with pytest.raises(InputError, match="from 0 to 100"):
        states.change(PromptRequest.read({"scale": 1e99}))
    assert states.wanted == PromptRequest(prompt="a ball")


def test_a_method_that_somebody_registers_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Own(Nasa):
        name = "own"
        label = "Own"
        softness: float = setting(0.2, "how soft", 0.0, 1.0)

    monkeypatch.setitem(METHODS, "own", Own)
    described = {method["name"]: method for method in describe_methods()}
    assert described["own"]["label"] == "Own"
    assert {"name": "softness", "default": 0.2, "low": 0.0, "high": 1.0, "optional": False, "help": "how soft"} in (
        described["own"]["settings"]
    )
    message = parse_message('{"type":"update","guidance":"own:0.5,softness=0.7"}')
    assert isinstance(message, Update)
    assert message.guidance == "own:0.5,softness=0.7"


def test_every_client_has_its_bucket_and_there_are_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    buckets = Buckets(1, limit=3)
    assert [buckets.take("loud") for _ in range(3)] == [True, True, False]
    assert buckets.take("quiet")
    assert [buckets.take(f"stranger {i}") for i in range(50)].count(True) == 3, "one of its own, two of the shared one"
    assert len(buckets) == 3
    assert not buckets.take("loud"), "a crowd does not make it be forgotten"
    now[0] = 1.0
    assert buckets.take("quiet")
    assert not all(buckets.take("loud") for _ in range(2))
    now[0] = 10.0
    assert all(buckets.take(name) for name in ("new", "newer", "newest", "loud")), "what is full again makes room"
    assert len(buckets) <= 3


@pytest.mark.parametrize(
    ("host", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("::ffff:192.0.2.7", "::ffff:192.0.2.7"),
        ("testclient", "testclient"),
    ],
)
def test_a_client_is_an_address_or_a_network(host: str, client: str) -> None:
    assert client_of({"client": (host, 1234)}) == client
    assert client_of({"client": None}) == ""


def test_what_becomes_of_the_window(pipeline: VideoPipeline) -> None:
    """Kept: its keys stay. Recomputed: its chunks under the new text. Remade: those the new text would have given."""
    before, after = PromptState.of("a red ball"), PromptState.of("a blue star")
    latents: dict[OnChange | None, list[Any]] = {}

    def video(on_change: OnChange | None, default: OnChange | None = None) -> list[Any]:
        def states(chunk: int) -> PromptState:
            return before if chunk < 2 else PromptState(after.prompts, after.negatives, None, on_change)

        chunks = list(pipeline.stream("a", states=states, frames=45, on_change=default))
        latents[on_change] = [chunk.latents for chunk in chunks]
        return [chunk.frames for chunk in chunks]

    kept, recomputed, remade = video("keep"), video("recache"), video("regenerate")
    for chunk in range(2):
        np.testing.assert_array_equal(kept[chunk], recomputed[chunk])
        np.testing.assert_array_equal(kept[chunk], remade[chunk])
    assert (kept[2] != recomputed[2]).any()
    # The promise of recomputing: chunk 2 is what follows those two chunks in a video that was about the new text.
    prefix = torch.cat(latents["recache"][:2], dim=1)
    (of_new,) = (
        c.latents for c in pipeline.stream("a", states=lambda chunk: after, frames=33, start=InitialLatents(prefix))
    )
    away = {name: float((latents[name][2] - of_new).abs().max()) for name in ("keep", "recache", "regenerate")}
    assert away["recache"] < 1e-5
    assert away["keep"] > 30 * away["recache"], "kept keys still hold the old text"
    assert away["regenerate"] > 30 * away["recache"], "other frames are remembered"
    # The promise of remaking, where the window reaches back to the start: the video that was about it all along.
    new = [chunk.latents for chunk in pipeline.stream("a", states=lambda chunk: after, frames=45)]
    for one, other in zip(latents["regenerate"][2:], new[2:], strict=True):
        assert torch.equal(one, other)
    np.testing.assert_array_equal(np.concatenate(video(None, "recache")), np.concatenate(recomputed))
    np.testing.assert_array_equal(np.concatenate(video("keep", "regenerate")), np.concatenate(kept))
    assert pipeline.preset.sampler.on_change == "regenerate"
    np.testing.assert_array_equal(np.concatenate(video(None)), np.concatenate(remade))


@pytest.mark.parametrize("rollout", [0, 33])
@pytest.mark.parametrize("on_change", ["recache", "regenerate"])
def test_an_interrupted_video_goes_on_as_if_nothing_had_been(
    pipeline: VideoPipeline, on_change: OnChange, rollout: int
) -> None:
    before, after = PromptState.of("a red ball"), PromptState.of("a blue star")

    def video(**start: Any) -> list[Chunk]:
        states = lambda chunk: before if chunk < 2 else after  # noqa: E731
        return list(pipeline.stream("a", states=states, frames=69, on_change=on_change, rollout=rollout, **start))

    whole = video()
    prefix = torch.cat([chunk.latents for chunk in whole[:4]], dim=1)
    for one, other in zip(video(start=InitialLatents(prefix, shown_context=12)), whole, strict=True):
        assert torch.equal(one.latents, other.latents)
        np.testing.assert_array_equal(one.frames, other.frames)


def test_only_what_acts_touches_the_window(pipeline: VideoPipeline) -> None:
    """A negative without a method, and a scale of zero, leave the video as it is to the bit."""
    plain = PromptState.of("a red ball", on_change="regenerate")
    idle = [
        PromptState.of("a red ball", "snow", None, "regenerate"),
        PromptState.of("a red ball", "snow", Nasa(0), "regenerate"),
    ]
    acting = [PromptState.of("a red ball", "snow", Nasa(scale), "regenerate") for scale in (0.5, 1)]

    def video(states: list[PromptState]) -> torch.Tensor:
        chunks = pipeline.stream("a", states=states.__getitem__, frames=9 + 12 * 3)
        return torch.cat([chunk.latents for chunk in chunks], dim=1)

    assert torch.equal(video([plain, *idle, plain]), video([plain] * 4))
    half, whole = acting
    moved = video([half, half, whole, whole])
    assert torch.equal(moved[:, :6], video([half] * 4)[:, :6])
    assert torch.equal(moved[:, 6:], video([whole] * 4)[:, 6:]), "another scale is a change as well"


def test_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.2", "example.org"))


def test_a_push_goes_by_the_clock_and_tells_no_secret() -> None:
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    with pytest.raises(OutputError, match="rtmp"):
        PushSink("ftp://host/key", 12)
    sink = PushSink("rtmp://127.0.0.1:1/live/secret-key", 10, clock=lambda: now[0], sleep=sleep)

    def push() -> None:
        for _ in range(50):
            sink.write(np.zeros((20, 16, 16, 3), np.uint8))
            time.sleep(0.05)

    with pytest.raises(OutputError) as refused:
        push()
    assert "secret" not in str(refused.value)
    assert "refused" in str(refused.value)
    assert slept[1] == pytest.approx(0.1)
