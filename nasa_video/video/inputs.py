"""What a video starts from, beside noise: a picture, a clip to go on from, or a clip to redraw."""

# F frames, H W picture height and width

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from nasa_video.errors import InputError
from nasa_video.files.frames import Frames
from nasa_video.files.images import read_image
from nasa_video.files.source import VideoSource
from nasa_video.models.presets import Strict
from nasa_video.video.pipeline import VideoPipeline

StartKind = Literal["image", "extend", "redraw"]
# Frames of a clip that are looked at when it is continued; more would only leave the window again.
MOST_GIVEN_FRAMES = 81


class StoredStart(Strict):
    """A start in a file's recipe: the file is named, not copied; its hash says whether it is still the same."""

    kind: StartKind
    path: str
    sha256: str
    strength: float = 1.0
    new_frames: int | None = None

    @classmethod
    def of_file(cls, kind: StartKind, path: Path, strength: float = 1.0, new_frames: int | None = None) -> StoredStart:
        """Name a file, and take its hash.

        ``new_frames`` is how many to make behind a picture or clip (or the length of a redrawn one); None makes as
        many as the preset's videos have, less what is given, and at least one chunk.

        Raises:
            InputError: it cannot be read.
        """
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        return cls(kind=kind, path=str(path), sha256=digest, strength=strength, new_frames=new_frames)

    def check(self) -> Path:
        """The file, when it is still the one that the recipe was written for.

        Raises:
            InputError: it is gone, or another one.
        """
        path = Path(self.path)
        if self.of_file(self.kind, path).sha256 != self.sha256:
            raise InputError(f"{path} is not the file that this video was made from (its content has changed)")
        return path

    def planned_frames(self, frames_per_chunk: int, stride: int = 4) -> int | None:
        """The most pictures that the model will have to remember: given and new ones; None is the preset's length."""
        if self.new_frames is None or self.kind == "redraw":
            return self.new_frames
        return self.new_frames + (MOST_GIVEN_FRAMES if self.kind == "extend" else 1 + stride * (frames_per_chunk - 1))


@dataclass(frozen=True)
class Start:
    """A start, encoded.

    Attributes:
        lead: frames (F, H, W, 3) that the written video begins with, before what is generated.
        prefix, source, strength, frames, shown_prefix: as :meth:`VideoPipeline.stream` takes them.
    """

    lead: Frames
    prefix: Tensor | None = None
    source: Tensor | None = None
    strength: float = 1.0
    frames: int | None = None
    shown_prefix: int = 0


def read_start(stored: StoredStart, pipeline: VideoPipeline, width: int, height: int) -> Start:
    """Read and encode what a video starts from.

    ``width`` and ``height`` are the model's pixels; given frames are scaled to cover them and cut at the centre.
    """
    path, new_frames = stored.check(), stored.new_frames
    if stored.kind == "image":
        image = read_image(path, (height, width))
        first = pipeline.frames_until(1)
        latents = pipeline.encode_frames(np.repeat(image[None], first, axis=0))
        # The model is shown a still clip; people see the image once and then what follows.
        return Start(image[None], prefix=latents, frames=first + _new_frames(pipeline, new_frames, first))
    clip = VideoSource(path)
    available = clip.info.frames
    usable = _allowed(pipeline, min(available, new_frames or available) if stored.kind == "redraw" else available)
    if stored.kind == "redraw":
        frames = clip.read(0, usable, (height, width))
        source = pipeline.encode_frames(frames)
        return Start(frames[:0], source=source, strength=stored.strength, frames=usable)
    given = _allowed(pipeline, min(available, MOST_GIVEN_FRAMES))
    everything = clip.read(0, available, (height, width))
    latents = pipeline.encode_frames(everything[-given:])
    return Start(everything, prefix=latents, frames=given + _new_frames(pipeline, new_frames, given))


def _chunk_frames(pipeline: VideoPipeline) -> int:
    return pipeline.frames_until(2) - pipeline.frames_until(1)


def _allowed(pipeline: VideoPipeline, frames: int) -> int:
    """The longest length up to ``frames`` that the chunking allows."""
    first, chunk = pipeline.frames_until(1), _chunk_frames(pipeline)
    if frames < first:
        raise InputError(
            f"this model starts from at least {first} frames, the clip has {frames}; use --image for a still"
        )
    return first + (frames - first) // chunk * chunk


def _new_frames(pipeline: VideoPipeline, wanted: int | None, given: int) -> int:
    chunk = _chunk_frames(pipeline)
    if wanted is None:
        return max(chunk, (pipeline.preset.video.frames - given) // chunk * chunk)
    if wanted <= 0 or wanted % chunk:
        below = max(chunk, wanted // chunk * chunk)
        raise InputError(
            f"new frames must be a multiple of {chunk} for this model, got {wanted}; use {below} or {below + chunk}"
        )
    return wanted
