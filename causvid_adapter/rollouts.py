"""CausVid's long video: rollouts of trained length, each starting from the end of the one before.

The last latent frames of a rollout become the start of the next. The first of them stands for four pictures where it
was, and for one where a video begins; so it is encoded anew, from the last of its pictures (arXiv 2412.07772, the
project's long-video inference). Positions start again at zero, and history never exceeds a rollout.
"""

# B batch, T latent frames, F pictures, C channels, h w latent height and width, H W picture height and width

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from causvid_adapter.errors import ShapeError
from causvid_adapter.noise import NoiseSource
from causvid_adapter.vae import StreamingEncoder, normalize


@dataclass(frozen=True)
class Rollout:
    """One rollout of a long video; latent frames ``first`` to ``end - 1`` of the video are made in it.

    Attributes:
        shift: the video's latent frame at which the rollout's own count begins; its overlap lies before ``first``.
    """

    first: int
    end: int | None
    shift: int


def rollouts(num_frames: int | None, rollout_frames: int | None, overlap: int) -> Iterator[Rollout]:
    """The rollouts of a video of ``num_frames`` latent frames (None: without end).

    Args:
        rollout_frames: latent frames of each, the overlap included; None makes one rollout of all.
        overlap: latent frames that a rollout shares with the one before.

    Raises:
        ShapeError: a rollout is no longer than its overlap, or no whole multiple of it.
    """
    if rollout_frames is None:
        yield Rollout(0, num_frames, 0)
        return
    if rollout_frames <= overlap or rollout_frames % overlap:
        raise ShapeError(
            f"a rollout must be a multiple of {overlap} latent frames and more than its overlap of {overlap}, got "
            f"{rollout_frames}; use {max(2, rollout_frames // overlap) * overlap}"
        )
    first, shift = 0, 0
    while num_frames is None or first < num_frames:
        end = shift + rollout_frames if num_frames is None else min(shift + rollout_frames, num_frames)
        yield Rollout(first, end, shift)
        first, shift = end, end - overlap


def overlap_pictures(overlap: int, stride: int) -> int:
    """Pictures that an overlap of latent frames decodes to at the start of a rollout."""
    return 1 + stride * (overlap - 1)


@torch.no_grad()
def overlap_latents(vae: AutoencoderKLWan, tail: Tensor, picture: Tensor) -> Tensor:
    """Start latents (B, T, C, h, w) of the next rollout, normalised.

    Args:
        tail: the last latents of the rollout before, (B, T, C, h, w), normalised.
        picture: the last picture of the first of them, (B, 3, H, W) in [-1, 1].
    """
    first = normalize(vae, StreamingEncoder(vae).encode(picture.unsqueeze(1)))
    return torch.cat([first.to(tail.device, tail.dtype), tail[:, 1:]], dim=1)


class ShiftedNoise:
    """A video's noise, as a rollout that counts its frames from ``shift`` asks for it."""

    def __init__(self, noise: NoiseSource, shift: int) -> None:
        self.noise = noise
        self.shift = shift

    def __call__(self, frames: range, step: int) -> Tensor:
        return self.noise(range(frames.start + self.shift, frames.stop + self.shift), step)
