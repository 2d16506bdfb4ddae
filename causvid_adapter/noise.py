"""Noise that follows from (seed, latent frame, step) alone.

Drawn on the CPU generator, a frame at a time: the same seed gives the same video on every device, whatever the batch,
the length, or how the frames are cut into chunks.
"""

# B batch, T latent frames, C channels, H W latent height and width

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from causvid_adapter.errors import ShapeError


class NoiseSource(Protocol):
    """Where the sampler gets its noise from."""

    def __call__(self, frames: range, step: int) -> Tensor:
        """(B, len(frames), C, H, W); step 0 is the start of the frames' denoising, step i the renoise before step i."""
        ...


class SeededNoise:
    """Standard normal noise of one seed a sample.

    Args:
        seeds: one a sample of the batch.
        shape: (C, H, W) of a latent frame.
        device, dtype: where and as what the noise is wanted; it is always drawn in float32 on the CPU.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.seeds = tuple(seeds)
        self.shape = shape
        self.device = device
        self.dtype = dtype

    def __call__(self, frames: range, step: int) -> Tensor:
        samples = [torch.stack([self._frame(seed, frame, step) for frame in frames]) for seed in self.seeds]
        return torch.stack(samples).to(self.device, self.dtype)

    def _frame(self, seed: int, frame: int, step: int) -> Tensor:
        # A hash, since neighbouring integer seeds of (seed + frame) would give two videos the same frames shifted.
        digest = hashlib.sha256(f"{seed}/{frame}/{step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return torch.randn(self.shape, generator=generator)


class GivenNoise:
    """Noise from tensors: the start noise (B, T, C, H, W), renoise from ``fallback`` (seeds 0 to B - 1 by default).

    ``first_frame`` is the video's latent frame that the start noise begins with.
    """

    def __init__(self, start: Tensor, fallback: NoiseSource | None = None, first_frame: int = 0) -> None:
        self.start = start
        self.first_frame = first_frame
        batch, self.num_frames, *shape = start.shape
        channels, height, width = shape
        self.fallback = fallback or SeededNoise(range(batch), (channels, height, width), start.device, start.dtype)

    def __call__(self, frames: range, step: int) -> Tensor:
        if step:
            return self.fallback(frames, step)
        first, last = self.first_frame, self.first_frame + self.num_frames
        if frames.start < first or frames.stop > last:
            raise ShapeError(
                f"the start noise covers latent frames {first} to {last - 1}, asked for {frames.start} to "
                f"{frames.stop - 1}"
            )
        return self.start[:, frames.start - first : frames.stop - first]
