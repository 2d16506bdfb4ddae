"""A causal Wan whose attention, that to the text too, trains fast on a CPU."""

# B batch, S tokens, L text tokens

from __future__ import annotations

from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from causvid_adapter import CausalWan
from nasa_video.train.attention import matrix_attention, matrix_self_attention


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
    return CausalWan(transformer, attend=matrix_self_attention)  # type: ignore[arg-type]
