"""What every sink shares: the protocol, the rules of its life, and the checks made before anything is generated."""

from __future__ import annotations

import contextlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

from nasa_video.errors import OutputError
from nasa_video.files.frames import Frames, check_frames


class VideoSink(Protocol):
    """Takes frames in order. `write` may be called many times; then exactly one of `finish` and `abort` counts."""

    num_frames: int
    metadata: dict[str, Any]

    def write(self, frames: Frames) -> None:
        """Take frames, uint8 (F, H, W, 3), all of one size; ValueError for others, OutputError if they are not kept."""

    def finish(self) -> Path | None:
        """Complete the output and return where it is (None: not in a file); OutputError if it cannot be completed."""

    def abort(self) -> Path | None:
        """Keep what was made, never under the final name, and return where (None: nowhere). Raises no OutputError."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class BaseSink(ABC):
    """The rules of every sink: one size, one end, and after a failed step what was made is kept and named.

    `metadata` may change until the end, for what is only known then (the measured effect).
    """

    def __init__(self, metadata: Mapping[str, Any] | None = None) -> None:
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.num_frames = 0
        self._size: tuple[int, int] | None = None
        self._ended = False
        self._result: Path | None = None

    def write(self, frames: Frames) -> None:
        """Take frames, uint8 (F, H, W, 3), all of one size; ValueError for others, OutputError if they are not kept."""
        if self._ended:
            raise OutputError("this sink has ended: no frames can be written to it")
        height, width = check_frames(frames).shape[1:3]
        if self._size not in (None, (height, width)):
            raise ValueError(f"all frames must have one size: {self._size} (height, width), then {(height, width)}")
        self._size = (height, width)
        try:
            self._write(frames)
        except OutputError as error:
            self._fail(error)

    def finish(self) -> Path | None:
        """Complete the output and return where it is; OutputError, which says what is kept where, if that fails."""
        if not self._ended:
            try:
                if not self.num_frames:
                    raise OutputError("no frames were made, so nothing was written")
                self._result = self._finish()
            except OutputError as error:
                self._fail(error)
            self._ended = True
        return self._result

    def abort(self) -> Path | None:
        """Keep what was made, never under the final name, and return where. After `finish` it changes nothing."""
        if not self._ended:
            self._ended = True
            with contextlib.suppress(OutputError):
                self._result = self._abort()
        return self._result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:  # Also when Ctrl-C comes in the middle of finish; after a finish that succeeded abort does nothing.
            kept = self.abort()
            if error is not None and kept is not None and not isinstance(error, OutputError):
                error.add_note(f"{self.num_frames} frames made so far are kept in {kept}")

    def _fail(self, error: OutputError) -> NoReturn:
        """End after a failure, and raise it again with what was kept."""
        kept = self.abort()
        where = f"; {self.num_frames} frames are kept in {kept}" if kept else ""
        raise OutputError(f"{error}{where}") from error

    @abstractmethod
    def _write(self, frames: Frames) -> None:
        """Take checked frames and count them in `num_frames`."""

    @abstractmethod
    def _finish(self) -> Path | None: ...

    @abstractmethod
    def _abort(self) -> Path | None:
        """Keep what was made; set `num_frames` to how many that are."""


def check_scale(scale: int) -> int:
    """Return `scale`; OutputError unless it is from 1 to 16."""
    if not 1 <= scale <= 16:
        raise OutputError(f"scale must be a whole number from 1 to 16, got {scale}")
    return scale


def check_folder(folder: Path, *, output: Path) -> None:
    """OutputError unless a file can be written in `folder`, the place for `output`.

    It tries: root passes every permission bit, and a full or read-only disk shows only in writing.
    """
    if not folder.exists():
        raise OutputError(f"folder {folder} does not exist; create it or choose another -o than {output}")
    if not folder.is_dir():
        raise OutputError(f"{folder} is not a folder; choose another -o than {output}")
    try:
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(bytes(4096))
    except OSError as error:
        raise OutputError(f"cannot write in {folder}: {error.strerror}; choose another -o than {output}") from error
