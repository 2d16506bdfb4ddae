"""Negative guidance in attention: NASA, NAG, VSF, and classifier-free guidance beside them.

The formulas are pure functions; their settings are frozen dataclasses that can be called on one attention layer
(:class:`AttentionGuidance`). Classifier-free guidance works on the denoiser's output instead, see
``nasa_video.video.classifier_free``.
"""

# B batch, Q query tokens, H heads, D head dim

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from nasa_video.errors import InputError
from nasa_video.guidance.attention import Attend, TextKeys

MAX_SCALE = 100.0
_RIDGE = 0.01


def nasa(z_pos: Tensor, z_neg: Tensor, *, scale: float) -> Tensor:
    """Negative-Away Steer Attention: eq. 9 of arXiv 2412.02687."""
    return z_pos - scale * z_neg


def said_already(prompt: Tensor, negative: Tensor) -> Tensor:
    """How much of a negative a prompt says itself, token by token and head by head: c in prompt = c negative + rest.

    Both (B, Q, H, D), without what the padding contributes; the result (B, Q, H, 1) is 0 where they point apart. A
    small ridge makes it 0, too, where the negative finds next to nothing and its direction means nothing.
    """
    prompt, negative = prompt.float(), negative.float()
    along, own, whole = map(torch.linalg.vecdot, (prompt, negative, prompt), (negative, negative, prompt))
    contained: Tensor = along.clamp_min(0) / (own + _RIDGE * whole).clamp_min(torch.finfo(torch.float32).tiny)
    return contained[..., None]


def within(step: Tensor, z_pos: Tensor, *, limit: float) -> Tensor:
    """The share of a step, at most 1, of which no token is longer than ``limit`` of that token's Z+.

    Both (B, Q, H, D); the result (B, Q, 1, 1), since lengths are L2 over all channels of a token, heads merged.
    """
    longest, length = (torch.linalg.vector_norm(x.float(), dim=(-2, -1), keepdim=True) for x in (z_pos, step))
    share: Tensor = limit * longest / length.clamp_min(torch.finfo(torch.float32).tiny)
    return share.clamp_max(1.0)


def nag(z_pos: Tensor, z_neg: Tensor, *, scale: float, tau: float, alpha: float) -> Tensor:
    """Normalized Attention Guidance: eqs. 7 to 10 of arXiv 2505.21179, with its public code's scale (phi + 1).

    The norms are L1 over all channels of a token, heads merged: the last two axes of (B, Q, H, D).
    """
    extrapolated = scale * z_pos - (scale - 1) * z_neg
    norm_pos, norm = (x.abs().sum(dim=(-2, -1), keepdim=True) for x in (z_pos, extrapolated))
    limit = tau * norm_pos
    shrink = limit / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    clipped = torch.where(norm > limit, extrapolated * shrink, extrapolated)
    return alpha * clipped + (1 - alpha) * z_pos


def vsf(z_pos: Tensor, z_neg: Tensor, lse_pos: Tensor, lse_neg: Tensor, *, scale: float, bias: float = 0.0) -> Tensor:
    """Value Sign Flip (arXiv 2508.10931) as a gate: ``w z+ - scale (1 - w) z-`` with w = sigmoid(lse+ - lse- - bias).

    Equal to one softmax over the keys of both prompts with the negative's values flipped; lse are (B, Q, H, 1).
    """
    w = torch.sigmoid(lse_pos - lse_neg - bias).to(z_pos.dtype)
    return w * z_pos - scale * (1 - w) * z_neg


def cfg(v_pos: Tensor, v_neg: Tensor, *, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) of the denoiser's output; scale 1 is unguided."""
    return v_neg + scale * (v_pos - v_neg)


@dataclass(frozen=True)
class Negative:
    """One negative prompt and its share of the scale (1 = the whole)."""

    text: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InputError("a negative prompt must not be empty; leave it out to run without one")
        if not (math.isfinite(self.weight) and 0 < self.weight <= MAX_SCALE):
            raise InputError(f"the weight of a negative must be above 0 and at most {MAX_SCALE:g}, got {self.weight}")


