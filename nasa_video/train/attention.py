"""Attention as two batched matrix products, for training on a CPU.

PyTorch's fused attention on a CPU is made for inference: for a hundred tokens in bfloat16 its backward pass takes five
to ten times as long as this one (measured, torch 2.13: 37 against 11 ms for 144 keys, 43 against 6 ms for 24).
"""

# B batch, S tokens, H heads, D head dim

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from causvid_adapter import CausalWan
from causvid_adapter.accelerate.compile import has_compiler


def matrix_attention(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention; the boolean mask (S_query, S_key) says where a query may look."""
    batch, queries, heads, dim = q_BSHD.shape
    q, k, v = (x.transpose(1, 2).reshape(batch * heads, -1, dim) for x in (q_BSHD, k_BSHD, v_BSHD))
    scores = torch.bmm(q * dim**-0.5, k.transpose(1, 2))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).view(batch, heads, queries, dim).transpose(1, 2)


class MatrixCrossAttention:
    """Processor of a text-to-video Wan's ``block.attn2`` (diffusers' processor protocol)."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: object = None,
    ) -> Tensor:
        """From (B, S, dim) to the text (B, L, dim), or (B * chunks, L, dim) for a text a chunk; returns (B, S, dim)."""
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        chunks = encoder_hidden_states.shape[0] // hidden_states.shape[0]
        q = q.unflatten(1, (chunks, -1)).flatten(0, 1)
        k = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1))
        out = matrix_attention(q.to(v.dtype), k.to(v.dtype), v, None).flatten(2).type_as(hidden_states)
        out = out.unflatten(0, (-1, chunks)).flatten(1, 2)
        return attn.to_out[1](attn.to_out[0](out))  # type: ignore[no-any-return]


def trainable(transformer: nn.Module) -> CausalWan:
    """A causal Wan around a transformer, with the attention above: that to the text always, the other on a CPU."""
    for block in transformer.blocks:  # type: ignore[union-attr]
        block.attn2.set_processor(MatrixCrossAttention())
    if next(transformer.parameters()).device.type != "cpu":
        return CausalWan(transformer)  # type: ignore[arg-type]
    return CausalWan(transformer, attend=_attend)  # type: ignore[arg-type]


def compile_blocks(model: CausalWan) -> None:
    """Compiles the transformer's blocks in place, for fixed shapes; without a C++ compiler a CPU goes on without."""
    if model.device.type == "cpu" and not has_compiler():
        return
    # each block is compiled once a kind of batch: with and without a mask, one text a clip and one a chunk
    torch._dynamo.config.recompile_limit = 8 * model.num_layers
    for block in model.transformer.blocks:
        block.compile(dynamic=False)


def _attend(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask: Tensor | None) -> Tensor:
    return matrix_attention(q_BSHD.to(v_BSHD.dtype), k_BSHD.to(v_BSHD.dtype), v_BSHD, mask)
