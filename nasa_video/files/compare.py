"""Pictures that compare videos: side by side with labels, and a contact sheet. PIL alone draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nasa_video.files.frames import Frames, check_frames, enlarge

if TYPE_CHECKING:
    from PIL import Image, ImageFont

_PAPER = (250, 250, 248)
_INK = (28, 30, 34)
_FAINT = (130, 134, 140)
_MIN_CELL = 144  # pixels: smaller frames are enlarged on a contact sheet, by a whole factor
_MAX_CELL = 320


def side_by_side(videos: Sequence[Frames], labels: Sequence[str], *, scale: int = 1) -> Frames:
    """Set videos of one shape (F, H, W, 3) beside each other, each under a slim band with its label.

    `scale` enlarges the videos first, so that small ones get labels that can be read (a sink would enlarge both).
    Returns (F, band + H, W * n + gaps, 3) with even sides. ValueError if shapes differ or a label is missing.
    """
    if not videos or len(videos) != len(labels):
        raise ValueError(f"every video needs one label, got {len(videos)} videos and {len(labels)} labels")
    if len({check_frames(video).shape for video in videos}) > 1:
        raise ValueError(f"videos side by side must have one shape, got {[video.shape for video in videos]}")
    videos = [enlarge(video, scale) for video in videos]
    num_frames, height, width, _ = videos[0].shape
    font_size = max(9, min(28, width // 16))
    band, gap = font_size + font_size // 2 + 2, 2
    band += (band + height) % 2
    total_width = width * len(videos) + gap * (len(videos) - 1)
    canvas = np.empty((num_frames, band + height, total_width + total_width % 2, 3), np.uint8)
    canvas[:] = _PAPER
    for column, (video, label) in enumerate(zip(videos, labels, strict=True)):
        left = column * (width + gap)
        canvas[:, :band, left : left + width] = _label(label, width, band, font_size)
        canvas[:, band : band + height, left : left + width] = video
    return canvas


class Excerpt:
    """Evenly spaced frames of a video of any length, never more than `most`, with their numbers in it."""

    def __init__(self, most: int = 128) -> None:
        self._most = most
        self._every = 1
        self._seen = 0
        self._kept: list[Frames] = []

    def add(self, frames: Frames) -> None:
        """The next frames (F, H, W, 3) of the video."""
        for frame in frames:
            if self._seen % self._every == 0:
                self._kept.append(frame.copy())
            self._seen += 1
            if len(self._kept) > self._most:
                self._kept = self._kept[::2]
                self._every *= 2

    @property
    def frames(self) -> Frames:
        """(F, H, W, 3); ValueError before the first."""
        return np.stack(self._kept)

    @property
    def numbers(self) -> range:
        """Of the frames, counted from 0."""
        return range(0, len(self._kept) * self._every, self._every)


def contact_sheet(
    rows: Sequence[tuple[str, Frames]], columns: int = 6, numbers: Sequence[int] | None = None
) -> Image.Image:
    """One picture for several videos: for each a label, and a row of `columns` frames evenly spaced over its length.

    `rows`: (label, frames (F, H, W, 3)); all of one H and W. Below each frame is its number, counted from 1: that of
    `numbers` (counted from 0) where the frames are an excerpt.
    ValueError for no rows, no columns, or rows of different sizes.
    """
    from PIL import Image, ImageDraw

    if not rows or columns < 1:
        raise ValueError(f"a contact sheet needs rows and columns, got {len(rows)} rows and {columns} columns")
    if len({check_frames(frames).shape[1:] for _, frames in rows}) > 1:
        raise ValueError(f"rows must have one frame size, got {[frames.shape[1:3] for _, frames in rows]}")
    cell_width, cell_height = _cell_size(*rows[0][1].shape[1:3])
    font_size = max(14, cell_width // 11)
    font = _font(font_size)
    margin, gap, small = font_size, max(4, font_size // 3), max(10, font_size * 2 // 3)
    heading, caption = font_size + gap * 2, small + gap * 2
    row_height = heading + cell_height + caption
    width = 2 * margin + columns * cell_width + (columns - 1) * gap
    sheet = Image.new("RGB", (width, 2 * margin - caption // 2 + len(rows) * row_height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, (label, frames) in enumerate(rows):
        top = margin + row * row_height
        draw.text((margin, top + heading // 2), _fit(label, font, width - 2 * margin), _INK, font, "lm")
        for column, index in enumerate(np.linspace(0, len(frames) - 1, columns).round().astype(int)):
            left = margin + column * (cell_width + gap)
            sheet.paste(_enlarged(frames[index], cell_width, cell_height), (left, top + heading))
            below = top + heading + cell_height + gap
            draw.text(
                (left + cell_width // 2, below),
                str((index if numbers is None else numbers[index]) + 1),
                _FAINT,
                _font(small),
                "mt",
            )
    return sheet


def _cell_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) of a frame on a contact sheet."""
    if width < _MIN_CELL:
        factor = -(-_MIN_CELL // width)
        return width * factor, height * factor
    if width > _MAX_CELL:
        return _MAX_CELL, max(1, round(height * _MAX_CELL / width))
    return width, height


def _enlarged(frame: Frames, width: int, height: int) -> Image.Image:
    from PIL import Image

    return Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)


def _label(text: str, width: int, height: int, font_size: int) -> Frames:
    """A band (height, width, 3) with `text` in its middle."""
    from PIL import Image, ImageDraw

    band = Image.new("RGB", (width, height), _PAPER)
    font = _font(font_size)
    ImageDraw.Draw(band).text((width / 2, height / 2), _fit(text, font, width - 4), _INK, font, "mm")
    return np.asarray(band)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """`text` on one line, cut with an ellipsis where it is wider than `width` pixels."""
    # A prompt may be a million characters long; no more than one a pixel can be seen.
    text = " ".join(text[: 4 * int(width)].split())
    if font.getlength(text) <= width:
        return text
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if font.getlength(text[:middle] + "…") <= width:
            fits = middle
        else:
            too_long = middle
    return text[:fits].rstrip() + "…"