@dataclass(frozen=True)
class ScaleSchedule:
    """Where guidance acts, and with what share of the method's scale.

    Attributes:
        first_step, last_step: shares of the few steps, 0 to 1; outside them guidance is off.
        first_layer, last_layer: shares of the layers, likewise.
        clean_pass: guide the pass at t = 0 that writes the chunk's keys for later chunks, with the last step's share.
        step_scales: shares of the scale, 0 to 1, at evenly spaced steps from the first to the last, linear between
            them; nothing is 1 at every step. (1, 0) falls to nothing, (0, 1, 0) is strongest in the middle. A compiled
            model is compiled once for every different share.
        layer_scales: the same over the layers; the shares of step and layer are multiplied.
    """

    first_step: float = 0.0
    last_step: float = 1.0
    first_layer: float = 0.0
    last_layer: float = 1.0
    clean_pass: bool = True
    step_scales: tuple[float, ...] = ()
    layer_scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for low, high in ((self.first_step, self.last_step), (self.first_layer, self.last_layer)):
            if not 0.0 <= low <= high <= 1.0:
                raise InputError(f"a schedule must satisfy 0 <= first <= last <= 1, got {low} to {high}")
        for share in (*self.step_scales, *self.layer_scales):
            if not 0.0 <= share <= 1.0:
                raise InputError(f"a schedule's shares of the scale must be from 0 to 1, got {share}; raise the scale")

    @property
    def over_steps(self) -> bool:
        """Whether it has to know the step."""
        return (self.first_step, self.last_step) != (0.0, 1.0) or bool(self.step_scales)

    @property
    def over_layers(self) -> bool:
        """Whether it tells layers apart."""
        return (self.first_layer, self.last_layer) != (0.0, 1.0) or bool(self.layer_scales)

    def factor(self, step: int, num_steps: int, clean: bool, layer: int, num_layers: int) -> float:
        """The share of the scale, 0 where guidance is off. Step i of n covers the share from i / n to (i + 1) / n."""
        if clean:
            if not self.clean_pass:
                return 0.0
        elif not self._inside(step, num_steps, self.first_step, self.last_step):
            return 0.0
        if not self._inside(layer, num_layers, self.first_layer, self.last_layer):
            return 0.0
        last_step = num_steps - 1
        return _between(self.step_scales, last_step if clean else step, last_step) * _between(
            self.layer_scales, layer, num_layers - 1
        )

    @staticmethod
    def _inside(index: int, total: int, first: float, last: float) -> bool:
        middle = (index + 0.5) / total
        return first <= middle <= last


def _between(shares: Sequence[float], index: int, last: int) -> float:
    """Value at ``index`` of 0 to ``last`` on the line through evenly spaced ``shares``; 1 without any."""
    if not shares:
        return 1.0
    place = index / last * (len(shares) - 1) if last > 0 else 0.0
    left = min(int(place), len(shares) - 1)
    right = min(left + 1, len(shares) - 1)
    return shares[left] + (place - left) * (shares[right] - shares[left])


EVERYWHERE = ScaleSchedule()


@dataclass(frozen=True)
class GuidedAttention:
    """Output of one guided layer.

    Attributes:
        z: (B, Q, H, D), what goes on to the output projection.
        z_pos: the unguided output.
        negative_share: scalar; how much of what was mixed came from the negative (see each method).
    """

    z: Tensor
    z_pos: Tensor
    negative_share: Tensor


WeightedKeys = tuple[TextKeys, float]


@runtime_checkable
class AttentionGuidance(Protocol):
    """A method that steers one attention layer away from the negatives."""

    name: ClassVar[str]

    @property
    def negative_padding(self) -> bool:
        """Whether the negative's padding tokens take part."""
        ...

    @property
    def schedule(self) -> ScaleSchedule:
        """Where it acts."""
        ...

    @property
    def active(self) -> bool:
        """False where the settings make it the identity."""
        ...

    def __call__(
        self, q: Tensor, positive: TextKeys, negatives: Sequence[WeightedKeys], attend: Attend
    ) -> GuidedAttention:
        """Guide one layer; q is (B, Q, H, D)."""
        ...


def weakened(guidance: AttentionGuidance, factor: float) -> AttentionGuidance:
    """The method with a share of its strength, 0 to 1, which is the method as it is.

    VSF's negatives keep their part of the attention at any share; what of it is subtracted follows the share.

    Raises:
        InputError: it has no scale.
    """
    if factor == 1.0:
        return guidance
    scale = getattr(guidance, "scale", None)
    if scale is None or not dataclasses.is_dataclass(guidance):
        raise InputError(f"{guidance.name} has no scale that could follow a schedule of shares")
    # NAG's scale of 1 is its identity, the others' is 0.
    rest = 1.0 if isinstance(guidance, Nag) else 0.0
    return dataclasses.replace(guidance, scale=rest + factor * (scale - rest))  # type: ignore[return-value, type-var]


