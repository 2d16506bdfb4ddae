"""One run of ``stream``: frames to a media server or a file until they are enough, or Ctrl-C."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

from nasa_video.errors import InputError, OutputError
from nasa_video.files import ffmpeg
from nasa_video.files.live_sinks import CONTAINERS, PushSink
from nasa_video.files.sinks import VideoSink, open_sink
from nasa_video.models.loading import DecoderKind, choose_device, default_dtype
from nasa_video.models.memory_plan import PlanRequest, check_plan, make_plan
from nasa_video.models.placement import Placement, WeightKind
from nasa_video.models.presets import DEFAULT_MODEL, OnChange, find_preset
from nasa_video.video.pipeline import Chunk, CompileKind, VideoPipeline
from nasa_video.video.recipe import parse_lora
from nasa_video.video.timeline import Cue, CueOf, Timeline, parse_negative

_SRT_SECONDS = 0.5
"""Several times SRT's own latency of 120 ms."""


@dataclass(frozen=True)
class StreamRequest:
    """The options of ``stream``; None means "not given"."""

    prompt: str | None
    negatives: tuple[str, ...]
    scale: float | None
    guidance: str | None
    model: str | None
    seed: int | None
    steps: int | None
    seconds: float | None
    fps: float | None
    device: str | None
    timeline: Path | None
    on_change: OnChange | None
    to: str
    first_steps: int | None = None
    memory: str | None = None
    weights: str | None = None
    offload: bool | None = None
    loras: tuple[str, ...] = ()
    decoder: str | None = None
    compiled: str = "off"


class _Enough(Exception):
    """Ctrl-C: no further call of the model, and the video ends in order."""


def run_stream(request: StreamRequest, say: Callable[[str], None]) -> dict[str, Any]:
    """Send frames until there are enough of them; returns what ``--json`` prints.

    Raises:
        NasaVideoError: something that was asked for cannot be done, or the receiver goes away.
    """
    check_target(request.to)
    timeline = Timeline.read(request.timeline) if request.timeline else None
    name = request.model or (timeline.model if timeline else None) or DEFAULT_MODEL
    loras = [parse_lora(text) for text in request.loras]
    pipeline = VideoPipeline.from_pretrained(
        name,
        request.device,
        loras=[(Path(lora.path), lora.scale) for lora in loras],
        decoder=cast(DecoderKind, request.decoder or "full"),
        placement=_placement(request, name, say),
        compiled=cast(CompileKind, request.compiled),
    )
    pipeline = pipeline.opening_in(request.first_steps or (timeline.first_steps if timeline else None))
    fps = pipeline.preset.video.fps if request.fps is None else request.fps
    limit = math.inf if request.seconds is None else max(1, round(request.seconds * fps))
    cues = _cues(request, timeline, pipeline, fps)
    seed = next(s for s in (request.seed, timeline.seed if timeline else None, 0) if s is not None)
    with _interruptible(cues) as watched:
        chunks = pipeline.stream(
            cues(0).prompts[0],
            cues=watched,
            seed=seed,
            steps=request.steps or (timeline.steps if timeline else None),
            endless=True,
            on_change=request.on_change,
        )
        scale = pipeline.preset.video.upscale
        with _open(request.to, fps, scale, seed, name) as sink:
            started = time.perf_counter()
            for frames in _frames(chunks, limit):
                sink.write(frames)
            seconds = time.perf_counter() - started
            time.sleep(seconds_to_arrive(request.to))
    where = sink.shown if isinstance(sink, PushSink) else request.to
    rate = sink.num_frames / seconds
    say(f"{where}: {sink.num_frames} frames in {seconds:.1f} s ({rate:.1f} FPS), seed {seed}")
    if isinstance(sink, PushSink) and rate < 0.9 * fps:
        say(f"the receiver needs {fps:g} frames a second and got {rate:.1f}: viewers saw it halt; lower --fps")
    return {
        "to": where,
        "frames": sink.num_frames,
        "fps": fps,
        "seconds": round(seconds, 3),
        "seed": seed,
        "model": name,
    }


def check_target(target: str) -> None:
    """Before anything is loaded or generated, whether this ffmpeg can send there.

    Raises:
        OutputError: it was built without the URL's protocol.
    """
    scheme = urlsplit(target).scheme
    if not PushSink.takes(target) or scheme not in CONTAINERS:
        return  # A file, or what `PushSink` refuses by itself.
    able = ffmpeg.run(["-protocols"]).decode().partition("Output:")[2].split()
    if scheme not in able:
        others = ", ".join(f"{known}://" for known in CONTAINERS if known in able) or "a file name"
        raise OutputError(
            f"the ffmpeg at {ffmpeg.executable()} was built without {scheme}://; use {others}, or name another ffmpeg "
            "with IMAGEIO_FFMPEG_EXE"
        )


def seconds_to_arrive(target: str) -> float:
    """How long a connection must stay open after the last frame.

    An SRT receiver holds packets back for the connection's latency and drops what it still holds when it is closed.
    """
    url = urlsplit(target)
    if url.scheme != "srt":
        return 0.0
    latency = parse_qs(url.query).get("latency", ["0"])[0]
    return _SRT_SECONDS + (min(int(latency) / 1e6, 10.0) if latency.isdigit() else 0.0)


def _placement(request: StreamRequest, name: str, say: Callable[[str], None]) -> Placement:
    """How the model is placed, and what it takes is said; one without end takes the memory of its window or rollout."""
    device = choose_device(request.device)
    wanted = PlanRequest(
        endless=True,
        memory=request.memory,
        weights=cast(WeightKind | None, request.weights),
        offload=request.offload,
        tiny_decoder=request.decoder == "tiny",
        branches=2 if request.guidance == "cfg" else 1,
    )
    plan = make_plan(find_preset(name), device, default_dtype(device), wanted)
    if plan is None:
        return Placement(cast(WeightKind, request.weights or "plain"), offload=bool(request.offload))
    return check_plan(plan, request.memory, say)


def _open(target: str, fps: float, scale: int, seed: int, model: str) -> VideoSink:
    if PushSink.takes(target):
        return PushSink(target, fps, scale=scale)
    return open_sink(target, fps, {"model": model, "seed": seed}, scale=scale)


def _frames(chunks: Iterator[Chunk], limit: float) -> Iterator[Any]:
    sent = 0
    try:
        for chunk in chunks:
            left = limit - sent
            yield chunk.frames if len(chunk.frames) <= left else chunk.frames[: int(left)]
            sent += len(chunk.frames)
            if sent >= limit:
                return
    except _Enough:
        return


def _cues(request: StreamRequest, timeline: Timeline | None, pipeline: VideoPipeline, fps: float) -> CueOf:
    prompt = request.prompt or (timeline.timeline[0].prompt if timeline else None)
    if prompt is None:
        raise InputError('say what the video should show: nasa-video stream "a red ball bouncing" --to ball.mp4')
    guidance = pipeline.guidance(request.guidance, request.scale)
    first = Cue.of(prompt, [parse_negative(text) for text in request.negatives], guidance)
    if timeline is None:
        return lambda chunk: first

    return timeline.cues(first, pipeline.guide, lambda chunk: pipeline.frames_until(chunk) / fps)


@contextmanager
def _interruptible(cues: CueOf) -> Iterator[CueOf]:
    """Cues that raise `_Enough` after the first Ctrl-C; a second one interrupts as usual."""
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        signal.signal(signal.SIGINT, before)

    def watched(chunk: int) -> Cue:
        if stopping:
            raise _Enough
        return cues(chunk)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield watched
    finally:
        signal.signal(signal.SIGINT, before)
