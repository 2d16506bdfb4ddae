"""Sizes of a Wan transformer, read off its config: what memory plans and operation counts are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WanSizes:
    """Sizes of a Wan transformer; ``in_features`` and ``out_features`` are those of one patch."""

    dim: int
    ffn_dim: int
    num_layers: int
    text_dim: int
    freq_dim: int
    in_features: int
    out_features: int
    patch: tuple[int, int]
    takes_images: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], num_layers: int | None = None) -> WanSizes:
        """Read off a transformer's config (diffusers' names); ``num_layers`` where layers were cut."""
        time, height, width = config["patch_size"]
        area = time * height * width
        return cls(
            dim=config["num_attention_heads"] * config["attention_head_dim"],
            ffn_dim=config["ffn_dim"],
            num_layers=config["num_layers"] if num_layers is None else num_layers,
            text_dim=config["text_dim"],
            freq_dim=config["freq_dim"],
            in_features=config["in_channels"] * area,
            out_features=(config.get("out_channels") or config["in_channels"]) * area,
            patch=(height, width),
            takes_images=config.get("added_kv_proj_dim") is not None,
        )

    def tokens_per_frame(self, latent_height: int, latent_width: int) -> int:
        """Tokens of one latent frame."""
        return latent_height // self.patch[0] * (latent_width // self.patch[1])