def shares(negatives: Sequence[WeightedKeys]) -> list[float]:
    """Weights of the negatives, scaled down together where they sum to more than one.

    Each branch subtracts the part that all prompts have in common, so n full branches would subtract it n times.
    One negative of weight 0.4 stays 0.4 of the scale; two of weight 1 have half of it each.
    """
    total = max(1.0, sum(weight for _, weight in negatives))
    return [weight / total for _, weight in negatives]


def _mean_norm(x: Tensor) -> Tensor:
    norms: Tensor = x.float().flatten(-2).norm(dim=-1)
    return norms.mean()


def _norm_share(z_pos: Tensor, subtracted: Tensor) -> Tensor:
    negative = _mean_norm(subtracted)
    return negative / (negative + _mean_norm(z_pos)).clamp_min(1e-12)


def _check_number(name: str, value: float, low: float, high: float) -> None:
    if not math.isfinite(value) or not low <= value <= high:
        raise InputError(f"{name} must be a number from {low:g} to {high:g}, got {value}")


@dataclass(frozen=True)
class _Subtraction:
    """Settings of a method that subtracts a multiple of something from Z+."""

    scale: float = 1.0
    negative_padding: bool = True
    schedule: ScaleSchedule = EVERYWHERE

    def __post_init__(self) -> None:
        _check_number("scale", self.scale, 0.0, MAX_SCALE)

    @property
    def active(self) -> bool:
        return self.scale > 0


@dataclass(frozen=True)
class Nasa(_Subtraction):
    """NASA as published: ``Z = Z+ - scale * Z-``; with several negatives, the weighted sum of their branches.

    Its negative share is |scale Z-| / (|Z+| + |scale Z-|), means over tokens of norms over channels.
    """

    name: ClassVar[str] = "nasa"

    def __call__(
        self, q: Tensor, positive: TextKeys, negatives: Sequence[WeightedKeys], attend: Attend
    ) -> GuidedAttention:
        z_pos = attend(q, positive)
        z_neg = sum_branches(q, negatives, attend)
        return GuidedAttention(nasa(z_pos, z_neg, scale=self.scale), z_pos, _norm_share(z_pos, self.scale * z_neg))


@dataclass(frozen=True)
class CentredNasa(_Subtraction):
    """NASA that leaves alone what all prompts have in common: ``Z = Z+ - scale (Z- - Z0)``.

    Z0 is what a prompt without words attends to: the value of the padding token, since a softmax over equal keys gives
    their value whatever the query is. Where the negative finds nothing it attends to its padding, Z- is near Z0, and
    nothing is subtracted; plain NASA subtracts all of Z0 there (docs/method.md has what that costs). For the same
    reason several negatives need not share the scale: each has its own weight of it.

    With `conflict` the scale rises where prompt and negative contradict each other, and only there:
    ``Z = Z+ - scale (1 + conflict c) (Z- - Z0)``, c being how much of Z- - Z0 the prompt's own Z+ - Z0 contains
    (:func:`said_already`), in every token and head. What nobody asked for needs little; what the prompt asks for needs
    a lot.

    With `limit` the part that does not rise is, for each negative, no longer than that share of |Z+| in any token:
    ``Z = Z+ - scale (l + conflict c) (Z- - Z0)``, l = min(1, limit |Z+| / (scale |Z- - Z0|)) (:func:`within`). Some
    negatives say far more than others at the same scale; None is no limit.

    Its negative share is |Z+ - Z| / (|Z+| + |Z+ - Z|), as NASA's.
    """

    conflict: float = 0.0
    limit: float | None = None
    name: ClassVar[str] = "nasa-centred"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("conflict", self.conflict, 0.0, MAX_SCALE)
        if self.limit is not None:
            _check_number("limit", self.limit, 0.0, MAX_SCALE)

    def __call__(
        self, q: Tensor, positive: TextKeys, negatives: Sequence[WeightedKeys], attend: Attend
    ) -> GuidedAttention:
        z_pos = attend(q, positive)
        added = torch.zeros_like(z_pos)
        for keys, weight in negatives:
            if keys.padding_v is None:
                raise InputError(
                    f"{self.name} subtracts what the negative adds to the padding, and there is none: this model does "
                    "not pad its prompts with one token, or an unfolded negative fills all tokens; use nasa"
                )
            its_own = attend(q, keys) - keys.padding_v
            share = torch.ones_like(its_own[..., :1, :1])
            if self.limit is not None:
                share = within(self.scale * its_own, z_pos, limit=self.limit)
            if self.conflict:
                share = share + self.conflict * said_already(z_pos - keys.padding_v, its_own)
            added = added + weight * share.to(its_own.dtype) * its_own
        return GuidedAttention(nasa(z_pos, added, scale=self.scale), z_pos, _norm_share(z_pos, self.scale * added))


