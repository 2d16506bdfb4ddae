"""Where frames go: the rules of every sink, and `open_sink`, which makes the one that a target names.

    with open_sink("ball.mp4", fps=16, metadata={"prompt": "a ball"}) as sink:
        sink.write(frames)          # uint8 (F, H, W, 3), as often as there are new ones

Leaving the block cleanly finishes the file. Leaving it by an exception, Ctrl-C included, keeps the frames made so far.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from nasa_video.errors import OutputError
from nasa_video.files.atomic import atomic_write
from nasa_video.files.formats import RawVideo
from nasa_video.files.frames import Frames, Upscale, check_frames, enlarge
from nasa_video.files.metadata import METADATA_FILE


class VideoSink(ABC):
    """Takes frames in order: `write` as often as needed, then one end. One size, and what was made is never lost.

    `num_frames`: frames taken so far. `metadata` may change until the end, for what is only known then (the effect).
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
        """Complete the output and return where it is (None: not in a file).

        OutputError, which says what is kept where, if it cannot be completed.
        """
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
        """Keep what was made, never under the final name, and return where (None: nowhere). Raises no OutputError.

        After `finish` it changes nothing.
        """
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
    from nasa_video.files.ffmpeg_sink import FfmpegSink
    from nasa_video.files.live_sinks import StreamSink

    if str(target) == "-":
        return StreamSink(sys.stdout.buffer, fps, metadata, scale=scale, upscale=upscale)
    # A Path has lost the slash at its end, so the text counts.
    folder = str(target).endswith(("/", os.sep)) or os.path.isdir(target)
    return (FramesSink if folder else FfmpegSink)(target, fps, metadata, scale=scale, upscale=upscale)


class FramesSink(VideoSink):
    """Numbered PNG files, `000000.png` and so on, each there whole or not at all, then `metadata.json`.

    The folder is made if only its last part is missing. One that holds frames already is refused: a shorter video would
    end in the older one's frames. `metadata.json` (`frames`, `fps`, `metadata`) is written last: where it is missing,
    the video was not completed. `scale`: integer upscaling of small frames.
    """

    def __init__(
        self,
        folder: str | Path,
        fps: float,
        metadata: Mapping[str, Any] | None = None,
        *,
        scale: int = 1,
        upscale: Upscale = "lanczos",
    ) -> None:
        super().__init__(metadata)
        self.folder = Path(folder)
        self._raw = RawVideo(fps, scale, upscale)
        self._made_folder = not self.folder.exists()
        if self._made_folder:
            check_folder(self.folder.absolute().parent, output=self.folder)
            self.folder.mkdir()
        check_folder(self.folder, output=self.folder)
        if any(self.folder.glob("[0-9]*.png")) or (self.folder / METADATA_FILE).exists():
            raise OutputError(f"{self.folder} already holds frames; empty it or choose another -o")

    def _write(self, frames: Frames) -> None:
        from PIL import Image

        for frame in enlarge(frames, self._raw.scale, self._raw.upscale):
            with atomic_write(self.folder / f"{self.num_frames:06d}.png") as part:
                Image.fromarray(frame).save(part, format="png")
            self.num_frames += 1

    def _finish(self) -> Path:
        content = {"frames": self.num_frames, "fps": float(self._raw.rate), "metadata": self.metadata}
        with atomic_write(self.folder / METADATA_FILE) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return self.folder

    def _abort(self) -> Path | None:
        if self.num_frames:
            return self.folder
        if self._made_folder:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
        return None


def check_file(path: Path) -> None:
    """OutputError unless a file can be written as `path`."""
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder; end -o in / for PNG frames, or name a file in it")
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is a device or a pipe; a finished file would replace it: use -o - > {path}")
    except OSError as error:  # A name that the file system does not take.
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    check_folder(path.absolute().parent, output=path)


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
