"""Rotary position embedding whose frame axis starts anywhere.

Wan rotates a head's channels in three groups, by frame, row and column. diffusers' module always starts at frame 0;
a causal generator needs the position of the chunk. Tables are computed in float64, so a rollout has no last frame.
"""

# T latent frames, H rows and W columns of tokens in a frame, S = T*H*W tokens, D head dim

from __future__ import annotations

import torch
from diffusers.models.embeddings import apply_rotary_emb, get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from einops import repeat
from torch import Tensor, nn

RotaryTable = tuple[Tensor, Tensor]
"""Cosines and sines, each (1, S, 1, D) in float32."""


class FrameRope(nn.Module):
    """Takes the place of ``transformer.rope``: hands every layer what was set for the current call, and builds tables.

    diffusers passes the rotary argument on untouched, so it can carry more than a table.
    """

    def __init__(self, rope: WanRotaryPosEmbed, theta: float = 10000.0) -> None:
        super().__init__()
        self.axis_dims: tuple[int, int, int] = (rope.t_dim, rope.h_dim, rope.w_dim)
        self.theta = theta
        self.call: object | None = None

    def forward(self, hidden_states: Tensor) -> object | None:
        """The description of the pass that :class:`~causvid_adapter.CausalWan` set for this call."""
        return self.call

    def build(self, frames: Tensor, height: int, width: int, device: torch.device) -> RotaryTable:
        """Table of ``frames`` (T,), absolute positions of latent frames, over ``height`` x ``width`` tokens."""
        positions = (frames.cpu(), torch.arange(height), torch.arange(width))
        patterns = ("t d -> t h w d", "h d -> t h w d", "w d -> t h w d")
        axes: list[RotaryTable] = []
        for dim, position, pattern in zip(self.axis_dims, positions, patterns, strict=True):
            cos, sin = get_1d_rotary_pos_embed(
                dim, position, self.theta, use_real=True, repeat_interleave_real=True, freqs_dtype=torch.float64
            )
            sizes = {"t": len(frames), "h": height, "w": width}
            sizes.pop(pattern[0])
            axes.append((repeat(cos, pattern, **sizes), repeat(sin, pattern, **sizes)))
        cos, sin = (torch.cat(parts, dim=-1).flatten(0, 2)[None, :, None] for parts in zip(*axes, strict=True))
        return cos.float().to(device), sin.float().to(device)


def rotate(x_BSHD: Tensor, table: RotaryTable) -> Tensor:
    """Rotate queries or keys (B, S, H, D) by a table of the same S."""
    cos, sin = table
    rotated: Tensor = apply_rotary_emb(x_BSHD, (cos[0, :, 0], sin[0, :, 0]), sequence_dim=1)
    return rotated
