"""How large a model's parts are: their configs, wherever those are found, and the sizes that follow from them alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

from causvid_adapter.checkpoint import infer_config, read_shapes, to_diffusers, unwrap
from causvid_adapter.sizes import WanSizes
from nasa_video.errors import InputError
from nasa_video.models.presets import Components, Umt5Text, VideoPreset

# Tensors of full size and base width that the decoder holds at once in its last stage; measured: 11.0 kB a pixel of
# Wan 2.1's VAE in float32, which is 7.2 tensors of 96 channels and 4 pictures.
DECODER_TENSORS = 7.2
# The same of the tiny decoder, which decodes a latent frame at a time as well: 64 channels and 4 pictures.
TINY_DECODER_TENSORS = 2.2
TINY_DECODER_WIDTH = 64
# What Wan 2.2's VAE of 48 channels differs in from diffusers' defaults, which are Wan 2.1's.
_WAN22_VAE: dict[str, Any] = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "patch_size": 2,
    "is_residual": True, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip


def transformer_config(preset: VideoPreset) -> dict[str, Any] | None:
    """Config of the preset's transformer: its own, that beside its weights, or that of the weights themselves.

    None where the model's sizes are not known before it is downloaded.
    """
    if preset.components.config is not None:
        return preset.components.config
    found = preset.components.transformer.find()
    if found is not None and found.is_file():
        return infer_config(to_diffusers(unwrap(read_shapes(found)), source=str(found)))
    return None if found is None else _read_config(found / "transformer") or _read_config(found)


def vae_config(preset: VideoPreset, channels: int) -> dict[str, Any]:
    """Config of the preset's VAE; where its files are elsewhere, of Wan's published one for so many latent channels."""
    found = _read_config(preset.components.vae.find())
    if found is not None:
        return found
    with torch.device("meta"):
        return dict(AutoencoderKLWan(**(_WAN22_VAE if channels == 48 else {})).config)


def _read_config(folder: Path | None) -> dict[str, Any] | None:
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        loaded = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/config.json is damaged ({error}); remove it and bring it again") from error
    if not isinstance(loaded, dict):
        raise InputError(f"{folder}/config.json holds a {type(loaded).__name__}, not a config")
    return loaded


def check_size(width: int, height: int, units: tuple[int, int]) -> None:
    """Refuse a picture that patch and VAE do not allow.

    Args:
        units: smallest width and height, of which every other is a multiple.

    Raises:
        InputError: it is none; the message names the nearest that are.
    """
    for name, size, unit in zip(("width", "height"), (width, height), units, strict=True):
        if size <= 0 or size % unit:
            below = max(unit, size // unit * unit)
            raise InputError(
                f"{name} must be a multiple of {unit} for this model, got {size}; use {below} or {below + unit}"
            )


@dataclass(frozen=True)
class TransformerSizes:
    """Parameters of a transformer: outside its blocks, of a block, and of a block's matrices (with their rows)."""

    outside: int
    block: int
    matrices: int
    rows: int


def transformer_sizes(config: Mapping[str, Any]) -> TransformerSizes:
    """Sizes of a Wan transformer (diffusers' WanTransformer3DModel), counted: to build one on the meta device imports
    torch's compiler, which takes longer than a short video.
    """
    sizes, image, added = WanSizes.of(config), config.get("image_dim"), config.get("added_kv_proj_dim")
    dim, ffn = sizes.dim, sizes.ffn_dim
    # Inputs and outputs: q, k, v and out of two attentions, the feed-forward network, keys and values of an image.
    shapes = [(dim, dim)] * 8 + [(dim, ffn), (ffn, dim)] + ([] if added is None else [(added, dim)] * 2)
    matrices, rows = sum(inputs * outputs for inputs, outputs in shapes), sum(outputs for _, outputs in shapes)
    # Norms of queries and keys, the cross-attention's own, and six shifts and scales.
    vectors = 4 + (added is not None) + 2 * bool(config.get("cross_attn_norm", True)) + 6
    embedders = [(sizes.in_features, dim), (sizes.freq_dim, dim), (dim, dim), (dim, 6 * dim), (sizes.text_dim, dim),
                 (dim, dim), (dim, sizes.out_features)]  # fmt: skip
    outside = 2 * dim
    if image is not None:
        embedders += [(image, image), (image, dim)]
        outside += 2 * (image + dim) + (config.get("pos_embed_seq_len") or 0) * image
    outside += sum((inputs + 1) * outputs for inputs, outputs in embedders)
    return TransformerSizes(outside, matrices + rows + vectors * dim, matrices, rows)


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
    with torch.device("meta"):
        vae = AutoencoderKLWan(**json.loads(config))
    side, kept = 1, 0
    for name, module in vae.decoder.named_modules():
        if isinstance(module, torch.nn.Upsample):
            side *= 2
        elif isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1:  # it keeps its last two frames
            before = side // 2 if name.endswith("time_conv") else side  # listed after its Upsample, run before it
            kept += 2 * module.in_channels * before**2
    pixels = (side * (vae.config.patch_size or 1)) ** 2
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


def text_encoder_bytes(
    parts: Components, device: torch.device, dtype: torch.dtype, prompts: Sequence[str] | None
) -> int:
    """Bytes of the text encoder's weights; 0 where it is small, or where every prompt's embeddings are on disk.

    On the CPU in float32 they are the file's own pages, which the system lets go when it needs the room: not counted.
    """
    settings = parts.text_encoder
    if not isinstance(settings, Umt5Text) or (device.type == "cpu" and dtype == torch.float32):
        return 0
    found = settings.find()
    if found is not None and prompts is not None and _all_known(settings, device, dtype, prompts):
        return 0
    if found is not None and found.is_file():
        numbers = sum(tensor.numel() for tensor in unwrap(read_shapes(found)).values())
    else:
        try:
            config = _read_config(found) or {}
        except InputError:
            config = {}  # said when it is loaded
        numbers = _umt5_parameters(json.dumps(config, sort_keys=True, default=str))
    return numbers * dtype.itemsize


def _all_known(settings: Umt5Text, device: torch.device, dtype: torch.dtype, prompts: Sequence[str]) -> bool:
    from nasa_video.models.loading import load_text_encoder
    from nasa_video.text.embedding_cache import CachedEncoder

    try:
        encoder = load_text_encoder(settings, device, dtype)
    except InputError:
        return False
    return isinstance(encoder, CachedEncoder) and encoder.holds(prompts)


@lru_cache(maxsize=4)
def _umt5_parameters(config: str) -> int:
    from transformers import UMT5Config, UMT5EncoderModel

    # What transformers' default lacks of the XXL that Wan reads its prompts with.
    xxl = {
        "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24,
        "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**(json.loads(config) or xxl)))
    return sum(p.numel() for p in model.parameters())
