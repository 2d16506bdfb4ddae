"""Attention of networks in training: fast on CPUs, and with NASA whose keys carry gradients.

PyTorch's fused attention on a CPU is made for inference: for a hundred tokens in bfloat16 its backward pass takes five
to ten times as long as two batched matrix products (torch 2.13: 37 against 11 ms for 144 keys, 43 against 6 ms for 24).

At inference the keys of a negative are made once and kept. In training the projections that make them change, and with
sharded weights they may only run inside the model's own forward pass. So both prompts travel through it as one text of
twice the length, [positive; negative], and are parted in the attention layers.
"""

# B batch, S Q query tokens, N keys, H heads, D head dim, L text tokens, E text dim

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from torch import Tensor, nn

from causvid_adapter import CausalWan
from causvid_adapter.accelerate.compile import has_compiler
from nasa_video.backbones import wan
from nasa_video.backbones.base import ScopedState
from nasa_video.backbones.unet import GuidedLegacyAttention, cross_attentions
from nasa_video.guidance.attention import Attend, SdpaAttend, TextKeys, key_bias
from nasa_video.guidance.formulas import nasa
from nasa_video.guidance.methods import GuidedAttention


def matrix_attention(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention; the boolean mask (S_query, S_key) says where a query may look."""
    batch, queries, heads, dim = q_BSHD.shape
    q, k, v = (x.transpose(1, 2).reshape(batch * heads, -1, dim) for x in (q_BSHD, k_BSHD, v_BSHD))
    scores = torch.bmm(q * dim**-0.5, k.transpose(1, 2))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).view(batch, heads, queries, dim).transpose(1, 2)


def matrix_self_attention(q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask: Tensor | None) -> Tensor:
    """The same with the queries in the values' precision, as a causal Wan takes its attention."""
    return matrix_attention(q_BSHD.to(v_BSHD.dtype), k_BSHD.to(v_BSHD.dtype), v_BSHD, mask)


def compile_blocks(model: CausalWan) -> None:
    """Compiles the transformer's blocks in place, for fixed shapes; without a C++ compiler a CPU goes on without."""
    if model.device.type == "cpu" and not has_compiler():
        return
    # each block is compiled once a kind of batch: with and without a mask, one text a clip and one a chunk
    torch._dynamo.config.recompile_limit = 8 * model.num_layers
    for block in model.transformer.blocks:
        block.compile(dynamic=False)


class MatrixAttend:
    """Attention to text as two matrix products: on a CPU, forward and backward are several times faster."""

    def __call__(self, q: Tensor, keys: TextKeys) -> Tensor:
        if keys.bias is not None:
            return SdpaAttend()(q, keys)
        return matrix_attention(q.to(keys.v.dtype), keys.k.to(keys.v.dtype), keys.v, None)

    def with_lse(self, q: Tensor, keys: TextKeys) -> tuple[Tensor, Tensor]:
        return SdpaAttend().with_lse(q, keys)


@dataclass
class TrainingGuidance(ScopedState):
    """Guides the cross-attention of one network while it is trained.

    Attributes:
        text_tokens: L, tokens of one prompt; a call with 2 L of them has a negative.
        alpha_B: NASA scale of each sample, (B,); None outside a scope.
        negative_bias: (B, 1, 1, L) added to the scores of the negative's keys, or None.
    """

    text_tokens: int = 0
    alpha_B: Tensor | None = None
    negative_bias: Tensor | None = None

    def acts(self, layer: int) -> bool:
        """Always: the layer itself sees whether there is a negative."""
        return True

    def guide(self, layer: int, q: Tensor, positive: TextKeys) -> Tensor:
        """Attention output (B, Q, H, D); with 2 L keys it is ``Z+ - alpha Z-`` (eq. 9 of arXiv 2412.02687).

        Raises:
            RuntimeError: the keys do not fit the scope: a pass, or its recomputation by gradient checkpointing, ran
                outside the scope in which it belongs.
        """
        tokens, alpha_B = positive.k.shape[1], self.alpha_B
        expected = self.text_tokens if alpha_B is None else 2 * self.text_tokens
        if tokens != expected:
            raise RuntimeError(
                f"a guided layer got {tokens} text keys and expected {expected}: run forward and backward of a step "
                "inside one scope of guided_training()"
            )
        if alpha_B is None:
            return self.attend(q, positive)
        pos, neg = _part(positive, self.text_tokens)
        if self.negative_bias is not None:
            neg = TextKeys(neg.k, neg.v, self.negative_bias if neg.bias is None else neg.bias + self.negative_bias)
        z_pos, z_neg = self.attend(q, pos), self.attend(q, neg)
        z = nasa(z_pos, alpha_B[:, None, None, None].to(z_neg.dtype) * z_neg, scale=1.0)
        self.meter.add(GuidedAttention(z, z_pos, z.new_zeros(())))
        return z


def _part(keys: TextKeys, tokens: int) -> tuple[TextKeys, TextKeys]:
    """The keys of the first prompt and those of the second."""
    biases = (None, None) if keys.bias is None else (keys.bias[..., :tokens], keys.bias[..., tokens:])
    first = TextKeys(keys.k[:, :tokens], keys.v[:, :tokens], biases[0])
    return first, TextKeys(keys.k[:, tokens:], keys.v[:, tokens:], biases[1])


def add_guidance(model: nn.Module, text_tokens: int) -> TrainingGuidance:
    """Put the guidance into a denoiser's text cross-attention, to stay; without a scope it changes nothing."""
    first = next(model.parameters())
    attend: Attend = MatrixAttend() if first.device.type == "cpu" else SdpaAttend()
    if isinstance(model, WanTransformer3DModel):
        blocks = wan.guided_blocks(model)
        guidance = TrainingGuidance(attend, len(blocks), text_tokens=text_tokens)
        for layer, block in enumerate(blocks):
            block.attn2.set_processor(wan.GuidedCrossAttention(layer, guidance))
        return guidance
    assert isinstance(model, UNet2DConditionModel | PixArtTransformer2DModel)
    layers = cross_attentions(model)
    guidance = TrainingGuidance(attend, len(layers), text_tokens=text_tokens)
    for layer, attn in enumerate(layers):
        attn.set_processor(GuidedLegacyAttention(layer, guidance, _never))
    return guidance


def _never(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("a guided layer always does its own attention")


@contextmanager
def guided_training(
    guidance: TrainingGuidance, alpha_B: Tensor | None, lengths: Tensor | None = None
) -> Iterator[None]:
    """Guide every pass inside the scope by these scales; None guides none.

    Args:
        alpha_B: (B,).
        lengths: (B,), real tokens of each negative, to take its padding out; an empty one keeps its first.
    """
    if guidance.alpha_B is not None:
        raise RuntimeError("scopes of guided_training() cannot be nested")
    guidance.alpha_B = alpha_B
    if alpha_B is not None and lengths is not None:
        bias = key_bias(lengths.clamp_min(1), guidance.text_tokens, fold=False, padding=False)
        guidance.negative_bias = None if bias is None else bias.to(alpha_B.device)
    try:
        yield
    finally:
        guidance.alpha_B = guidance.negative_bias = None


def doubled(positive: Tensor, negative: Tensor) -> Tensor:
    """Embeddings (B, 2 L, E) of two prompts as a guided model takes them; from (B, L, E) each."""
    return torch.cat([positive, negative], dim=1)
