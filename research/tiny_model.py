"""A tiny video model of random weights in a folder: what measurements of the server and tests run."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from nasa_video.models.presets import configs_dir


def write_tiny_model(folder: Path, default_steps: int) -> Path:
    """Fill a folder with a model whose pictures are noise of 32 x 16 and cost next to nothing.

    It has preset.yaml, transformer/ and vae/, and reads its prompts as the shipped model does.
    """
    torch.manual_seed(0)
    WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=8, out_channels=8, text_dim=256, freq_dim=16,
        ffn_dim=64, num_layers=2,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    AutoencoderKLWan(
        base_dim=4, z_dim=8, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True], patch_size=2,
        in_channels=12, out_channels=12, latents_mean=[0.0] * 8, latents_std=[1.0] * 8, scale_factor_spatial=8,
    ).save_pretrained(folder / "vae")  # fmt: skip
    preset = yaml.safe_load((configs_dir() / "video" / "sprites.yaml").read_text())
    preset |= {
        "name": "tiny",
        "components": {
            "transformer": {"path": "transformer"},
            "vae": {"path": "vae"},
            "text_encoder": {"kind": "wordllama", "max_tokens": 24},
        },
        "video": {"width": 32, "height": 16, "fps": 12, "frames": 21, "upscale": 2},
    }
    preset["sampler"] |= {"steps": {2: [1000, 750], 1: [1000]}, "without_history": None, "default_steps": default_steps}
    del preset["vocabulary"]
    (folder / "preset.yaml").write_text(yaml.safe_dump(preset))
    return folder
