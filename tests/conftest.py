"""Tiny real models with weights that leave nothing at zero, and the measures that tests compare with."""

# B batch, T latent frames, S tokens, H heads, D head dim, L text tokens, E text dim

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tiny_model import write_tiny_model
from torch import Tensor, nn

from nasa_video.text import TextContext

LATENT = (4, 4, 6)
"""(C, H, W) of a latent frame: 6 tokens."""
TEXT_TOKENS = 8
TEXT_DIM = 10


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomise(module: nn.Module, seed: int) -> None:
    """Weights of the size that keeps activations at order one; biases, norms and modulations away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if ("norm" in name and name.endswith("weight")) or name.endswith("gamma"):
            parameter.data = 1 + 0.3 * noise
        elif "scale_shift_table" in name:
            parameter.data = 0.5 * noise
        elif parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.3 * noise


@pytest.fixture
def new_wan() -> Callable[..., WanTransformer3DModel]:
    """Makes a Wan transformer of 2 layers, 2 heads of 24."""

    def new(seed: int = 0, **settings: Any) -> WanTransformer3DModel:
        config: dict[str, Any] = {
            "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": LATENT[0], "out_channels": LATENT[0],
            "text_dim": TEXT_DIM, "freq_dim": 16, "ffn_dim": 40, "num_layers": 2,
        }  # fmt: skip
        model = WanTransformer3DModel(**config | settings)
        randomise(model, seed)
        return model.eval().requires_grad_(False)

    return new


@pytest.fixture
def new_vae() -> Callable[..., AutoencoderKLWan]:
    """Makes a Wan VAE of stride 4 x 8 x 8, or what the settings say."""

    def new(seed: int = 0, **settings: Any) -> AutoencoderKLWan:
        config: dict[str, Any] = {
            "base_dim": 4,
            "z_dim": 4,
            "num_res_blocks": 1,
            "latents_mean": [0.1] * 4,
            "latents_std": [2.0] * 4,
        }
        vae = AutoencoderKLWan(**config | settings)
        randomise(vae, seed)
        return vae.eval().requires_grad_(False)

    return new


@pytest.fixture
def new_context() -> Callable[..., TextContext]:
    """Makes embeddings of prompts of the given lengths, zero-padded as Wan pads."""

    def new(lengths: Sequence[int], seed: int = 0, tokens: int = TEXT_TOKENS) -> TextContext:
        generator = torch.Generator().manual_seed(1000 + seed)
        embeds = torch.randn(len(lengths), tokens, TEXT_DIM, generator=generator)
        for row, length in enumerate(lengths):
            embeds[row, length:] = 0
        return TextContext(embeds, torch.tensor(lengths))

    return new


@pytest.fixture
def new_latents() -> Callable[..., Tensor]:
    """Makes normal latents (B, T, C, H, W)."""

    def new(frames: int = 3, batch: int = 1, seed: int = 0) -> Tensor:
        return torch.randn(batch, frames, *LATENT, generator=torch.Generator().manual_seed(2000 + seed))

    return new


@pytest.fixture
def distance() -> Callable[[Tensor, Tensor], float]:
    """Relative L2 distance of the first tensor from the second."""

    def measure(actual: Tensor, expected: Tensor) -> float:
        assert actual.shape == expected.shape
        actual, expected = actual.detach().double(), expected.detach().double()
        return float((actual - expected).norm() / expected.norm())

    return measure


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with preset.yaml, transformer/ and vae/; random weights, the sprites' sizes of text and pictures."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", default_steps=2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 kB, where this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield disk
    # Lazily: a test that failed may still hold a file open, and the mount must not outlive it.
    subprocess.run(["umount", "-l", str(disk)], check=True)
