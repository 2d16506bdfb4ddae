"""Chunk-by-chunk coding with ``AutoencoderKLWan``, equal to coding the whole video.

The VAE's causal convolutions look back on earlier frames through a feature cache. diffusers clears it around every
call; here it lives between the calls, so no frame is lost or seen from a zero state at a chunk's border.
"""

# B batch, T latent frames, F pictures, C latent channels, h w latent height and width, H W picture height and width

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from einops import rearrange
from torch import Tensor, nn

from causvid_adapter.errors import ShapeError


def _empty_features(coder: nn.Module) -> list[Tensor | str | None]:
    return [None] * sum(isinstance(module, WanCausalConv3d) for module in coder.modules())


class StreamingDecoder:
    """Decodes latents as they come; the concatenated frames equal ``vae.decode`` of the concatenated latents.

    One decoder serves one video; :meth:`reset` starts the next. The latents are the VAE's own, not normalised
    (see :func:`denormalize`).
    """

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        self.reset()

    def reset(self) -> None:
        """Forget the video so far."""
        self._features = _empty_features(self.vae.decoder)
        self._first = True

    @torch.no_grad()
    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """(B, T, C, h, w) -> (B, F, 3, H, W) in [-1, 1]; F is 4 T, or 4 T - 3 when these are the video's first.

        ``clamp=False`` leaves what the VAE puts outside of the range, so that it can be measured.

        (4 is the stride of Wan's VAE; another one's takes its place.)

        Raises:
            ShapeError: there are no latents.
        """
        if latents.ndim != 5 or latents.shape[1] == 0:
            raise ShapeError(f"latents must be (B, T, C, h, w) with T >= 1, got {tuple(latents.shape)}")
        x = self.vae.post_quant_conv(rearrange(latents, "b t c h w -> b c t h w").to(self.vae.dtype))
        pieces = []
        for frame in x.split(1, dim=2):
            pieces.append(self.vae.decoder(frame, feat_cache=self._features, feat_idx=[0], first_chunk=self._first))
            self._first = False
        frames = torch.cat(pieces, dim=2)
        if self.vae.config.patch_size is not None:
            frames = unpatchify(frames, patch_size=self.vae.config.patch_size)
        return rearrange(frames.clamp(-1.0, 1.0) if clamp else frames, "b c f h w -> b f c h w")


class StreamingEncoder:
    """Encodes pictures as they come; the concatenated latents equal ``vae.encode(...).latent_dist.mode()``."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae
        self.reset()

    def reset(self) -> None:
        """Forget the video so far."""
        self._features = _empty_features(self.vae.encoder)
        self._first = True

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """(B, F, 3, H, W) in [-1, 1] -> (B, T, C, h, w), not normalised.

        Raises:
            ShapeError: F is not 1 + 4 k for the video's first frames, or not 4 k with k >= 1 after them.
        """
        stride = self.vae.config.scale_factor_temporal
        lead = 1 if self._first else 0
        if frames.shape[1] < 1 or (frames.shape[1] - lead) % stride:
            rule = f"{lead} + {stride} k" if lead else f"{stride} k"
            raise ShapeError(f"the VAE encodes {rule} frames here, got {frames.shape[1]}")
        x = rearrange(frames, "b f c h w -> b c f h w").to(self.vae.dtype)
        if self.vae.config.patch_size is not None:
            x = patchify(x, patch_size=self.vae.config.patch_size)
        groups = [x[:, :, :lead]] * lead + list(x[:, :, lead:].split(stride, dim=2)) * (x.shape[2] > lead)
        pieces = [self.vae.encoder(group, feat_cache=self._features, feat_idx=[0]) for group in groups]
        self._first = False
        mean, _ = self.vae.quant_conv(torch.cat(pieces, dim=2)).chunk(2, dim=1)
        latents: Tensor = rearrange(mean, "b c t h w -> b t c h w")
        return latents


def _statistics(vae: AutoencoderKLWan, like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values, device=like.device, dtype=torch.float32).reshape(-1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


def normalize(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The VAE's latents (B, T, C, h, w) in the scale that the transformer works in."""
    mean, std = _statistics(vae, latents)
    return ((latents.float() - mean) / std).to(latents.dtype)


def denormalize(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The transformer's latents (B, T, C, h, w) in the VAE's own scale."""
    mean, std = _statistics(vae, latents)
    return (latents.float() * std + mean).to(latents.dtype)
