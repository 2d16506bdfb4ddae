"""Reading videos with decord: what a file holds, and its frames, checked.

decord says much about a broken file in words of its own source; here a file that cannot be used is an `InputError` that
names it. Files come in through `extend clip.mp4` and training clips.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nasa_video.errors import InputError
from nasa_video.files import ffmpeg
from nasa_video.files.frames import Frames, check_frames


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself: number of frames, frames a second, size in pixels."""

    frames: int
    fps: float
    width: int
    height: int


class VideoSource:
    """A video file, opened when it is made; InputError if it is missing, empty, cut, or no video."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise InputError(f"video {self.path} does not exist")
        if self.path.is_dir():
            raise InputError(f"{self.path} is a folder; name a video file")
        if self.path.stat().st_size == 0:
            raise InputError(f"video {self.path} is empty (0 bytes)")
        # First ffmpeg reads it through: it sees where a file is cut, and says so in an exception, not on the terminal.
        try:
            ffmpeg.count_frames(self.path)
        except ffmpeg.FfmpegError as error:
            raise InputError(f"{self.path} is no readable video: cut, damaged or of another kind ({error})") from error
        reader = self._open()
        height, width, _ = reader[0].shape
        self.info = VideoInfo(len(reader), float(reader.get_avg_fps()), width, height)

    def read(self, start: int = 0, num_frames: int | None = None, size: tuple[int, int] | None = None) -> Frames:
        """Decode frames `start` to `start + num_frames` (None: to the end) as uint8 (F, H, W, 3).

        `size`: (height, width) to fit: scaled with its proportions kept until it covers that, then cut at the centre.
        InputError if the video does not reach that far, or if its frames cannot be decoded.
        """
        available = self.info.frames
        stop = available if num_frames is None else start + num_frames
        if not 0 <= start < stop <= available:
            raise InputError(f"{self.path} has {available} frames, so {start} to {stop} cannot be read from it")
        height, width = size or (self.info.height, self.info.width)
        if height < 1 or width < 1:
            raise InputError(f"size must be at least 1 x 1 (height, width), got {size}")
        zoom = max(height / self.info.height, width / self.info.width)
        cover_height, cover_width = round(self.info.height * zoom), round(self.info.width * zoom)
        reader = self._open(cover_height, cover_width)
        frames = self._decode(reader, start, stop)
        top, left = (cover_height - height) // 2, (cover_width - width) // 2
        return np.ascontiguousarray(frames[:, top : top + height, left : left + width])

    def _open(self, height: int = -1, width: int = -1) -> Any:
        import decord

        decord.logging.set_level(decord.logging.FATAL)  # What it logs is raised as well.
        try:
            reader = decord.VideoReader(str(self.path), num_threads=1, height=height, width=width)
            if not len(reader):
                raise InputError(f"{self.path} holds no video frames")
        except (RuntimeError, decord.DECORDError) as error:
            raise InputError(f"{self.path} is no readable video: cut, damaged or of another kind") from error
        return reader

    def _decode(self, reader: Any, start: int, stop: int) -> Frames:
        import decord

        try:
            frames = check_frames(reader.get_batch(range(start, stop)).asnumpy())
        except (RuntimeError, ValueError, decord.DECORDError) as error:
            raise InputError(f"{self.path} is damaged: frames {start} to {stop} cannot be decoded") from error
        if len(frames) != stop - start:
            raise InputError(f"{self.path} is damaged: {len(frames)} frames decoded instead of {stop - start}")
        return frames


def probe(path: str | Path) -> VideoInfo:
    """Number of frames, frames a second, width and height of a video file; InputError if it is none."""
    return VideoSource(path).info


def read_frames(
    path: str | Path, start: int = 0, num_frames: int | None = None, size: tuple[int, int] | None = None
) -> Frames:
    """Decode frames of a video file, uint8 (F, H, W, 3); arguments and errors as `VideoSource.read`."""
    return VideoSource(path).read(start, num_frames, size)
