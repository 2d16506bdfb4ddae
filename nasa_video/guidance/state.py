"""What the guided layers of one model share: the prompts' keys, the method, where in the loop it is, what it did."""

# B batch, Q query tokens, H heads, D head dim

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from causvid_adapter import ModelCall
from nasa_video.errors import InputError
from nasa_video.guidance.attention import Attend, TextKeys
from nasa_video.guidance.methods import AttentionGuidance, GuidedAttention


@dataclass(frozen=True)
class PromptKeys:
    """Keys and values of a prompt (batch), one entry a layer; made once, used at every step and chunk."""

    layers: tuple[TextKeys, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all layers."""
        return sum(t.numel() * t.element_size() for keys in self.layers for t in (keys.k, keys.v))


@dataclass(frozen=True)
class Effect:
    """What guidance did, averaged over layers and steps.

    Attributes:
        relative_change: mean of |Z - Z+| / |Z+| over tokens.
        negative_share: see the method's docstring.
    """

    relative_change: float
    negative_share: float


class EffectMeter:
    """Running means on the model's device: reading them is the only synchronisation.

    The count is a tensor as well: a Python number that grows with every layer would make torch.compile start anew.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self._sum: Tensor | None = None
        self._lap: Tensor | None = None

    def prepare(self, device: torch.device) -> None:
        """Count in one tensor that keeps its place: a compiled model must not find another one at every call."""
        self._sum = torch.zeros(3, device=device)
        torch._dynamo.mark_static_address(self._sum, guard=False)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def add(self, guided: GuidedAttention) -> None:
        """Count one layer's output."""
        change = (guided.z - guided.z_pos).float().flatten(-2).norm(dim=-1)
        base = guided.z_pos.float().flatten(-2).norm(dim=-1).clamp_min(1e-12)
        self.add_values((change / base).mean(), guided.negative_share)

    @torch.no_grad()
    def add_values(self, relative_change: Tensor, negative_share: Tensor) -> None:
        """Count two scalars."""
        change = relative_change.float()
        values = torch.stack([change, negative_share.float(), torch.ones_like(change)])
        if self._sum is None:
            self._sum = values
        else:
            self._sum.add_(values)

    @property
    def effect(self) -> Effect | None:
        """The means so far; None when nothing was guided."""
        return _mean(self._sum)

    def lap(self) -> Effect | None:
        """The means since the last call; None when nothing was guided since."""
        sums = self._sum if self._sum is None or self._lap is None else self._sum - self._lap
        lap = _mean(sums)
        self._lap = None if self._sum is None else self._sum.clone()
        return lap


def _mean(sums: Tensor | None) -> Effect | None:
    change, share, count = (0.0, 0.0, 0.0) if sums is None else sums.tolist()
    return Effect(change / count, share / count) if count else None


@dataclass
class GuidanceState:
    """State that the guided cross-attention layers of one model read.

    Without keys of its own (``positive`` is None) a layer takes the positive keys from the context that the model
    passes it.
    """

    attend: Attend
    num_layers: int
    guidance: AttentionGuidance | None = None
    positive: PromptKeys | None = None
    negatives: Sequence[tuple[PromptKeys, float]] = ()
    call: ModelCall | None = None
    meter: EffectMeter = field(default_factory=EffectMeter)
    methods: tuple[AttentionGuidance | None, ...] = field(init=False, default=())
    """What guides each layer in the running call: the method with its share of the scale, or None."""

    def __setattr__(self, name: str, value: object) -> None:
        # Decided where the state changes, not where it is read: a layer that looked at the step's number would be
        # compiled anew for every step.
        super().__setattr__(name, value)
        if name in ("num_layers", "guidance", "negatives", "call"):
            super().__setattr__("methods", self._decide())

    def acts(self, layer: int) -> bool:
        """Whether this layer is guided in the running call."""
        return self.methods[layer] is not None

    def _decide(self) -> tuple[AttentionGuidance | None, ...]:
        guidance, call = self.guidance, self.call
        if guidance is None or not self.negatives or not guidance.active:
            return (None,) * self.num_layers
        if call is None:
            return (guidance,) * self.num_layers
        factors = [
            guidance.schedule.factor(call.step, call.num_steps, call.clean, layer, self.num_layers)
            for layer in range(self.num_layers)
        ]
        return tuple(guidance.scaled(factor) if factor > 0 else None for factor in factors)

    def guide(self, layer: int, q: Tensor, positive: TextKeys) -> Tensor:
        """The layer's attention output, (B, Q, H, D), guided where guidance acts."""
        method = self.methods[layer]
        if method is None:
            return self.attend(q, positive)
        negatives = [(keys.layers[layer], weight) for keys, weight in self.negatives]
        guided = method(q, positive, negatives, self.attend)
        self.meter.add(guided)
        return guided.z


def check_negative(text: str, length: int, prompts: Sequence[str]) -> None:
    """Refuse a negative that cannot act.

    Raises:
        InputError: the encoder found no token in it, or it is the prompt itself.
    """
    if length == 0:
        raise InputError(f"the negative prompt {text!r} has no token that the text encoder knows; it cannot act")
    if any(" ".join(text.lower().split()) == " ".join(prompt.lower().split()) for prompt in prompts):
        raise InputError(
            f"the negative prompt {text!r} is the prompt itself: steering away from it leaves nothing to show; name "
            "only what is unwanted"
        )
