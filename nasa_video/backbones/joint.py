"""What guidance can mean where text and image share one softmax (FLUX, SD 3.5).

For image queries, attention over text keys T and image keys I splits exactly, with m = sigmoid(lse_T - lse_I):
``Z = m Z_T + (1 - m) Z_I``. The image part is the same for every prompt; the NASA paper gives no formula for which of
these it subtracts, so there are four settings, side by side in docs/method/joint_attention.md.
"""

# B batch, Q image queries, N keys, H heads, D head dim

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nasa_video.errors import InputError
from nasa_video.guidance.attention import Attend, TextKeys, WeightedKeys
from nasa_video.guidance.methods import AttentionGuidance, GuidedAttention, Nag, Nasa, Vsf


@dataclass(frozen=True)
class JointLayer:
    """One guided call of a joint attention layer: q (B, Q, H, D) of the image, keys after QK-norm and rotation."""

    q: Tensor
    positive: TextKeys
    negatives: Sequence[WeightedKeys]
    image: TextKeys
    attend: Attend

    @property
    def text_part(self) -> tuple[Tensor, Tensor]:
        """Attention to the positive prompt alone, and its log-sum-exp."""
        return self.attend.with_lse(self.q, self.positive)

    @property
    def image_part(self) -> tuple[Tensor, Tensor]:
        """Attention to the image alone, and its log-sum-exp."""
        return self.attend.with_lse(self.q, self.image)


class JointFormula(ABC):
    """How a method that knows of text keys alone guides the image rows of a joint attention layer."""

    def check(self, guidance: AttentionGuidance) -> None:
        """Raise InputError for a method that it gives no meaning to."""
        return

    def __call__(
        self,
        guidance: AttentionGuidance,
        q: Tensor,
        positive: TextKeys,
        negatives: Sequence[WeightedKeys],
        image: TextKeys,
        attend: Attend,
    ) -> GuidedAttention:
        """Guide q (B, Q, H, D); keys after QK-norm and rotation."""
        return self.guide(guidance, JointLayer(q, positive, negatives, image, attend))

    @abstractmethod
    def guide(self, guidance: AttentionGuidance, layer: JointLayer) -> GuidedAttention:
        """The formula."""


@dataclass(frozen=True)
class WholeOutput(JointFormula):
    """F1: the method on the whole joint outputs; ``Z+ - alpha Z-`` for NASA.

    NAG as published for FLUX, and the NASA baseline of the VSF paper. It subtracts the image's self-attention too.
    """

    def check(self, guidance: AttentionGuidance) -> None:
        if isinstance(guidance, Vsf):
            raise InputError("VSF over whole joint outputs would flip the image's own values; use JoinedKeys()")

    def guide(self, guidance: AttentionGuidance, layer: JointLayer) -> GuidedAttention:
        joined = [(join_keys(keys, layer.image), weight) for keys, weight in layer.negatives]
        return guidance(layer.q, join_keys(layer.positive, layer.image), joined, layer.attend)


@dataclass(frozen=True)
class NegativeMass(JointFormula):
    """F2: ``Z+ - alpha m- Z_T-``: the negative's text part, weighed by the attention that it would get itself."""

    def check(self, guidance: AttentionGuidance) -> None:
        if not isinstance(guidance, Nasa):
            raise InputError(f"NegativeMass() is a formula for NASA; {guidance.name} needs branches of equal weight")

    def guide(self, guidance: AttentionGuidance, layer: JointLayer) -> GuidedAttention:
        (z_text, lse_text), (z_image, lse_image) = layer.text_part, layer.image_part
        z_pos = _mix(z_text, z_image, lse_text - lse_image)
        given = _GivenPositive(layer, z_pos, lse_text, lse_image)
        return guidance(layer.q, layer.positive, layer.negatives, given)


@dataclass(frozen=True)
class PositiveMass(JointFormula):
    """F3: ``m+ g(Z_T+, Z_T-) + (1 - m+) Z_I``: the method on the text part alone, as in cross-attention.

    For NASA this is ``Z+ - alpha m+ Z_T-``.
    """

    def guide(self, guidance: AttentionGuidance, layer: JointLayer) -> GuidedAttention:
        (z_text, lse_text), (z_image, lse_image) = layer.text_part, layer.image_part
        text = guidance(layer.q, layer.positive, layer.negatives, _GivenPositive(layer, z_text, lse_text))
        mass = lse_text - lse_image
        return GuidedAttention(_mix(text.z, z_image, mass), _mix(text.z_pos, z_image, mass), text.negative_share)


@dataclass(frozen=True)
class JoinedKeys(JointFormula):
    """VSF as published for joint attention: one softmax over [T+; I; T-], the values of T- flipped."""

    def check(self, guidance: AttentionGuidance) -> None:
        if not isinstance(guidance, Vsf):
            other = "NegativeMass()" if isinstance(guidance, Nasa) else "WholeOutput()"
            raise InputError(f"JoinedKeys() is VSF's formula; for {guidance.name} use {other}")

    def guide(self, guidance: AttentionGuidance, layer: JointLayer) -> GuidedAttention:
        return guidance(layer.q, join_keys(layer.positive, layer.image), layer.negatives, layer.attend)


def default_joint(guidance: AttentionGuidance) -> JointFormula:
    """What each method's authors published; for NASA, which was not, F2 (docs/method/joint_attention.md).

    A method of your own gets F3, the only formula that has a meaning for every method of cross-attention.
    """
    if isinstance(guidance, Nag):
        return WholeOutput()
    if isinstance(guidance, Vsf):
        return JoinedKeys()
    return NegativeMass() if isinstance(guidance, Nasa) else PositiveMass()


def join_keys(text: TextKeys, image: TextKeys) -> TextKeys:
    """Keys of text and image behind one another, as FLUX orders them."""
    k, v = torch.cat([text.k, image.k], dim=1), torch.cat([text.v, image.v], dim=1)
    if text.bias is None:
        return TextKeys(k, v)
    return TextKeys(k, v, torch.nn.functional.pad(text.bias, (0, image.k.shape[1])))


def _mix(z_text: Tensor, z_image: Tensor, logit: Tensor) -> Tensor:
    m = torch.sigmoid(logit).to(z_text.dtype)
    return m * z_text + (1 - m) * z_image


class _GivenPositive:
    """An attention that has the positive prompt's output already; the others are computed.

    With ``lse_image``, outputs of the others carry the mass that their keys would take beside the image's.
    """

    def __init__(self, layer: JointLayer, z: Tensor, lse: Tensor, lse_image: Tensor | None = None) -> None:
        self.attend, self.positive = layer.attend, layer.positive
        self.z, self.lse, self.lse_image = z, lse, lse_image

    def __call__(self, q: Tensor, keys: TextKeys) -> Tensor:
        if keys is self.positive:
            return self.z
        if self.lse_image is None:
            return self.attend(q, keys)
        z, lse = self.attend.with_lse(q, keys)
        return torch.sigmoid(lse - self.lse_image).to(z.dtype) * z

    def with_lse(self, q: Tensor, keys: TextKeys) -> tuple[Tensor, Tensor]:
        if keys is self.positive:
            return self.z, self.lse
        return self.attend.with_lse(q, keys)
