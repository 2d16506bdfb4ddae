"""A scale sweep as one picture (figure 4 of arXiv 2412.02687), and pictures as files that say how they were made."""

from __future__ import annotations

import os
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from nasa_video.errors import InputError, OutputError
from nasa_video.files.metadata import to_json

MARGIN = 8
METADATA_KEY = "comment"


def label_grid(
    rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], row_labels: Sequence[str], caption: str
) -> Image.Image:
    """Pictures of one size in rows, a label over each column and beside each row, a caption below."""
    width, height = rows[0][0].size
    font: Any = ImageFont.load_default(size=max(12, height // 24))
    line = int(font.size * 1.4)
    left = max([0, *(int(font.getlength(label)) for label in row_labels)]) + 2 * MARGIN
    full = left + len(columns) * (width + MARGIN)
    per_line = max(20, int(full / max(1.0, font.getlength("n"))))
    lines = textwrap.wrap(caption, per_line)
    canvas = Image.new(
        "RGB", (full, line + 2 * MARGIN + len(rows) * (height + MARGIN) + len(lines) * line + MARGIN), "white"
    )
    draw = ImageDraw.Draw(canvas)
    for index, label in enumerate(columns):
        draw.text((left + index * (width + MARGIN), MARGIN), label, fill="black", font=font)
    top = line + 2 * MARGIN
    for label, row in zip(row_labels, rows, strict=True):
        draw.text((MARGIN, top), label, fill="black", font=font)
        for index, picture in enumerate(row):
            canvas.paste(picture, (left + index * (width + MARGIN), top))
        top += height + MARGIN
    for index, text in enumerate(lines):
        draw.text((MARGIN, top + index * line), text, fill="black", font=font)
    return canvas


def save_picture(image: Image.Image, path: Path, metadata: dict[str, Any]) -> None:
    """Write a PNG, JPEG or WebP whole or not at all; a PNG carries the metadata as one JSON object.

    Raises:
        InputError: the name has another ending.
        OutputError: it cannot be written; no part of it is left.
    """
    formats = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
    kind = formats.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"a picture's name must end in {', '.join(formats)}, got {path.name}")
    options: dict[str, Any] = {}
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_text(METADATA_KEY, to_json(metadata))
        options["pnginfo"] = info
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=path.suffix)
        with os.fdopen(handle, "wb") as file:
            image.save(file, kind, **options)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise OutputError(f"{path} could not be written: {error}; nothing was kept") from error
