"""Writes a folder with a tiny video model of random weights: random_model.py FOLDER, then serve --model FOLDER.

Its pictures are noise of 32 x 16; what it costs is next to nothing, so what is measured with it is the server.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from nasa_video.models import configs_dir


def write_random_model(folder: Path) -> Path:
    """The folder, with preset.yaml, transformer/ and vae/; the sprites' text encoder; one step a chunk."""
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
        "name": "random",
        "components": {
            "transformer": {"path": "transformer"},
            "vae": {"path": "vae"},
            "text_encoder": {"kind": "wordllama", "max_tokens": 24},
        },
        "video": {"width": 32, "height": 16, "fps": 12, "frames": 21, "upscale": 2},
    }
    preset["sampler"] |= {"steps": {1: [1000]}, "default_steps": 1}
    del preset["vocabulary"]
    (folder / "preset.yaml").write_text(yaml.safe_dump(preset))
    return folder


if __name__ == "__main__":
    print(write_random_model(Path(sys.argv[1])))
