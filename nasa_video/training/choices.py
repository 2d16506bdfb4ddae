"""What start noise stands for: a value of everything that a caption leaves open.

A model of few steps turns noise into the clip that is most likely, so that what a prompt does not mention comes out the
same again and again. Here the noise of a video's first chunk decides it: along fixed directions its components, which
are standard normal, take part in a race (the Gumbel-max trick) whose winners are distributed as the world's values are.
Nothing is drawn besides the noise, and who samples changes nothing. A student learns in
`nasa_video.training.reading` to read it there.

Each direction is the mean of one channel in one latent frame, or the same with a half wave along the width: what a
transformer without absolute positions can read by averaging over its tokens.

Shape legend: B batch, V components, T latent frames of a chunk, C channels, h w latent height and width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nasa_video.sprites.captions import Caption, leaves_open
from nasa_video.sprites.world import ATTRIBUTES, COLOURS, FLAWS, SHAPES, Scenes, decide

_ORDER = ("background", "weather", "texture", "motion", "colour", "size", "count", *FLAWS, "shape")
CHOICES: Mapping[str, int] = {
    **{name: len(ATTRIBUTES[name]) for name in _ORDER},
    **{"shape2": len(SHAPES), "colour2": len(COLOURS)},
}
"""Number of values by name, in the order of the directions; plain means, learnt first, go to the first ones."""
_COMPONENTS = {name: values if values > 2 else 1 for name, values in CHOICES.items()}
_EDGE = 1e-12
CHUNK_LATENTS = 3
"""Latent frames of a chunk."""


class NoiseChoices:
    """Reads start noise.

    Args:
        latent_size: (C, h, w) of a latent frame.
        frames: T, the latent frames of the first chunk.

    Raises:
        ValueError: there are too few channels and frames for all values.
    """

    def __init__(self, latent_size: tuple[int, int, int], frames: int = CHUNK_LATENTS) -> None:
        channels, height, width = latent_size
        total = sum(_COMPONENTS.values())
        if total > 2 * frames * channels:
            raise ValueError(f"{frames} frames of {channels} channels have room for {2 * frames * channels} components")
        plain = torch.ones(height, width) / math.sqrt(height * width)
        wave = torch.cos(math.pi * (torch.arange(width) + 0.5) / width).expand(height, width)
        patterns = (plain, wave / wave.norm())
        self.directions = torch.zeros(total, frames, channels, height, width)
        for number in range(total):
            place, pattern = number % (frames * channels), patterns[number // (frames * channels)]
            self.directions[number, place // channels, place % channels] = pattern

    def components(self, noise: Tensor) -> Tensor:
        """Components (B, V), standard normal, of start noise (B, T or more, C, h, w)."""
        return noise[:, : self.directions.shape[1]].flatten(1) @ self.directions.flatten(1).T.to(noise)

    def settle(self, noise: Tensor, scenes: Scenes, captions: Sequence[Caption]) -> Scenes:
        """What videos are to show that start with this noise (B, T or more, C, h, w) and have these B captions.

        Of B scenes on the CPU what the captions state stays; the noise decides the rest, or there is nothing else
        where a caption leaves nothing open.
        """
        open_names = [leaves_open(caption.stated) for caption in captions]
        left_open = {name: torch.tensor([name in names for names in open_names]) for name in CHOICES}
        stated = {
            name: torch.tensor([name in caption.stated for caption in captions])
            for name in ("texture", "weather", *FLAWS)
        }
        plain = {name: getattr(scenes, name) * told for name, told in stated.items()}
        parts = self.components(noise.float()).double().cpu().split(list(_COMPONENTS.values()), 1)
        by_name = dict(zip(CHOICES, parts, strict=True))
        return decide(replace(scenes, **plain), left_open, lambda name, shares: _winner(by_name[name], shares))


def _winner(components: Tensor, shares: Tensor) -> Tensor:
    """The value (B,) that wins with components (B, values), or of two values with one: each wins with its share."""
    log_uniform: Tensor = torch.special.log_ndtr(components).clamp(max=-_EDGE)
    if components.shape[1] == 1:
        return (log_uniform[:, 0] < shares[:, 1].double().log()).long()
    return (shares.double().log() - torch.log(-log_uniform)).argmax(1)
