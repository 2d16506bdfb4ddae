"""The parts of the server that need no socket: messages, queue to a client, worker, shelf, timelines."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nasa_video.errors import InputError, OutputError
from nasa_video.files.live_sinks import PushSink
from nasa_video.guidance.methods import Nasa
from nasa_video.models.presets import OnChange
from nasa_video.serve.cues import LiveCues
from nasa_video.serve.outgoing import LIMIT_BYTES, Gone, Outgoing
from nasa_video.serve.preview import Ring
from nasa_video.serve.protocol import MessageError, Start, Update, Wanted, parse_message
from nasa_video.serve.security import is_loopback
from nasa_video.serve.shelf import Shelf
from nasa_video.serve.throttle import Bucket, Buckets, client_of
from nasa_video.serve.worker import Busy, Worker
from nasa_video.video.engine import InitialLatents
from nasa_video.video.pipeline import Chunk, VideoPipeline
from nasa_video.video.request import PromptState, VideoRequest


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> VideoPipeline:
    return VideoPipeline.from_pretrained(str(model_folder), device="cpu")


def test_an_update_changes_what_it_names() -> None:
    wanted = Wanted(prompt="a ball", guidance="nag", scale=2.0)
    assert Update(type="update", prompt="a star").applied_to(wanted) == wanted.model_copy(update={"prompt": "a star"})
    assert Update(type="update", guidance="nasa").applied_to(wanted).scale is None, "each method has its own scale"
    assert Update(type="update", guidance="nag").applied_to(wanted).scale == 2.0
    assert Update(type="update", negatives=()).applied_to(wanted).negatives == ()


@pytest.mark.parametrize(
    "text",
    [
        "null",
        '{"type":"update","scale":NaN}',
        '{"type":"update","scale":1e99}',
        '{"type":"update","surprise":1}',
        '{"type":"position","stream":"a","frame":-1}',
        '{"type":"start","prompt":"\\ud800"}',
        '{"type":"start","prompt":"a","media":[]}',
        '{"type":"start","prompt":"a","seed":9007199254740993}',
        '{"type":"start","prompt":"a","negatives":[{"text":"b","weight":0}]}',
    ],
)
def test_messages_that_are_none(text: str) -> None:
    with pytest.raises(MessageError):
        parse_message(text)


def test_a_start_in_full() -> None:
    message = parse_message('{"type":"start","prompt":" a ball ","negatives":[{"text":"red"}],"media":["webm","jpeg"]}')
    assert isinstance(message, Start)
    assert message.prompt == "a ball"
    assert message.frames is None


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

    def told_place(self, place: int) -> None:
        self.places.append(place)


def _until(what: Any) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_worker_is_fair_and_keeps_the_line() -> None:
    turns: list[str] = []
    worker = Worker(max_active=2, max_waiting=2, turn_seconds=60)
    tasks = [Counting(name, turns, 30) for name in "abcd"]
    for task in tasks:
        worker.submit(task)
    with pytest.raises(Busy):
        worker.submit(Counting("e", turns))
    assert tasks[2].places == [1]
    assert tasks[3].places == [2]
    worker.start()
    _until(lambda: worker.counts == (0, 0))
    assert turns[:60].count("a") == 30, "two at once, in turns"
    assert all(set(turns[i : i + 2]) == {"a", "b"} for i in range(0, 58, 2))
    assert tasks[3].places[-1] == 0
    worker.stop()
    assert not worker.alive


def test_one_that_fails_leaves_the_others_alone() -> None:
    turns: list[str] = []
    worker = Worker(2, 2, 60)
    bad, good = Counting("bad", turns), Counting("good", turns, 20)
    worker.submit(bad)
    worker.submit(good)
    worker.start()
    _until(lambda: worker.counts == (0, 0))
    assert isinstance(bad.errors[0], ValueError)
    assert turns.count("good") == 20
    worker.stop()


def test_an_endless_one_gives_way_and_a_removed_one_frees_its_place() -> None:
    turns: list[str] = []
    worker = Worker(1, 2, 0.05)
    endless = Counting("endless", turns, endless=True)
    worker.submit(endless)
    worker.start()
    time.sleep(0.2)
    assert not endless.expired, "nobody waits"
    following = Counting("following", turns)
    worker.submit(following)
    _until(lambda: endless.expired and "following" in turns)
    worker.remove(following)
    assert worker.counts == (0, 0)
    worker.stop()


class Kept:
    def __init__(self, key: str, finished_at: float | None) -> None:
        self.key, self.finished_at, self.discarded = key, finished_at, False

    def discard(self) -> None:
        self.discarded = True


def test_the_shelf_forgets_the_oldest_and_keeps_what_runs() -> None:
    shelf: Shelf[Kept] = Shelf(limit=2, seconds=100)
    now = time.monotonic()
    running, stale = Kept("running", None), Kept("stale", now - 200)
    finished = [Kept(f"f{i}", now - 10 + i) for i in range(3)]
    for thing in (running, stale, *finished):
        shelf.put(thing)
    assert stale.discarded
    assert [thing.discarded for thing in finished] == [True, False, False]
    assert shelf.get("running") is running
    shelf.clear()
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


def test_a_timeline_says_what_changed_and_gives_the_same_cues(pipeline: VideoPipeline) -> None:
    cues = LiveCues(pipeline, Wanted(prompt="a ball"))
    history = [cues(0), cues(1)]
    cues.change(Wanted(prompt="a ball", negatives=({"text": "red", "weight": 0.5},), scale=0.7, on_change="regenerate"))  # type: ignore[arg-type]
    assert cues.next_chunk == 2
    history.append(cues(2))
    cues.change(Wanted(prompt="a star", guidance="nag", scale=2.0))
    cues.change(Wanted(prompt="a star", guidance="none"))
    history += [cues(3), cues(4)]
    timeline = cues.timeline("tiny", 5, None, None, pipeline.frames_until(5))
    assert [entry.at for entry in timeline.timeline] == [0, 1.75, 2.75]
    assert timeline.timeline[1].prompt is None
    read = VideoRequest.model_validate_json(timeline.model_dump_json())
    cue_of = pipeline.states(pipeline.resolve(read.model_copy(update={"model": None, "fps": 12})))
    assert [cue_of(chunk) for chunk in range(5)] == history
    assert len(cues.timeline("tiny", 5, None, None, 9).timeline) == 1, "what was not shown is left out"


def test_a_timeline_says_in_how_many_steps_a_scene_opens(pipeline: VideoPipeline) -> None:
    cues = LiveCues(pipeline, Wanted(prompt="a ball"))
    cues(0)
    for first_steps in (None, 2):
        assert cues.timeline("tiny", 5, 1, first_steps, 9).first_chunk_steps == first_steps


def test_cues_refuse_what_a_running_stream_cannot_do(pipeline: VideoPipeline) -> None:
    cues = LiveCues(pipeline, Wanted(prompt="a ball"))
    cues(0)
    with pytest.raises(InputError, match="classifier-free"):
        cues.change(Wanted(prompt="a ball", guidance="cfg"))
    with pytest.raises(InputError, match="prompt itself"):
        cues.change(Wanted(prompt="a ball", negatives=({"text": "A Ball"},)))  # type: ignore[arg-type]
    assert cues.wanted.guidance is None
    cues.closed = True
    with pytest.raises(Gone):
        cues(1)


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
        def cues(chunk: int) -> PromptState:
            return before if chunk < 2 else PromptState(after.prompts, after.negatives, None, on_change)

        chunks = list(pipeline.stream("a", states=cues, frames=45, on_change=default))
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
        cues = lambda chunk: before if chunk < 2 else after  # noqa: E731
        return list(pipeline.stream("a", states=cues, frames=69, on_change=on_change, rollout=rollout, **start))

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

    def video(cues: list[PromptState]) -> torch.Tensor:
        chunks = pipeline.stream("a", states=cues.__getitem__, frames=9 + 12 * 3)
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
