"""Models with random weights, of true size or tiny, and prompts of any length: enough to measure and to test with."""

# B batch, L text tokens, E text dim

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn

from causvid_adapter import CausalWan
from causvid_adapter.checkpoint import cast_like_diffusers
from nasa_video.text import TextContext


def random_generator(
    config: Mapping[str, Any],
    *,
    num_layers: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> CausalWan:
    """A causal generator of the config's sizes; ``num_layers`` cuts it. Its dtypes are those of a loaded model."""
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    if num_layers is not None:
        settings["num_layers"] = num_layers
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**settings)
    cast_like_diffusers(transformer, dtype)
    transformer = transformer.to_empty(device=device)
    _fill(transformer, seed)
    return CausalWan(transformer.requires_grad_(False)).eval()


def random_vae(
    config: Mapping[str, Any], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> AutoencoderKLWan:
    """A VAE of the config's sizes."""
    with torch.device("meta"):
        vae = AutoencoderKLWan(**{key: value for key, value in config.items() if not key.startswith("_")})
    vae = vae.to(dtype).to_empty(device=device)
    _fill(vae, seed)
    return vae.eval().requires_grad_(False)  # type: ignore[no-any-return]


@torch.no_grad()
def _fill(module: nn.Module, seed: int) -> None:
    """Normal weights that keep activations at order one."""
    device = next(module.parameters()).device
    if device.type == "meta":
        return
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in module.named_parameters():
        if ("norm" in name and name.endswith("weight")) or name.endswith("gamma"):
            parameter.fill_(1.0)
        elif parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.zero_()


class RandomText:
    """A text encoder whose every word is one token of random embedding; the same word is always the same."""

    def __init__(self, max_tokens: int, text_dim: int) -> None:
        self.max_tokens = max_tokens
        self.text_dim = text_dim

    def __call__(self, prompts: Sequence[str]) -> TextContext:
        """Encode a batch, (B, max_tokens, text_dim)."""
        embeds = torch.zeros(len(prompts), self.max_tokens, self.text_dim)
        lengths = []
        for row, prompt in enumerate(prompts):
            words = prompt.split()[: self.max_tokens]
            for index, word in enumerate(words):
                seed = int.from_bytes(word.encode()[:7].ljust(7, b"\0"), "little")
                embeds[row, index] = torch.randn(self.text_dim, generator=torch.Generator().manual_seed(seed))
            lengths.append(len(words))
        return TextContext(embeds, torch.tensor(lengths))

    @staticmethod
    def prompt(num_tokens: int, name: str = "word") -> str:
        """A prompt of that many tokens."""
        return " ".join(f"{name[:2]}{index}" for index in range(num_tokens))
