"""A folder of numbered PNG files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nasa_video.errors import OutputError
from nasa_video.files.base import BaseSink, check_folder, check_scale
from nasa_video.files.formats import frame_rate
from nasa_video.files.frames import Frames, Upscale, enlarge
from nasa_video.files.metadata import METADATA_FILE


class FramesSink(BaseSink):
    """Numbered PNG files, `000000.png` and so on, each there whole or not at all, then `metadata.json`.

    The folder is made if only its last part is missing. One that holds frames already is refused: a shorter video would
    end in the older one's frames. `metadata.json` (`frames`, `fps`, `metadata`) is written last: where it is missing,
    the video was not completed. `scale`: integer upscaling of small pictures.
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
        self._fps = float(frame_rate(fps))
        self._scale, self._upscale = check_scale(scale), upscale
        self._made_folder = not self.folder.exists()
        if self._made_folder:
            check_folder(self.folder.absolute().parent, output=self.folder)
            self.folder.mkdir()
        check_folder(self.folder, output=self.folder)
        if any(self.folder.glob("[0-9]*.png")) or (self.folder / METADATA_FILE).exists():
            raise OutputError(f"{self.folder} already holds frames; empty it or choose another -o")

    def _write(self, frames: Frames) -> None:
        from PIL import Image

        for frame in enlarge(frames, self._scale, self._upscale):
            with self._replacing(f"{self.num_frames:06d}.png") as part:
                Image.fromarray(frame).save(part, format="png")
            self.num_frames += 1

    def _finish(self) -> Path:
        content = json.dumps({"frames": self.num_frames, "fps": self._fps, "metadata": self.metadata}, indent=1)
        with self._replacing(METADATA_FILE) as part:
            part.write_text(content + "\n", encoding="utf-8")
        return self.folder

    def _abort(self) -> Path | None:
        if self.num_frames:
            return self.folder
        if self._made_folder:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
        return None

    @contextlib.contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        """A temporary path that becomes `name` if the block succeeds, and is removed if not."""
        part = self.folder / f"{name}.part"
        try:
            yield part
            os.replace(part, self.folder / name)
        except OSError as error:
            raise OutputError(f"cannot write {self.folder / name}: {error.strerror or error}") from error
        finally:
            part.unlink(missing_ok=True)
