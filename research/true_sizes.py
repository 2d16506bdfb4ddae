"""The paper's image models at their true sizes on the meta device, for research/count_flops.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor

from nasa_video.backbones.base import NegativeContext


@dataclass(frozen=True)
class Subject:
    """One model at its true size: how it is made, called with a batch, and what a negative is for it."""

    name: str
    make: Callable[[], Any]
    call: Callable[[Any, int], Any]
    negative: NegativeContext


def randn(*shape: int) -> Tensor:
    """An empty tensor of that shape."""
    return torch.empty(*shape, device="meta")


def negative(tokens: int, dim: int, pooled: int | None = None, *, masked: bool = False) -> NegativeContext:
    """A negative prompt padded to ``tokens``."""
    mask = torch.ones(1, tokens, dtype=torch.bool, device="meta") if masked else None
    return NegativeContext(randn(1, tokens, dim), mask, None if pooled is None else randn(1, pooled))


def pixart() -> PixArtTransformer2DModel:
    """PixArt-XL-2-512x512."""
    return PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
        cross_attention_dim=1152, caption_channels=4096, sample_size=64, patch_size=2,
    )  # fmt: skip


def sd(cross: int, heads: int | tuple[int, ...], linear: bool) -> UNet2DConditionModel:
    """Stable Diffusion 1.5 or 2.1."""
    return UNet2DConditionModel(
        sample_size=64, cross_attention_dim=cross, attention_head_dim=heads, use_linear_projection=linear
    )


def sdxl() -> UNet2DConditionModel:
    """SDXL base."""
    return UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def call_pixart(tokens: int) -> Callable[[Any, int], Any]:
    """One step on 512 x 512."""

    def call(model: Any, batch: int) -> Any:
        mask, time = torch.ones(batch, tokens, device="meta"), randn(batch)
        extra = {"resolution": None, "aspect_ratio": None}
        return model(randn(batch, 4, 64, 64), randn(batch, tokens, 4096), time, extra, encoder_attention_mask=mask)

    return call


def call_unet(latent: int, dim: int) -> Callable[[Any, int], Any]:
    """One step with CLIP's 77 tokens."""

    def call(model: Any, batch: int) -> Any:
        added = {"text_embeds": randn(batch, 1280), "time_ids": randn(batch, 6)} if dim == 2048 else None
        return model(randn(batch, 4, latent, latent), randn(batch), randn(batch, 77, dim), added_cond_kwargs=added)

    return call


def call_flux(model: Any, batch: int) -> Any:
    """One step on 1024 x 1024 with 256 text tokens."""
    return model(
        hidden_states=randn(batch, 4096, 64),
        encoder_hidden_states=randn(batch, 256, 4096),
        pooled_projections=randn(batch, 768),
        timestep=randn(batch),
        img_ids=randn(4096, 3),
        txt_ids=randn(256, 3),
    )


SUBJECTS = [
    Subject("PixArt-alpha 512", pixart, call_pixart(120), negative(120, 4096, masked=True)),
    Subject("SD 1.5, 512", lambda: sd(768, 8, False), call_unet(64, 768), negative(77, 768)),
    Subject("SD 2.1, 512", lambda: sd(1024, (5, 10, 20, 20), True), call_unet(64, 1024), negative(77, 1024)),
    Subject("SDXL 1024", sdxl, call_unet(128, 2048), negative(77, 2048)),
    Subject("FLUX.1-schnell 1024", FluxTransformer2DModel, call_flux, negative(256, 4096, 768)),
]
