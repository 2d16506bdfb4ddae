"""What compares videos and images at a glance: side by side with labels, contact sheets, sweeps. PIL alone draws."""

from __future__ import annotations

import bisect
import textwrap
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nasa_video.errors import OutputError
from nasa_video.files.formats import FORMATS
from nasa_video.files.frames import Frames, check_frames, enlarge
from nasa_video.files.images import save_image
from nasa_video.guidance.methods import Guidance
from nasa_video.guidance.terms import Negative, format_terms

if TYPE_CHECKING:
    from PIL import Image, ImageFont

_SOFTWARE = "nasa-video contact sheet"
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
    """One still for several videos: for each a label, and a row of `columns` frames evenly spaced over its length.

    `rows`: (label, frames (F, H, W, 3)); all of one H and W. Below each frame is its number, counted from 1: that of
    `numbers` (counted from 0) where the frames are an excerpt.
    ValueError for no rows, no columns, or rows of different sizes.
    """
    from PIL import Image

    if not rows or columns < 1:
        raise ValueError(f"a contact sheet needs rows and columns, got {len(rows)} rows and {columns} columns")
    if len({check_frames(frames).shape[1:] for _, frames in rows}) > 1:
        raise ValueError(f"rows must have one frame size, got {[frames.shape[1:3] for _, frames in rows]}")
    size = _cell_size(*rows[0][1].shape[1:3])
    cells, captions = [], []
    for label, frames in rows:
        chosen = np.linspace(0, len(frames) - 1, columns).round().astype(int)
        stills = (Image.fromarray(frames[index]) for index in chosen)
        cells.append((label, [still.resize(size, Image.Resampling.LANCZOS) for still in stills]))
        captions.append([str((index if numbers is None else numbers[index]) + 1) for index in chosen])
    return label_grid(cells, captions)


def label_grid(
    rows: Sequence[tuple[str, Sequence[Image.Image]]], captions: Sequence[Sequence[str]], note: str = ""
) -> Image.Image:
    """Stills of one size in rows: above each row its label, below each still its caption, at the end a note."""
    from PIL import Image, ImageDraw

    cell_width, cell_height = rows[0][1][0].size
    columns = len(rows[0][1])
    font_size = max(14, min(32, cell_width // 11))
    font, small = _font(font_size), max(10, font_size * 2 // 3)
    margin, gap = font_size, max(4, font_size // 3)
    heading, below = font_size + gap * 2, small + gap * 2
    row_height = heading + cell_height + below
    width = 2 * margin + columns * cell_width + (columns - 1) * gap
    lines = textwrap.wrap(note, max(20, int(width / max(1.0, _font(small).getlength("n")))))
    height = 2 * margin - below // 2 + len(rows) * row_height + len(lines) * (small + gap)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for row, ((label, stills), under) in enumerate(zip(rows, captions, strict=True)):
        top = margin + row * row_height
        draw.text((margin, top + heading // 2), _fit(label, font, width - 2 * margin), _INK, font, "lm")
        for column, (still, caption) in enumerate(zip(stills, under, strict=True)):
            left = margin + column * (cell_width + gap)
            sheet.paste(still, (left, top + heading))
            foot = (left + cell_width // 2, top + heading + cell_height + gap)
            draw.text(foot, caption, _FAINT, _font(small), "mt")
    for index, line in enumerate(lines):
        draw.text((margin, margin + len(rows) * row_height + index * (small + gap)), line, _INK, _font(small))
    return sheet


def comparison_labels(guidance: Guidance | None, negatives: Sequence[Negative]) -> tuple[str, str]:
    """What stands over the unguided and over the guided video of a comparison.

    The negatives come first: what a narrow video cuts off is the method, not what it removes.
    """
    if guidance is None:
        return "without", "the same, no negative given"
    method = f"{guidance.label} {guidance.scale:g}"
    return "without", f"--neg {format_terms(negatives)}, {method}" if negatives else f"timeline, {method}"


def sheet_path(output: str) -> Path:
    """Where the sheet of a video goes: ``ball.png`` beside ``ball.mp4``, or ``ball-sheet.png`` where that is not ours.

    ``ball.png`` may well be the image that the video starts from.
    """
    return next(path for path in _names(Path(output.rstrip("/"))) if not path.exists() or _is_sheet(path))


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write the sheet as PNG; OutputError where that fails, and then there is no half file."""
    try:
        save_image(sheet, path, {}, software=_SOFTWARE)
    except OutputError as error:
        raise OutputError(f"the video is finished, but its contact sheet is not: {error}") from error


def _cell_size(height: int, width: int) -> tuple[int, int]:
    """(width, height) of a frame on a contact sheet."""
    if width < _MIN_CELL:
        factor = -(-_MIN_CELL // width)
        return width * factor, height * factor
    if width > _MAX_CELL:
        return _MAX_CELL, max(1, round(height * _MAX_CELL / width))
    return width, height


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
    fits = bisect.bisect(range(len(text)), width, key=lambda length: font.getlength(text[:length] + "…")) - 1
    return text[: max(0, fits)].rstrip() + "…"


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
