"""How large a model's parts are, from their configs alone: parameters, and what decoding keeps and works with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

from nasa_video.models.placement import is_quantised

# Tensors of full size and base width that the decoder holds at once in its last stage; measured: 11.0 kB a pixel of
# Wan 2.1's VAE in float32, which is 7.2 tensors of 96 channels and 4 pictures.
DECODER_TENSORS = 7.2
# The same of the tiny decoder, which decodes a latent frame at a time as well: 64 channels and 4 pictures.
TINY_DECODER_TENSORS = 2.2
TINY_DECODER_WIDTH = 64


@dataclass(frozen=True)
class TransformerSizes:
    """Parameters of a transformer: outside its blocks, of a block, and of a block's matrices (with their rows)."""

    outside: int
    block: int
    matrices: int
    rows: int


def transformer_sizes(config: Mapping[str, Any]) -> TransformerSizes:
    """Sizes of a Wan transformer."""
    return _measure_transformer(_as_key(config))


@lru_cache(maxsize=8)
def _measure_transformer(config: str) -> TransformerSizes:
    with torch.device("meta"):
        model = WanTransformer3DModel(**{**json.loads(config), "num_layers": 1})
    total = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.blocks.parameters())
    matrices = [module.weight for name, module in model.named_modules() if is_quantised(name, module)]
    return TransformerSizes(total - block, block, sum(w.numel() for w in matrices), sum(w.shape[0] for w in matrices))


@dataclass(frozen=True)
class VaeSizes:
    """Parameters of a VAE, and the numbers that its streaming decoder keeps for every pixel of a picture."""

    parameters: int
    features_per_pixel: float


def vae_sizes(config: Mapping[str, Any]) -> VaeSizes:
    """Sizes of an AutoencoderKLWan."""
    return _measure_vae(_as_key(config))


@lru_cache(maxsize=8)
def _measure_vae(config: str) -> VaeSizes:
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKLWan(**json.loads(config))
        features: list[Any] = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
        # From the third latent frame on the features keep their size.
        for first in (True, False, False):
            frame = vae.decoder(torch.empty(1, vae.config.z_dim, 1, 4, 4), features, [0], first_chunk=first)
    pixels = (vae.config.patch_size or 1) ** 2 * frame.shape[-1] * frame.shape[-2]
    kept = sum(feature.numel() for feature in features if isinstance(feature, torch.Tensor))
    return VaeSizes(sum(p.numel() for p in vae.parameters()), kept / pixels)


def decoder_numbers_per_pixel(config: Mapping[str, Any], tiny: bool = False) -> float:
    """Numbers that a decoder works with for every pixel of a picture, beside the features that it keeps."""
    pictures = int(config["scale_factor_temporal"])
    if tiny:
        return TINY_DECODER_TENSORS * TINY_DECODER_WIDTH * pictures
    width = int(config.get("decoder_base_dim") or config["base_dim"])
    return DECODER_TENSORS * width * pictures / (config.get("patch_size") or 1) ** 2


def _as_key(config: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True)
