"""Self-attention of a causal Wan: diffusers' projections, our history, positions and mask."""

# B batch, S tokens, H heads, D head dim

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from diffusers.models.attention_dispatch import SeqAllToAllDim
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor

from causvid_adapter.cache import KVCache
from causvid_adapter.rope import RotaryTable, rotate

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(q, k, v, boolean mask or None), each (B, S, H, D) -> (B, S, H, D)."""


def sdpa(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention by PyTorch; ``mask`` broadcasts to (B, H, S_query, S_key), True = may attend."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@dataclass(frozen=True)
class SelfAttentionCall:
    """What the self-attention layers need to know of one forward pass.

    It travels in the place of diffusers' rotary argument, so that it belongs to its pass: gradient checkpointing hands
    the same one to the second run, whatever passes were made in between.

    Attributes:
        table: rotary table of the pass's own tokens.
        mask: boolean, broadcasts to (B, H, S_query, S_key); True = may attend.
        cache: history; the pass's keys are staged in it.
        key_table: rotary table of history and chunk, where the cache stores unrotated keys.
    """

    table: RotaryTable
    mask: Tensor | None = None
    cache: KVCache | None = None
    key_table: RotaryTable | None = None


@dataclass(frozen=True)
class HeadExchange:
    """Trades tokens for heads between the processes of a group (Ulysses, arXiv 2309.14509)."""

    group: Any
    world: int

    def to_heads(self, x_BSHD: Tensor) -> Tensor:
        """(B, S / world, H, D) -> (B, S, H / world, D): all tokens of the process's own heads."""
        heads: Tensor = SeqAllToAllDim.apply(self.group, x_BSHD.contiguous(), 2, 1)
        return heads

    def to_tokens(self, x_BSHD: Tensor) -> Tensor:
        """The inverse."""
        tokens: Tensor = SeqAllToAllDim.apply(self.group, x_BSHD.contiguous(), 1, 2)
        return tokens


class CausalSelfAttention:
    """Processor of ``block.attn1`` (diffusers' processor protocol)."""

    def __init__(self, layer: int, attend: Attend) -> None:
        self.layer = layer
        self.attend = attend
        self.exchange: HeadExchange | None = None  # see parallel.parallelise

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: SelfAttentionCall | None = None,
    ) -> Tensor:
        """Attend from (B, S, dim) to itself and the cached history; returns (B, S, dim)."""
        if attention_mask is not None:
            raise NotImplementedError("Wan's self-attention has no mask argument; an unknown one is not ignored")
        call = rotary_emb
        assert isinstance(call, SelfAttentionCall), "CausalWan says what the call is before it calls the transformer"
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        if self.exchange is not None:
            q, k, v = (self.exchange.to_heads(x) for x in (q, k, v))
        q = rotate(q, call.table)
        if call.cache is None:
            k = rotate(k, call.table)
        elif call.key_table is None:
            k, v = call.cache.extend(self.layer, rotate(k, call.table), v)
        else:
            k, v = call.cache.extend(self.layer, k, v)
            k = rotate(k, call.key_table)
        out = self.attend(q, k, v, call.mask)
        if self.exchange is not None:
            out = self.exchange.to_tokens(out)
        out = out.flatten(2).type_as(hidden_states)
        return attn.to_out[1](attn.to_out[0](out))  # type: ignore[no-any-return]
