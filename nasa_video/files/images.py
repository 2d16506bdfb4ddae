"""Stills as files: read the way a person sees them, written whole or not at all, with how they were made inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nasa_video.errors import InputError
from nasa_video.files.atomic import atomic_write
from nasa_video.files.metadata import to_json

if TYPE_CHECKING:
    from PIL import Image

METADATA_KEY = "comment"
"""The PNG text that holds the metadata, one JSON object."""
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def is_image(path: Path) -> bool:
    """Whether a file is a still by its name."""
    return path.suffix.lower() in _FORMATS


def read_image(path: Path, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """An image file as RGB uint8 (H, W, 3), upright as its camera was held.

    `size`: (height, width) to fit: scaled with its proportions kept until it covers that, then cut at the centre.
    InputError: it is missing or no image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no readable image: {error}") from error
    if size is not None:
        upright = ImageOps.fit(upright, (size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(upright)


def save_image(image: Image.Image, path: Path, metadata: Mapping[str, Any], software: str = "nasa-video") -> None:
    """Write a PNG, JPEG or WebP whole or not at all; a PNG carries `software` and the metadata as one JSON object.

    Raises:
        InputError: the name has another ending.
        OutputError: it cannot be written; no part of it is left.
    """
    from PIL.PngImagePlugin import PngInfo

    kind = _FORMATS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"an image's name must end in {', '.join(_FORMATS)}, got {path.name}")
    options: dict[str, Any] = {}
    if kind == "PNG":
        options["pnginfo"] = info = PngInfo()
        info.add_text("Software", software)
        info.add_text(METADATA_KEY, to_json(metadata))
    with atomic_write(path) as part:
        image.save(part, kind, **options)
