"""Where frames go: the door to all sinks.

    with open_sink("ball.mp4", fps=16, metadata={"prompt": "a ball"}) as sink:
        sink.write(frames)          # uint8 (F, H, W, 3), as often as there are new ones

Leaving the block cleanly finishes the file. Leaving it by an exception, Ctrl-C included, keeps the frames made so far.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nasa_video.files.base import BaseSink, VideoSink
from nasa_video.files.ffmpeg_sink import FfmpegSink
from nasa_video.files.frames import Frames, Upscale
from nasa_video.files.frames_sink import FramesSink
from nasa_video.files.stream_sink import StreamSink

__all__ = ["FfmpegSink", "FramesSink", "MemorySink", "StreamSink", "TeeSink", "VideoSink", "open_sink"]


def open_sink(
    target: str | Path,
    fps: float,
    metadata: Mapping[str, Any] | None = None,
    *,
    scale: int = 1,
    upscale: Upscale = "lanczos",
) -> VideoSink:
    """The sink that an `-o` names: `-` standard output, a folder or `DIR/` PNG frames, else a video file by its suffix.

    `fps`: frames a second. `metadata`: JSON values. `scale`: integer upscaling. Raises OutputError, before anything is
    generated, where it is plain that the result could not be written.
    """
    if str(target) == "-":
        return StreamSink(sys.stdout.buffer, fps, metadata, scale=scale, upscale=upscale)
    # A Path has lost the slash at its end, so the text counts.
    if str(target).endswith(("/", os.sep)) or os.path.isdir(target):
        return FramesSink(target, fps, metadata, scale=scale, upscale=upscale)
    return FfmpegSink(target, fps, metadata, scale=scale, upscale=upscale)


class MemorySink(BaseSink):
    """Keeps the frames as they are, in `frames`."""

    def __init__(self, metadata: Mapping[str, Any] | None = None) -> None:
        super().__init__(metadata)
        self._chunks: list[Frames] = []

    @property
    def frames(self) -> Frames:
        """All frames written so far, (F, H, W, 3); (0, 0, 0, 3) before the first."""
        return np.concatenate(self._chunks) if self._chunks else np.zeros((0, 0, 0, 3), np.uint8)

    def _write(self, frames: Frames) -> None:
        self._chunks.append(frames.copy())
        self.num_frames += len(frames)

    def _finish(self) -> None:
        return None

    def _abort(self) -> None:
        return None


class TeeSink(BaseSink):
    """Writes to several sinks; `finish` returns the first one's path. If one fails, all are aborted."""

    def __init__(self, sinks: Sequence[VideoSink]) -> None:
        super().__init__()
        self.sinks = tuple(sinks)

    def _write(self, frames: Frames) -> None:
        for sink in self.sinks:
            sink.write(frames)
        self.num_frames += len(frames)

    def _finish(self) -> Path | None:
        for sink in self.sinks:
            sink.metadata.update(self.metadata)
        first, *_ = [sink.finish() for sink in self.sinks]
        return first

    def _abort(self) -> Path | None:
        first, *_ = [sink.abort() for sink in self.sinks]
        return first
