"""Attention with its log-sum-exp from PyTorch's fused kernels, for scores too large to be formed."""

# B batch, Q queries, N keys, H heads, D head dim

from __future__ import annotations

import torch
from torch import Tensor

SMALL_SCORES = 2**22
"""Scores (B x H x Q x N) up to this number are formed explicitly, in float32."""


def fused_with_lse(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Output (B, Q, H, D) and log-sum-exp (B, Q, H, 1) float32, or None where PyTorch has no fused kernel for it.

    The operators are those that ``scaled_dot_product_attention`` itself dispatches to; it throws the log-sum-exp away.
    They give it no gradient: None also where one is wanted.
    """
    batch, queries, heads, _ = q.shape
    num_keys = k.shape[1]
    if batch * heads * queries * num_keys <= SMALL_SCORES or q.device.type not in ("cpu", "cuda"):
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return None
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        mask = None if bias is None else bias.to(q.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask)
    else:
        mask = None
        if bias is not None:  # its kernels want rows whose stride is a multiple of 8 elements
            padded = torch.nn.functional.pad(bias.to(q.dtype), (0, -num_keys % 8))
            mask = padded.expand(batch, heads, queries, -1)[..., :num_keys]
        result = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, mask, True)
        out, lse = result[0], result[1][:, :, :queries]  # the query axis of the log-sum-exp is padded
    if lse.shape[1] != heads:  # the CPU kernel returns (B, Q, H)
        lse = lse.transpose(1, 2)
    return out.transpose(1, 2), lse.float().transpose(1, 2).unsqueeze(-1)
