"""The contact sheet's file: under a name that replaces nothing but an older sheet, and whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from nasa_video.errors import OutputError
from nasa_video.files.formats import FORMATS

if TYPE_CHECKING:
    from PIL import Image

_SOFTWARE = "nasa-video contact sheet"


def sheet_path(output: str) -> Path:
    """Where the sheet of a video goes: ``ball.png`` beside ``ball.mp4``, or ``ball-sheet.png`` where that is not ours.

    ``ball.png`` may well be the picture that the video starts from.
    """
    return next(path for path in _names(Path(output.rstrip("/"))) if not path.exists() or _is_sheet(path))


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write the sheet as PNG; OutputError where that fails, and then there is no half file."""
    from PIL.PngImagePlugin import PngInfo

    mark = PngInfo()
    mark.add_text("Software", _SOFTWARE)
    part = path.with_name(f"{path.stem}.part.png")
    try:
        sheet.save(part, pnginfo=mark)
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"the video is finished, but its contact sheet {path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _names(output: Path) -> Iterator[Path]:
    stem = output.stem if output.suffix.lower() in FORMATS else output.name
    yield output.with_name(f"{stem}.png")
    yield output.with_name(f"{stem}-sheet.png")
    yield from (output.with_name(f"{stem}-sheet-{number}.png") for number in count(2))


def _is_sheet(path: Path) -> bool:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.info.get("Software") == _SOFTWARE
    except (OSError, UnidentifiedImageError):
        return False
