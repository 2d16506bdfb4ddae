"""What the image backbones and the bidirectional Wan share: encoded negatives, and steering that knows of batches."""

# B batch, L text tokens, E text dim, P pooled dim, N keys, H heads, D head dim, Q queries

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from causvid_adapter import ModelCall
from nasa_video.errors import InputError
from nasa_video.guidance.attention import Attend, TextKeys
from nasa_video.guidance.methods import AttentionGuidance
from nasa_video.guidance.state import EffectMeter, GuidanceState, PromptKeys


@dataclass(frozen=True)
class NegativeContext:
    """One negative prompt, encoded.

    Attributes:
        embeds: (B, L, E); B = 1 serves every sample of a batch, otherwise B must divide the batch.
        mask: (B, L), True where a token is real; None where that is not known.
        pooled: (B, P), where the model has a pooled text embedding (FLUX).
        weight: its share of the scale, see :class:`~nasa_video.guidance.methods.Negative`.
    """

    embeds: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.embeds.ndim != 3:
            raise InputError(f"embeddings of a negative must be (B, L, E), got {tuple(self.embeds.shape)}")
        if self.mask is not None and self.mask.shape != self.embeds.shape[:2]:
            raise InputError(
                f"the mask of a negative must be {tuple(self.embeds.shape[:2])}, got {tuple(self.mask.shape)}"
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InputError(f"the weight of a negative must be a positive number, got {self.weight}")

    def bias(self) -> Tensor | None:
        """Score bias (B, 1, 1, L) float32 that takes the padding out; None without a mask."""
        if self.mask is None:
            return None
        return torch.where(self.mask.bool(), 0.0, -math.inf).float()[:, None, None, :]


def expand_rows(x: Tensor, batch: int) -> Tensor:
    """``x`` with ``batch`` rows; each of its own serves as many neighbours, as pipelines repeat their prompts."""
    rows = x.shape[0]
    if rows == batch:
        return x
    if rows == 1:
        return x.expand(batch, *x.shape[1:])
    if batch % rows:
        raise InputError(f"{rows} negatives cannot be shared among a batch of {batch}; give one, or one a sample")
    return x.repeat_interleave(batch // rows, dim=0)


def expand_keys(keys: TextKeys, batch: int) -> TextKeys:
    """Keys of a prompt for every sample of a batch."""
    return keys.by_rows(lambda x: expand_rows(x, batch))


def place_keys(keys: PromptKeys, weights: torch.device, negative: NegativeContext) -> PromptKeys:
    """Keys on the device on which the model will run: that of its weights, or the prompt's where they are offloaded."""
    device = negative.embeds.device if weights.type in ("cpu", "meta") else weights
    return PromptKeys(tuple(layer.to(device) for layer in keys.layers))


def cut_keys(keys: TextKeys, rows: slice) -> TextKeys:
    """Keys of a part of the batch."""
    return keys.by_rows(lambda x: x[rows])


@dataclass
class ScopedSteering(GuidanceState):
    """GuidanceState for models that are called with whole batches by someone else's loop.

    Attributes:
        muted: the running call is not to be guided (the unconditional pass of classifier-free guidance).
        doubled: the batch is [unconditional; conditional]: only its second half is guided.
    """

    muted: bool = False
    doubled: bool = False

    def acts(self, layer: int) -> bool:
        """Whether this layer is guided in the running call."""
        return not self.muted and super().acts(layer)

    def guide(self, layer: int, q: Tensor, positive: TextKeys) -> Tensor:
        """The layer's attention output, (B, Q, H, D); every sample of the conditional batch is guided."""
        method = self.methods[layer]
        if method is None or not self.acts(layer):
            return self.attend(q, positive)
        first = q.shape[0] // 2 if self.doubled else 0
        conditional = slice(first, None)
        negatives = [(expand_keys(keys.layers[layer], q.shape[0] - first), weight) for keys, weight in self.negatives]
        guided = method(q[conditional], cut_keys(positive, conditional), negatives, self.attend)
        self.meter.add(guided)
        if not first:
            return guided.z
        unconditional = slice(0, first)
        return torch.cat([self.attend(q[unconditional], cut_keys(positive, unconditional)), guided.z])


class Backbone(Protocol):
    """One denoiser that can be guided."""

    steering: ScopedSteering

    def use(self, negatives: Sequence[NegativeContext], *, lora_scale: float | None = None) -> None:
        """Make the negatives' keys (where they depend on the prompt alone); ``lora_scale`` as in the coming call."""
        ...

    def install(self) -> AbstractContextManager[None]:
        """Guide the model inside the scope; what was there comes back, also after an error."""
        ...


def new_steering(guidance: AttentionGuidance, attend: Attend, num_layers: int, meter: EffectMeter) -> ScopedSteering:
    """GuidanceState of one model.

    Raises:
        InputError: it has no layer to guide.
    """
    if num_layers == 0:
        raise InputError("this model has no text cross-attention, so there is nothing that a negative prompt can guide")
    # A call is named only where a schedule needs one: it is read inside compiled layers, which then specialise on it.
    call = ModelCall(chunk=0, step=0, num_steps=1, clean=False) if guidance.schedule.over_layers else None
    return ScopedSteering(attend, num_layers, guidance, call=call, meter=meter)
