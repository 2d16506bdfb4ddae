"""Finished chunks: the latents of a chunk to its frames, and what is known of them."""

# B batch, T latent frames, F pictures, C channels, h w latent height and width, H W picture height and width

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from diffusers import AutoencoderKLWan
from torch import Tensor

from causvid_adapter.rollouts import overlap_pictures
from nasa_video.files.frames import frames_from_tensor
from nasa_video.guidance.state import Effect
from nasa_video.models.loading import Decoder
from nasa_video.video.decoding import Made
from nasa_video.video.timeline import Cue

# Decoders overshoot a little on any clean picture; only more than this counts as out of range.
RANGE_MARGIN = 0.05


@dataclass(frozen=True)
class Chunk:
    """Finished frames of one chunk.

    Attributes:
        index: from 0.
        frames: (F, H, W, 3) uint8 RGB; (B, F, H, W, 3) from ``stream_batch``.
        latents: (B, T, C, h, w), normalised.
        cue: what it was made for.
        effect: what guidance did since the video's start; None while nothing was guided.
        own_effect: what it did since the chunk before was finished; None where nothing was guided.
        out_of_range: share of colour values that the decoder put beyond black or white by more than 5 %, one a sample.
    """

    index: int
    frames: np.ndarray[Any, np.dtype[np.uint8]]
    latents: Tensor
    cue: Cue
    effect: Effect | None
    out_of_range: list[float]
    own_effect: Effect | None = None


@dataclass(frozen=True)
class DecodedChunk:
    """A chunk; ``tail`` is the picture (B, 3, H, W) with which another rollout would begin."""

    chunk: Chunk
    shown: bool
    tail: Tensor


class ChunkDecoder:
    """Decodes the chunks of one video, in order.

    Args:
        new_decoder: makes the decoder of a rollout.
        frames_per_chunk: latent frames.
    """

    def __init__(
        self, vae: AutoencoderKLWan, new_decoder: Callable[[AutoencoderKLWan], Decoder], frames_per_chunk: int
    ) -> None:
        self._vae = vae
        self._new_decoder = new_decoder
        self._decoder = new_decoder(vae)
        self._overlap = overlap_pictures(frames_per_chunk, vae.config.scale_factor_temporal)

    def __call__(self, made: Made) -> DecodedChunk:
        """The chunk's pictures."""
        if made.restart is not None:
            self._decoder = self._new_decoder(self._vae)
            self._decoder.decode(made.restart.to(self._vae.device))
        pictures = self._decoder.decode(made.latents.to(self._vae.device), clamp=False)
        out_of_range = (pictures.abs() > 1 + RANGE_MARGIN).float().mean(dim=(1, 2, 3, 4))
        frames = np.stack([frames_from_tensor(sample) for sample in pictures])
        tail = pictures[:, -self._overlap].clamp(-1, 1).clone()
        chunk = Chunk(made.index, frames, made.latents, made.cue, made.effect, out_of_range.tolist(), made.own_effect)
        return DecodedChunk(chunk, made.shown, tail)
