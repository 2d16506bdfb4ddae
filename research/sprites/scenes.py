"""Clips of the sprites world for training: their sizes, and scenes that turn into others.

Shape legend: B batch.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from nasa_video.sprites.world import COLOURS, FLAWS, SHAPES, Scenes, sample_scenes

FRAME_SIZE = 64
"""Height and width of a picture in pixels."""
FRAMES_PER_SECOND = 12
CLIP_FRAMES = 33
"""Frames of a training clip: 9 latent frames of a Wan autoencoder, 3 chunks of 3."""
CLIP_CHUNKS = 3
_CHANGING = ("size", "texture", "motion", "background", "weather")


def concatenate(scenes: list[Scenes]) -> Scenes:
    """One batch out of several."""
    return Scenes(**{f.name: torch.cat([getattr(s, f.name) for s in scenes]) for f in fields(Scenes)})


def sample_switches(scenes: Scenes, share: float, generator: torch.Generator) -> tuple[Scenes, Tensor]:
    """What some clips turn into when their prompt changes between two chunks.

    Args:
        scenes: the clips' scenes at the start.
        share: of clips that change.
        generator: a CPU generator.

    Returns:
        The later scenes, which differ from `scenes` in one to three attributes, and the chunk (B,) of three latent
        frames that is the first to show them; 0 where a clip does not change (its later scene is its first one).
    """
    n = len(scenes)
    fresh = sample_scenes(n, generator)
    groups = [("shape", "shape2"), ("colour", "colour2"), ("count",), *((name,) for name in (*_CHANGING, *FLAWS))]
    # common attributes are what people change: colour and background are drawn more often than a flaw
    weights = torch.tensor([3.0, 4.0, 0.7, 1.0, 1.0, 2.0, 4.0, 1.5, *([0.5] * len(FLAWS))])
    number = torch.randint(1, 4, (n,), generator=generator)
    order = torch.multinomial(weights.expand(n, -1), 3, generator=generator)
    chosen = torch.zeros(n, len(groups), dtype=torch.bool)
    for place in range(3):
        chosen[torch.arange(n), order[:, place]] |= number > place
    chunk = torch.randint(1, CLIP_CHUNKS, (n,), generator=generator)
    chunk = torch.where(torch.rand(n, generator=generator) < share, chunk, torch.zeros_like(chunk))
    chosen &= (chunk > 0)[:, None]
    changed = {f.name: getattr(scenes, f.name) for f in fields(scenes)}
    for column, names in enumerate(groups):
        for name in names:
            changed[name] = torch.where(chosen[:, column], getattr(fresh, name), changed[name])
    later = Scenes(**changed)
    twins = (later.shape == later.shape2, later.colour == later.colour2)
    changed["shape2"] = torch.where(twins[0], (later.shape2 + 1) % len(SHAPES), later.shape2)
    changed["colour2"] = torch.where(twins[1], (later.colour2 + 1) % len(COLOURS), later.colour2)
    changed["size"] = torch.where(later.count == 1, torch.zeros_like(later.size), later.size)
    return Scenes(**changed), chunk


def first_frame_of(chunk: Tensor) -> Tensor:
    """First frame of a chunk of three latent frames, of which the very first stands for one frame: 0, 9, 21."""
    return torch.where(chunk > 0, 12 * chunk - 3, torch.zeros_like(chunk))
