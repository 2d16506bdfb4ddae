"""What a video starts from, read from files: a still, a clip to go on from, or a clip to redraw."""

# F frames, H W height and width in pixels

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nasa_video.errors import InputError
from nasa_video.files.images import read_image
from nasa_video.files.source import VideoSource
from nasa_video.video.engine import InitialLatents
from nasa_video.video.request import MOST_CONTEXT_FRAMES, StartFile

if TYPE_CHECKING:
    from nasa_video.video.pipeline import VideoPipeline


def read_start(
    start: StartFile, pipeline: VideoPipeline, width: int, height: int, frames: int | None
) -> InitialLatents:
    """Read and encode what a video starts from.

    Args:
        width, height: the model's pixels; given frames are scaled to cover them and cut at the centre.
        frames: how many to make behind a still or clip (or the length of a redrawn one); None makes as many as the
            preset's videos have, less what is given, and at least one chunk.

    Raises:
        InputError: the file is gone, changed or of no use, or the chunking does not allow so many frames.
    """
    path = start.check()
    if start.kind == "image":
        image = read_image(path, (height, width))
        first = pipeline.frames_until(1)
        latents = pipeline.encode_frames(np.repeat(image[None], first, axis=0))
        # The model is shown a still clip; people see the image once and then what follows.
        return InitialLatents(latents, frames=first + _new_frames(pipeline, frames, first), lead=image[None])
    clip = VideoSource(path)
    available = clip.info.frames
    if start.kind == "redraw":
        usable = _allowed(pipeline, min(available, frames or available))
        source = pipeline.encode_frames(clip.read(0, usable, (height, width)))
        return InitialLatents(source=source, strength=start.strength, frames=usable)
    known = _allowed(pipeline, min(available, MOST_CONTEXT_FRAMES))
    everything = clip.read(0, available, (height, width))
    latents = pipeline.encode_frames(everything[-known:])
    return InitialLatents(latents, frames=known + _new_frames(pipeline, frames, known), lead=everything)


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


def _new_frames(pipeline: VideoPipeline, wanted: int | None, known: int) -> int:
    chunk = _chunk_frames(pipeline)
    if wanted is None:
        return max(chunk, (pipeline.preset.video.frames - known) // chunk * chunk)
    if wanted <= 0 or wanted % chunk:
        below = max(chunk, wanted // chunk * chunk)
        raise InputError(
            f"new frames must be a multiple of {chunk} for this model, got {wanted}; use {below} or {below + chunk}"
        )
    return wanted
