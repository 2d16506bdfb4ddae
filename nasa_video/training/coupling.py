"""Noise that settles what a caption leaves open.

Training pairs clips with noise at random. At the highest noise level the noise then says nothing about the clip, the
best answer is a mean, and a sampler of few steps that starts from it ends in the few values that are nearest to the
mean. Here the noise of a clip's first chunk is drawn *given* the clip: along one direction a value, the mean of the
clips that show it, the noise takes part in a race which the clip's own value wins. Over all the clips that a caption
may come with the noise is standard normal as before (the Gumbel-max trick), so that nothing changes for who samples;
but a seed is to stand for a background, a size, a weather, at the shares of the data.

How often a value comes with a caption is known only nearly: captions state a pair, a weather or a texture more often
than that there is none, which is left out. Under the captions of training components are off by up to a tenth.

Coupling noise and data is known from arXiv 2302.00482 (optimal transport within a batch) and 2406.12303; drawing the
noise from named attributes is ours.

Shape legend: B batch, V values of all attributes, T latent frames, C channels, h w latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nasa_video.sprites.captions import left_open, shares_left_open
from nasa_video.sprites.world import ATTRIBUTES
from nasa_video.training.dataset import LatentClips

_EDGE = 1e-9


class NoiseCoupling:
    """Couples start noise with what clips show.

    Args:
        directions: (V, T, C, h, w), orthonormal, in the order of `ATTRIBUTES` and their values.
    """

    def __init__(self, directions: Tensor) -> None:
        self.directions = directions

    @classmethod
    def of(cls, first_chunks: LatentClips, most: int = 12288) -> NoiseCoupling:
        """Directions from at most `most` first chunks: the nearest orthonormal ones to the means of each value."""
        latents = first_chunks.latents[:most].float()
        rows = first_chunks.rows[: len(latents)]
        middle = latents.mean(0)
        means = []
        for attribute, values in ATTRIBUTES.items():
            shown = torch.tensor([row[attribute] for row in rows], device=latents.device)
            for value in range(len(values)):
                chosen = latents[shown == value]
                means.append(chosen.mean(0) - middle if len(chosen) else torch.zeros_like(middle))
        flat = torch.nn.functional.normalize(torch.stack(means).flatten(1).double(), dim=1)
        left, _, right = torch.linalg.svd(flat, full_matrices=False)
        return cls((left @ right).float().unflatten(1, latents.shape[1:]))

    def couple(self, noise: Tensor, race: Tensor) -> Tensor:
        """Start noise (B, T or more, C, h, w) with the components of its first chunk replaced by `race` (B, V)."""
        frames = self.directions.shape[1]
        change = (race.to(noise) - self.components(noise)) @ self.directions.flatten(1).to(noise)
        first = noise[:, :frames] + change.unflatten(1, noise[0, :frames].shape)
        return torch.cat((first, noise[:, frames:]), 1)

    def components(self, noise: Tensor) -> Tensor:
        """Components (B, V) of start noise (B, T or more, C, h, w) along the directions."""
        return noise[:, : self.directions.shape[1]].flatten(1) @ self.directions.flatten(1).T.to(noise)


def race(rows: Sequence[Mapping[str, int]], stated: Sequence[frozenset[str]], generator: torch.Generator) -> Tensor:
    """Standard normal components (B, V) in which the value of each scene wins wherever its caption leaves it open.

    Args:
        rows: the scenes' integers by attribute.
        stated: what their captions state; there the components are drawn freely.
        generator: a CPU generator.
    """
    scenes = {name: torch.tensor([row[name] for row in rows]) for name in ATTRIBUTES}
    opens = [left_open(row, words) for row, words in zip(rows, stated, strict=True)]
    told = {name: torch.tensor([name not in words for words in opens]) for name in ATTRIBUTES}
    shares = shares_left_open(scenes, told)
    parts = [_won(shares[name].double(), scenes[name], generator, told[name]) for name in ATTRIBUTES]
    return torch.cat(parts, 1).float()


def winners(components: Tensor, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The value (B,) that start noise with these components (B, V) stands for, by attribute, at the given shares."""
    parts = components.double().split([len(values) for values in ATTRIBUTES.values()], 1)
    return {
        name: (shares[name].log() - torch.log(-torch.special.log_ndtr(part))).argmax(1)
        for name, part in zip(ATTRIBUTES, parts, strict=True)
    }


def _won(shares: Tensor, winner: Tensor, generator: torch.Generator, free: Tensor) -> Tensor:
    """Normals (B, values) whose Gumbel counterparts plus log `shares` are largest at `winner`, where not `free`."""
    gumbels = _gumbels(shares, generator)
    located = shares.log() + gumbels
    top = _gumbels(shares[:, :1], generator)  # the largest of all has a standard Gumbel distribution
    below = -torch.log(torch.exp(-located) + torch.exp(-top))
    won = torch.nn.functional.one_hot(winner, shares.shape[1]).bool()
    raced = torch.where(won, top, below) - shares.log()
    # what never happens under the caption stays free, and so does what the caption states
    raced = torch.where((shares > 0) & ~free[:, None], raced, gumbels)
    uniform = torch.exp(-torch.exp(-raced)).clamp(_EDGE, 1 - _EDGE)
    normals: Tensor = torch.special.ndtri(uniform)
    return normals


def _gumbels(like: Tensor, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(like.shape, dtype=like.dtype, generator=generator).clamp(_EDGE, 1 - _EDGE)
    return -torch.log(-torch.log(uniform))
