"""Small checkpoints in the true formats of CausVid, Self-Forcing, Krea and Wan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from nasa_video.text.umt5_checkpoint import _PARTS

PARITY = Path(__file__).parent / "parity" / "data" / "causvid_generator.safetensors"
CONFIG = {
    "patch_size": [1, 2, 2], "num_attention_heads": 4, "attention_head_dim": 24, "in_channels": 16,
    "out_channels": 16, "text_dim": 40, "freq_dim": 32, "ffn_dim": 160, "num_layers": 3,
}  # fmt: skip


def wan_generator() -> dict[str, Tensor]:
    """The tiny generator under Wan's own names, without a prefix."""
    return {name.removeprefix("model."): value for name, value in load_file(PARITY).items()}


def _original_vae(vae: AutoencoderKLWan) -> dict[str, Tensor]:
    """diffusers' VAE keys as Wan's own, by searching for the name that diffusers' converter maps to each."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    candidates: dict[str, str | None] = {}
    for coder, stages in (("encoder", "downsamples"), ("decoder", "upsamples")):
        parts = ["residual.0.gamma", "residual.3.gamma", "shortcut.weight", "shortcut.bias"]
        parts += [f"residual.{i}.{w}" for i in (2, 6) for w in ("weight", "bias")]
        parts += [f"{name}.{w}" for name in ("resample.1", "time_conv") for w in ("weight", "bias")]
        for i in range(20):
            candidates |= {f"{coder}.{stages}.{i}.{part}": None for part in parts}
        for i in (0, 2):
            candidates |= {f"{coder}.middle.{i}.{part}": None for part in parts}
        middle = ("norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias")
        candidates |= {f"{coder}.middle.1.{part}": None for part in middle}
        ends = ("conv1.weight", "conv1.bias", "head.0.gamma", "head.2.weight", "head.2.bias")
        candidates |= {f"{coder}.{part}": None for part in ends}
    candidates |= {f"conv{i}.{w}": None for i in (1, 2) for w in ("weight", "bias")}
    wanted = vae.state_dict()
    named = {}
    for name in candidates:
        (diffusers_name,) = convert_wan_vae_to_diffusers({name: torch.zeros(1)})
        if diffusers_name in wanted:
            named[name] = wanted[diffusers_name].clone()
    assert len(named) == len(wanted)
    return named


def _original_t5(model: UMT5EncoderModel) -> dict[str, Tensor]:
    state = model.state_dict()
    named = {"token_embedding.weight": state["shared.weight"], "norm.weight": state["encoder.final_layer_norm.weight"]}
    for block in range(2):
        named |= {f"blocks.{block}.{wan}": state[f"encoder.block.{block}.{hf}"] for wan, hf in _PARTS.items()}
    return {name: value.clone() for name, value in named.items()}


def write_parts(folder: Path) -> None:
    """A VAE, a text encoder and a tokenizer, in diffusers' layout and as Wan's original files."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16)
    vae.save_pretrained(folder / "vae")
    torch.save(_original_vae(vae), folder / "Wan2.1_VAE.pth")
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=40, d_model=40, d_kv=8, num_heads=2, d_ff=32, num_layers=2, feed_forward_proj="gated-gelu"
        )
    ).eval()
    encoder.save_pretrained(folder / "text_encoder")
    torch.save(_original_t5(encoder), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)] + [
        (c, -3.0) for c in "abcdefghijklmnopqrstuvwxyz"
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(Unigram(letters, unk_id=2)), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder / "tokenizer")


def preset_file(folder: Path, parts: Path, original: bool, **components: Any) -> str:
    text = parts / ("models_t5_umt5-xxl-enc-bf16.pth" if original else "text_encoder")
    data = {
        "name": "small",
        "kind": "video",
        "title": "small",
        "licence": "none",
        "components": {
            "vae": {"path": str(parts / ("Wan2.1_VAE.pth" if original else "vae"))},
            "text_encoder": {
                "kind": "umt5", "path": str(text), "tokenizer_folder": str(parts / "tokenizer"), "max_tokens": 16,
            },
            "config": CONFIG,
            **components,
        },
        "sampler": {"shift": 5.0, "warp": True, "steps": {2: [1000, 500]}, "default_steps": 2, "frames_per_chunk": 3},
        "video": {"width": 32, "height": 16, "fps": 16, "frames": 9},
        "guidance": {"nasa": {"scale": 0.5}},
    }  # fmt: skip
    path = folder / "preset.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def write_generator(form: str, folder: Path) -> dict[str, str]:
    """Write the generator in a published form; returns its source."""
    state = wan_generator()
    path = folder / "model.pt"
    if form == "causvid":
        torch.save({"generator": {f"model.{name}": value for name, value in state.items()}}, path)
    elif form == "self-forcing":
        wrapped = {f"model._fsdp_wrapped_module.{name}": value for name, value in state.items()}
        other = {name: torch.zeros_like(value) for name, value in wrapped.items()}
        torch.save({"generator": other, "generator_ema": wrapped}, path)
    elif form == "flat":
        torch.save({f"model.{name}": value for name, value in state.items()}, path)
    else:
        path = folder / "krea.safetensors"
        save_file(state, path)
    return {"path": str(path)}


def write_transformer(folder: Path) -> None:
    """The tiny generator in diffusers' layout."""
    from causvid_adapter import load_generator

    folder.mkdir()
    source = write_generator("causvid", folder)["path"]
    model = load_generator(source, CONFIG)
    model.transformer.save_pretrained(folder / "transformer")
    Path(source).unlink()


def write_wan22_vae(folder: Path) -> None:
    """A small VAE of Wan 2.2's kind: residual, 48 channels, stride 16 through patches."""
    torch.manual_seed(0)
    AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=48, dim_mult=[1, 2, 4, 4], is_residual=True, patch_size=2,
        in_channels=12, out_channels=12, scale_factor_spatial=16, latents_mean=[0.0] * 48, latents_std=[1.0] * 48,
    ).save_pretrained(folder)  # fmt: skip


def any_wan(**widths: int) -> dict[str, Tensor]:
    """A generator under Wan's own names with heads of 128, as every published one has; random weights."""
    generator = torch.Generator().manual_seed(1)
    sizes = {96: 256, 6 * 96: 6 * 256}
    state = {}
    for name, value in wan_generator().items():
        shape = [sizes.get(size, size) for size in value.shape]
        if name.startswith("patch_embedding.weight"):
            shape[1] = widths.get("in_channels", shape[1])
        if name.startswith("head.head."):
            shape[0] = 4 * widths.get("out_channels", 16)
        drawn = torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            state[name] = 1 + 0.1 * drawn
        else:
            state[name] = drawn / max(1, drawn[0].numel()) ** 0.5 if drawn.ndim > 1 else 0.1 * drawn
    return state