@dataclass(frozen=True)
class Nag:
    """NAG; defaults are the paper's for Wan 2.1; scale 1 is unguided.

    Its negative share is that of (scale - 1) Z- beside scale Z+, in norms.
    """

    scale: float = 4.0
    tau: float = 2.5
    alpha: float = 0.25
    negative_padding: bool = True
    schedule: ScaleSchedule = EVERYWHERE
    name: ClassVar[str] = "nag"

    def __post_init__(self) -> None:
        _check_number("scale", self.scale, 1.0, MAX_SCALE)
        _check_number("tau", self.tau, 1.0, MAX_SCALE)
        _check_number("alpha", self.alpha, 0.0, 1.0)

    @property
    def active(self) -> bool:
        return self.scale > 1 and self.alpha > 0

    def __call__(
        self, q: Tensor, positive: TextKeys, negatives: Sequence[WeightedKeys], attend: Attend
    ) -> GuidedAttention:
        z_pos = attend(q, positive)
        # Weights below one move the reference back towards the positive branch.
        rest = 1.0 - sum(shares(negatives))
        z_neg = sum_branches(q, negatives, attend)
        if rest > 0:
            z_neg = z_neg + rest * z_pos
        z = nag(z_pos, z_neg, scale=self.scale, tau=self.tau, alpha=self.alpha)
        return GuidedAttention(z, z_pos, _norm_share(self.scale * z_pos, (self.scale - 1) * z_neg))


@dataclass(frozen=True)
class Vsf:
    """VSF; the negative's padding is left out, as in its public scripts; scale 0 means off.

    Its negative share is 1 - w, the attention mass that the negatives' keys take.
    """

    scale: float = 1.0
    bias: float = 0.0
    negative_padding: bool = False
    schedule: ScaleSchedule = EVERYWHERE
    name: ClassVar[str] = "vsf"

    def __post_init__(self) -> None:
        _check_number("scale", self.scale, 0.0, MAX_SCALE)
        _check_number("bias", self.bias, -MAX_SCALE, MAX_SCALE)

    @property
    def active(self) -> bool:
        return self.scale > 0

    def __call__(
        self, q: Tensor, positive: TextKeys, negatives: Sequence[WeightedKeys], attend: Attend
    ) -> GuidedAttention:
        z_pos, lse_pos = attend.with_lse(q, positive)
        # Several negatives are one prompt whose keys are all of theirs: their branches merge by attention mass, which
        # already shares the strength among them, so the weights are taken as they are.
        branches = [attend.with_lse(q, keys) for keys, _ in negatives]
        lse_neg = torch.stack([lse for _, lse in branches]).logsumexp(dim=0)
        z_neg = torch.zeros_like(z_pos)
        for (branch, lse), (_, weight) in zip(branches, negatives, strict=True):
            z_neg = z_neg + weight * (lse - lse_neg).exp().to(z_pos.dtype) * branch
        z = vsf(z_pos, z_neg, lse_pos, lse_neg, scale=self.scale, bias=self.bias)
        return GuidedAttention(z, z_pos, torch.sigmoid(lse_neg + self.bias - lse_pos).mean())


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance with the negative prompt in the unconditional place; scale 1 is unguided.

    It costs a second pass of the whole model and a second KV cache, and corrupts few-step models: it is here to be
    compared with.
    """

    scale: float = 3.0
    name: ClassVar[str] = "cfg"

    def __post_init__(self) -> None:
        _check_number("scale", self.scale, 1.0, MAX_SCALE)

    @property
    def active(self) -> bool:
        return self.scale > 1


Guidance = Nasa | CentredNasa | Nag | Vsf | ClassifierFree
GUIDANCE: dict[str, type[Guidance]] = {method.name: method for method in (Nasa, CentredNasa, Nag, Vsf, ClassifierFree)}


def sum_branches(q: Tensor, negatives: Sequence[WeightedKeys], attend: Attend) -> Tensor:
    """The weighted sum of the negatives' attention outputs, (B, Q, H, D); weights as :func:`shares` has them."""
    terms = [share * attend(q, keys) for (keys, _), share in zip(negatives, shares(negatives), strict=True)]
    return torch.stack(terms).sum(dim=0) if len(terms) > 1 else terms[0]
