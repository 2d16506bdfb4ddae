"""NASA inside a student that is being trained: keys of both prompts carry gradients, one scale a sample.

At inference the keys of a negative are made once and kept. In training the projections that make them change, and with
sharded weights they may only run inside the model's own forward pass. So both prompts travel through it as one text of
twice the length, [positive; negative], and are parted in the attention layers.
"""

# B batch, Q query tokens, N keys, H heads, D head dim, L text tokens, E text dim

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel, WanTransformer3DModel
from torch import Tensor, nn

from nasa_video.backbones import wan
from nasa_video.backbones.base import ScopedState
from nasa_video.backbones.unet import GuidedLegacyAttention, cross_attentions
from nasa_video.guidance.attention import Attend, SdpaAttend, TextKeys, key_bias
from nasa_video.guidance.formulas import nasa
from nasa_video.guidance.methods import GuidedAttention
from nasa_video.train.attention import matrix_attention


class MatrixAttend:
    """Attention to text as two matrix products: on a CPU, forward and backward are several times faster."""

    def __call__(self, q: Tensor, keys: TextKeys) -> Tensor:
        if keys.bias is not None:
            return SdpaAttend()(q, keys)
        return matrix_attention(q.to(keys.v.dtype), keys.k.to(keys.v.dtype), keys.v, None)

    def with_lse(self, q: Tensor, keys: TextKeys) -> tuple[Tensor, Tensor]:
        return SdpaAttend().with_lse(q, keys)


@dataclass
class TrainingSteering(ScopedState):
    """Steers the cross-attention of one network while it is trained.

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
                "inside one scope of steered()"
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


def steer(model: nn.Module, text_tokens: int) -> TrainingSteering:
    """Put the steering into a denoiser's text cross-attention, to stay; without a scope it changes nothing."""
    first = next(model.parameters())
    attend: Attend = MatrixAttend() if first.device.type == "cpu" else SdpaAttend()
    if isinstance(model, WanTransformer3DModel):
        blocks = wan.guided_blocks(model)
        steering = TrainingSteering(attend, len(blocks), text_tokens=text_tokens)
        for layer, block in enumerate(blocks):
            block.attn2.set_processor(wan.GuidedCrossAttention(layer, steering))
        return steering
    assert isinstance(model, UNet2DConditionModel | PixArtTransformer2DModel)
    layers = cross_attentions(model)
    steering = TrainingSteering(attend, len(layers), text_tokens=text_tokens)
    for layer, attn in enumerate(layers):
        attn.set_processor(GuidedLegacyAttention(layer, steering, _never))
    return steering


def _never(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("a steered layer always does its own attention")


@contextmanager
def steered(steering: TrainingSteering, alpha_B: Tensor | None, lengths: Tensor | None = None) -> Iterator[None]:
    """Guide every pass inside the scope by these scales; None guides none.

    Args:
        alpha_B: (B,).
        lengths: (B,), real tokens of each negative, to take its padding out; an empty one keeps its first.
    """
    if steering.alpha_B is not None:
        raise RuntimeError("scopes of steered() cannot be nested")
    steering.alpha_B = alpha_B
    if alpha_B is not None and lengths is not None:
        bias = key_bias(lengths.clamp_min(1), steering.text_tokens, fold=False, padding=False)
        steering.negative_bias = None if bias is None else bias.to(alpha_B.device)
    try:
        yield
    finally:
        steering.alpha_B = steering.negative_bias = None


def doubled(positive: Tensor, negative: Tensor) -> Tensor:
    """Embeddings (B, 2 L, E) of two prompts as a steered model takes them; from (B, L, E) each."""
    return torch.cat([positive, negative], dim=1)
