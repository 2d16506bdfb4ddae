"""How many floating-point operations a causal Wan takes: by formula, and by torch's own counter.

A multiplication and an addition are two operations; what is linear in the width (norms, activations, rotations,
residuals) is left out, as torch's counter leaves it out.
"""

# S tokens of a chunk, K keys that it attends to in self-attention, N text keys, L layers

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from causvid_adapter.model import IMAGE_MODEL_TEXT_TOKENS
from causvid_adapter.sizes import WanSizes
from causvid_adapter.window import UNLIMITED, Window

Branches = Sequence[Sequence[int]]
"""Text keys that each layer attends to: one entry a pass of the model, one number in it an attention branch.

Unguided ((513,),); NASA ((21, 9),), two branches in one pass; classifier-free guidance ((21,), (9,)), two passes.
"""


@dataclass(frozen=True)
class ChunkLoop:
    """The chunk loop as its cost depends on it; sizes in latent frames."""

    tokens_per_frame: int
    frames_per_chunk: int
    num_steps: int
    window: Window = UNLIMITED

    def keys_seen(self, chunk: int) -> int:
        """Keys of self-attention in a chunk (from 0): the history that the window holds, and the chunk."""
        return self.tokens_per_frame * self.window.count((chunk + 1) * self.frames_per_chunk)


def pass_flops(sizes: WanSizes, tokens: int, keys: int, text_keys: Sequence[int]) -> int:
    """One pass of the model over S ``tokens`` that attend to K ``keys``, with text keys and values already made.

    A layer: 8 S dim^2 (self-attention's projections) + 4 S K dim + 4 S dim^2 (queries and output of the
    cross-attention) + 4 S N dim for every branch + 4 S dim ffn_dim.
    """
    dim = sizes.dim
    layer = 12 * tokens * dim**2 + 4 * tokens * dim * (keys + sum(text_keys)) + 4 * tokens * dim * sizes.ffn_dim
    patches = 2 * tokens * dim * (sizes.in_features + sizes.out_features)
    time = 2 * dim * (sizes.freq_dim + dim + 6 * dim)
    # diffusers embeds the text of every call; with keys of its own a call carries this many zero tokens.
    text = text_flops(sizes, IMAGE_MODEL_TEXT_TOKENS if sizes.takes_images else 1)
    return sizes.num_layers * layer + patches + time + text


def text_flops(sizes: WanSizes, tokens: int) -> int:
    """The text MLP over ``tokens``."""
    return 2 * tokens * sizes.dim * (sizes.text_dim + sizes.dim)


def prompt_flops(sizes: WanSizes, tokens: int) -> int:
    """Keys and values of a prompt in every layer: once a prompt."""
    return text_flops(sizes, tokens) + sizes.num_layers * 4 * tokens * sizes.dim**2


def chunk_flops(sizes: WanSizes, loop: ChunkLoop, chunk: int, branches: Branches) -> int:
    """A chunk (from 0): its steps and the clean pass that writes its keys; one video."""
    tokens = loop.tokens_per_frame * loop.frames_per_chunk
    one_step = sum(pass_flops(sizes, tokens, loop.keys_seen(chunk), text_keys) for text_keys in branches)
    return (loop.num_steps + 1) * one_step


def mean_chunk_flops(sizes: WanSizes, loop: ChunkLoop, chunks: int, branches: Branches) -> float:
    """Mean over the first ``chunks`` of a video."""
    return sum(chunk_flops(sizes, loop, chunk, branches) for chunk in range(chunks)) / chunks


def flop_counter() -> FlopCounterMode:
    """Torch's counter, told of the attention kernel that it does not know: SDPA's on the CPU would count as nothing."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop(query, key, value))

    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    )
