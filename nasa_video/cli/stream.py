"""``nasa-video stream``: a video without end to a media server or a file, until there is enough of it, or Ctrl-C."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import parse_qs, urlsplit

import typer

from nasa_video.cli.console import emit_json, loading_line, say, shown_warnings
from nasa_video.cli.lean import start_lean
from nasa_video.cli.options import (
    OUTPUT,
    SIZE,
    AsJsonOption,
    FirstChunkStepsOption,
    GuidanceOption,
    ModelOptions,
    NegOption,
    OnChangeOption,
    PromptArgument,
    SeedOption,
    StepsOption,
    TimelineOption,
    grouped,
    guidance_of,
    negatives_of,
    option,
    requested,
)

if TYPE_CHECKING:
    from nasa_video.files.sinks import VideoSink
    from nasa_video.video.pipeline import Chunk
    from nasa_video.video.request import LoadOptions, PromptState, PromptStateOf, VideoRequest

_SRT_SECONDS = 0.5
"""Several times SRT's own latency of 120 ms."""


@grouped
def stream(
    model: ModelOptions,
    prompt: PromptArgument = None,
    to: Annotated[str, option("rtmp://, rtmps://, srt://, udp://, tcp://, or a file.", panel=OUTPUT)] = "",
    neg: NegOption = None,
    guidance: GuidanceOption = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    first_chunk_steps: FirstChunkStepsOption = None,
    seconds: Annotated[float | None, option("Stop after this long.", panel=SIZE, default="Ctrl-C", min=0)] = None,
    fps: Annotated[float | None, option("Frames a second.", panel=SIZE, default="the model's")] = None,
    timeline: TimelineOption = None,
    on_change: OnChangeOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Make a video without end and send it on, until Ctrl-C."""
    if not to:
        raise typer.BadParameter("say where the video goes: --to rtmp://HOST/APP/KEY, srt://HOST:PORT or FILE.mp4")
    said = {
        "prompt": prompt, "negatives": negatives_of(neg), "guidance": guidance_of(guidance), "seed": seed,
        "steps": steps, "first_chunk_steps": first_chunk_steps, "fps": fps, "on_change": on_change,
    }  # fmt: skip
    request = requested({**said, **model.said}, timeline=timeline)
    with shown_warnings(), loading_line(request.model):
        start_lean(request, model.loading())
        result = run_stream(request, to, model.loading(), say, seconds)
    if as_json:
        emit_json(result)


class _Enough(Exception):
    """Ctrl-C: no further call of the model, and the video ends in order."""


def run_stream(
    request: VideoRequest, to: str, options: LoadOptions, say: Callable[[str], None], seconds: float | None = None
) -> dict[str, Any]:
    """Send frames until there are enough of them; returns what ``--json`` prints.

    Raises:
        NasaVideoError: something that was asked for cannot be done, or the receiver goes away.
    """
    from nasa_video.files.live_sinks import PushSink
    from nasa_video.video.loading import load_pipeline

    check_target(to)
    pipeline = load_pipeline(request, options, say, endless=True)
    recipe = pipeline.resolve(request.model_copy(update={"frames": None}))
    fps, seed, name = recipe.fps or 0.0, recipe.seed or 0, str(recipe.model)
    limit = math.inf if seconds is None else max(1, round(seconds * fps))
    with _interruptible(pipeline.states(recipe)) as watched:
        chunks = pipeline.stream(recipe, states=watched, endless=True)
        with _open(to, fps, pipeline.preset.video.upscale, seed, name) as sink:
            started = time.perf_counter()
            for frames in _frames(chunks, limit):
                sink.write(frames)
            taken = time.perf_counter() - started
            time.sleep(seconds_to_arrive(to))
    where = sink.shown if isinstance(sink, PushSink) else to
    rate = sink.num_frames / taken
    say(f"{where}: {sink.num_frames} frames in {taken:.1f} s ({rate:.1f} FPS), seed {seed}")
    if isinstance(sink, PushSink) and rate < 0.9 * fps:
        say(f"the receiver needs {fps:g} frames a second and got {rate:.1f}: viewers saw it halt; lower --fps")
    return {
        "to": where,
        "frames": sink.num_frames,
        "fps": fps,
        "seconds": round(taken, 3),
        "seed": seed,
        "model": name,
    }


def check_target(target: str) -> None:
    """Before anything is loaded or generated, whether this ffmpeg can send there.

    Raises:
        OutputError: it was built without the URL's protocol.
    """
    from nasa_video.errors import OutputError
    from nasa_video.files import ffmpeg
    from nasa_video.files.live_sinks import CONTAINERS, PushSink

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


def _open(target: str, fps: float, scale: int, seed: int, model: str) -> VideoSink:
    from nasa_video.files.live_sinks import PushSink
    from nasa_video.files.sinks import open_sink

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


@contextmanager
def _interruptible(states: PromptStateOf) -> Iterator[PromptStateOf]:
    """States that raise `_Enough` after the first Ctrl-C; a second one interrupts as usual."""
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        signal.signal(signal.SIGINT, before)

    def watched(chunk: int) -> PromptState:
        if stopping:
            raise _Enough
        return states(chunk)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield watched
    finally:
        signal.signal(signal.SIGINT, before)
