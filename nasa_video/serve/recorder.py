"""Keeps what a stream showed, so that it can be downloaded while it goes on."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from nasa_video.errors import OutputError
from nasa_video.files.ffmpeg_sink import FfmpegSink
from nasa_video.files.formats import FORMATS, join
from nasa_video.files.frames import Frames
from nasa_video.files.metadata import to_json


class Recorder:
    """Frames into parts of an MP4; a download ends the part that is being written and joins all of them.

    Args:
        folder: where its own folder is made.
        max_frames: what comes after these is not kept.
        scale: integer upscaling.
    """

    def __init__(self, folder: Path, fps: float, max_frames: int, scale: int) -> None:
        self.fps = fps
        self.max_frames = max_frames
        self.num_frames = 0
        self._scale = scale
        self._folder = Path(tempfile.mkdtemp(prefix="recording-", dir=folder))
        self._parts: list[Path] = []
        self._sink: FfmpegSink | None = None
        self._lock = threading.Lock()
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether nothing more is kept."""
        return self.num_frames >= self.max_frames

    def write(self, frames: Frames) -> None:
        """Keep frames, up to the limit. Never raises: a recording that fails must not end a stream."""
        with self._lock:
            frames = frames[: self.max_frames - self.num_frames]
            if self._closed or not len(frames):
                return
            if self._sink is None:
                self._sink = FfmpegSink(self._folder / f"part{len(self._parts)}.mp4", self.fps, scale=self._scale)
            self.num_frames += len(frames)
            try:
                self._sink.write(frames)
            except OutputError:  # What was given to a killed ffmpeg is kept; the next frames start a new part.
                self._end_part()

    def seal(self) -> None:
        """End the running part: called when the stream ends, so that a download finds it ready."""
        with self._lock:
            self._end_part()

    def save(self, metadata: dict[str, Any]) -> Path:
        """Everything so far as one MP4 in a file of its own, which the caller removes.

        Raises:
            OutputError: there is nothing, or it cannot be written.
        """
        with self._lock:
            self._end_part()
            if self._closed or not self._parts:
                raise OutputError("nothing was recorded")
            handle, name = tempfile.mkstemp(suffix=".mp4", dir=self._folder)
            os.close(handle)
            joined = self._folder / "joined.mp4"
            join(self._parts, joined)
            FORMATS[".mp4"].convert(joined, Path(name), to_json(metadata))
            joined.unlink()
            return Path(name)

    def close(self) -> None:
        """Forget everything, files included."""
        with self._lock:
            self._closed = True
            if self._sink is not None:
                self._sink.abort()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _end_part(self) -> None:
        if self._sink is None:
            return
        sink, self._sink = self._sink, None
        with contextlib.suppress(OutputError):
            sink.finish()
        if (kept := sink.abort()) is not None:
            self._parts.append(kept)
