"""A video file by way of ffmpeg, of which nothing is lost: MP4, WebM, GIF.

While frames come, ffmpeg writes a capture (see `formats`) beside the final name. `finish` converts it, counts the
frames of the result and only then gives it the final name. If anything goes wrong (Ctrl-C, a killed ffmpeg, a full
disk) the capture's complete frames, and those that are not on disk yet, become `name.partial.mp4`.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections import deque
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from nasa_video.errors import OutputError
from nasa_video.files import ffmpeg
from nasa_video.files.atomic import commit
from nasa_video.files.formats import RawVideo, format_of, join
from nasa_video.files.frames import Frames, Upscale
from nasa_video.files.metadata import to_ffmetadata, to_json
from nasa_video.files.sinks import VideoSink, check_file

_SECONDS_TO_FLUSH = 60.0
_HEADER = struct.Struct(">I4s")
_LARGE_SIZE = struct.Struct(">Q")


class FfmpegSink(VideoSink):
    """Writes `path` as .mp4 (H.264, yuv420p, plays everywhere), .webm (VP9) or .gif, by its suffix.

    `fps`: frames a second. `metadata`: JSON values, kept in the file (`read_metadata`). `scale`: integer upscaling of
    small frames, by `upscale`. `crf`: the encoder's quality, lower is better. MP4 and WebM need even sides: an odd
    one gets its last column or row once more, after scaling; frames are never resized otherwise.

    The constructor raises OutputError where the file could not be written, so that nothing is generated in vain.
    Memory: the frames that ffmpeg has taken and not yet written (a few tens), whatever the length of the video.
    """

    def __init__(
        self,
        path: str | Path,
        fps: float,
        metadata: Mapping[str, Any] | None = None,
        *,
        scale: int = 1,
        upscale: Upscale = "lanczos",
        crf: int | None = None,
    ) -> None:
        super().__init__(metadata)
        self.path = Path(path)
        self._format = format_of(self.path)
        self._suffix = self.path.suffix
        self._raw = RawVideo(fps, scale, upscale)
        if self._raw.rate > self._format.max_fps:
            raise OutputError(f"{self.path.suffix} holds at most {self._format.max_fps:g} frames a second, got {fps:g}")
        self._crf = self._format.default_crf if crf is None else crf
        check_file(self.path)
        if self.path.is_symlink():  # The file that it names is written, and the link stays.
            self.path = self.path.resolve()
        to_json(self.metadata)  # Fails now rather than at the end.
        self._capture: _Capture | None = None
        self._temporary: list[Path] = []

    def _write(self, frames: Frames) -> None:
        if self._capture is None:
            self._capture = self._new_capture()
        self.num_frames += len(frames)
        self._capture.write([frame.tobytes() for frame in frames])

    def _finish(self) -> Path:
        assert self._capture is not None
        self._capture.finish()
        result = self._convert(self._capture.path, self.path)
        self._capture.close()
        self._clean_up()
        return result

    def _abort(self) -> Path | None:
        """Complete the capture as far as possible, then convert it; where the disk has no room for that, rename it."""
        if self._capture is None or not self._capture.path.exists():
            self._clean_up()
            return None
        capture = self._capture.path
        try:
            self.num_frames, pending = self._capture.stop()
            if pending:
                with contextlib.suppress(OutputError):
                    capture, self.num_frames = self._append(pending)
            return self._keep(capture) if self.num_frames else None
        except BaseException:  # A second Ctrl-C: what is on disk stays, as it is.
            if self._capture.path.exists():
                commit(self._capture.path, self._partial_path(".mp4"))
            raise
        finally:
            self._capture.close()
            self._clean_up()

    def _partial_path(self, suffix: str) -> Path:
        """Where an aborted video is kept, in the same folder; what an earlier run left there stays."""
        paths = (self._beside(f".partial{number if number > 1 else ''}{suffix}") for number in count(1))
        return next(path for path in paths if not path.exists())

    def _beside(self, ending: str) -> Path:
        """A name of the same stem, which is cut where a file system takes no longer one (255 bytes)."""
        stem = os.fsencode(self.path.stem)[: 255 - len(ending)].decode(errors="ignore")
        return self.path.with_name(stem + ending)

    def _keep(self, capture: Path) -> Path:
        with contextlib.suppress(OutputError):
            return self._convert(capture, self._partial_path(self._suffix))
        kept = self._partial_path(".mp4")
        commit(capture, kept)
        return kept

    def _append(self, pending: list[bytes]) -> tuple[Path, int]:
        """A capture with the frames that a dead ffmpeg did not write as well, and the number of its frames."""
        assert self._capture is not None
        tail = self._new_capture()
        try:
            tail.write(pending)
            tail.finish()
        finally:
            tail.close()
        if not self.num_frames:
            return tail.path, len(pending)
        joined = self._new_file()
        join([self._capture.path, tail.path], joined)
        expected = self.num_frames + len(pending)
        _check_count(joined, expected)
        return joined, expected

    def _convert(self, capture: Path, target: Path) -> Path:
        """Make the file from a capture under a temporary name, count its frames, then give it its name."""
        part = self._new_file()
        try:
            self._format.convert(capture, part, to_json(self.metadata))
            _check_count(part, self.num_frames)
            commit(part, target)
        finally:
            part.unlink(missing_ok=True)
        return target

    def _new_capture(self) -> _Capture:
        assert self._size is not None
        path = self._new_file()
        filters = self._raw.filters(*self._size, subsampled=self._format.subsampled)
        encoder = self._format.capture(self._crf, self._raw.rate, path)
        tags = to_ffmetadata(to_json(self.metadata))
        return _Capture(path, ffmpeg.FfmpegProcess(self._raw.source(*self._size), [*filters, *encoder], tags))

    def _new_file(self) -> Path:
        """Create `name.part.mp4` beside the final name; `name.part2.mp4` and so on if there is one (another run's)."""
        for number in count(1):
            path = self._beside(f".part{number if number > 1 else ''}.mp4")
            try:
                path.touch(exist_ok=False)
            except FileExistsError:
                continue
            except OSError as error:
                raise OutputError(f"cannot write {path}: {error.strerror}") from error
            self._temporary.append(path)
            return path
        raise AssertionError

    def _clean_up(self) -> None:
        for path in self._temporary:
            path.unlink(missing_ok=True)


class _Capture:
    """A fragmented MP4 that one ffmpeg writes, with the frames it was given and that are not on disk yet."""

    def __init__(self, path: Path, process: ffmpeg.FfmpegProcess) -> None:
        self.path = path
        self.process = process
        self._index = FragmentIndex(path)
        self._taken = 0
        self._pending: deque[bytes] = deque()

    def write(self, frames: list[bytes]) -> None:
        # Before they are fed: if Ctrl-C cuts one in two, or ffmpeg dies, all of them are here.
        self._pending.extend(frames)
        self._taken += len(frames)
        for frame in frames:
            self.process.feed(frame)
            self._forget_safe()

    def finish(self) -> None:
        """End the input and check that all frames are on disk; FfmpegError if ffmpeg failed or was killed."""
        self.process.finish()
        self._forget_safe()
        if self._pending:
            raise OutputError(f"ffmpeg wrote {self._index.frames} of {self._taken} frames and gave no reason")

    def stop(self) -> tuple[int, list[bytes]]:
        """End the input whatever ffmpeg does; return the number of frames on disk and those that are not."""
        self.process.close(_SECONDS_TO_FLUSH)
        self._forget_safe()
        self._index.truncate()
        return self._index.frames, list(self._pending)

    def close(self) -> None:
        """End the process if it still runs, and close the file."""
        self.process.close(timeout=0)
        self._index.close()

    def _forget_safe(self) -> None:
        safe = self._index.update()
        while self._pending and self._taken - len(self._pending) < safe:
            self._pending.popleft()


class FragmentIndex:
    """How far a growing fragmented MP4 is complete on disk, by its top-level boxes; `update` reads only what is new.

    ffmpeg writes one fragment (a `moof` box and its `mdat`) a frame, so complete fragments are frames that are safe:
    what comes after the last of them is lost when ffmpeg dies, and has to be cut off before the file plays cleanly.
    `frames`: complete fragments so far. `end`: the byte after the last of them (or after the `moov` box before them).
    Source: ISO/IEC 14496-12, 4.2 (box header) and 8.8 (movie fragments).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.frames = 0
        self.end = 0
        self._position = 0
        self._file = path.open("rb", buffering=0)

    def update(self) -> int:
        """Walk the boxes written since the last call and return the number of complete frames."""
        written = os.fstat(self._file.fileno()).st_size
        while (box := self._box_at(self._position, written)) is not None:
            kind, size = box
            self._position += size
            self.frames += kind == b"mdat"
            if kind in (b"moov", b"mdat"):
                self.end = self._position
        return self.frames

    def truncate(self) -> int:
        """Cut the file after its last complete frame and return the number of frames that it holds then."""
        self.update()
        os.truncate(self.path, self.end)
        return self.frames

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()

    def _box_at(self, position: int, written: int) -> tuple[bytes, int] | None:
        """Type and size in bytes of the box at `position`; None while it is not complete on disk."""
        if position + _HEADER.size > written:
            return None
        self._file.seek(position)
        header = self._file.read(_HEADER.size + _LARGE_SIZE.size)
        size, kind = _HEADER.unpack_from(header)
        if size == 1:
            if len(header) < _HEADER.size + _LARGE_SIZE.size:
                return None
            (size,) = _LARGE_SIZE.unpack_from(header, _HEADER.size)
        # Smaller than its own header: not a box (the zeros of a hole in the file). Nothing after it counts.
        if size < _HEADER.size or position + size > written:
            return None
        return kind, size


def _check_count(path: Path, expected: int) -> None:
    counted = ffmpeg.count_frames(path)
    if counted != expected:
        raise OutputError(f"the written video has {counted} frames instead of {expected}")
