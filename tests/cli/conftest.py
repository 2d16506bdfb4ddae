"""A small complete model on disk, in the form in which a user has one, and the command line run on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from nasa_video.cli import main
from nasa_video.models import configs_dir
from nasa_video.pipeline import VideoPipeline


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with preset.yaml, transformer/ and vae/; random weights, the sprites' sizes of text and pictures."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
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
    preset["sampler"] |= {"steps": {2: [1000, 750], 1: [1000]}, "default_steps": 2}
    del preset["vocabulary"]
    (folder / "preset.yaml").write_text(yaml.safe_dump(preset))
    return folder


@pytest.fixture(scope="session")
def pipeline(model_folder: Path) -> VideoPipeline:
    """The same model in memory."""
    return VideoPipeline.from_pretrained(str(model_folder), device="cpu")


@dataclass(frozen=True)
class Outcome:
    """How a run of the command line ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The last line of standard output."""
        return json.loads(self.stdout.splitlines()[-1])


@pytest.fixture
def nasa_video(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Runs the command line in this process, in an empty folder; "{model}" stands for the tiny model's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NASA_VIDEO_CACHE", str(tmp_path.parent / "cache"))

    def run(*words: str) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["nasa-video", *(word.format(model=model_folder) for word in words)])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        out = capsys.readouterr()
        return Outcome(status, out.out, out.err)

    return run
