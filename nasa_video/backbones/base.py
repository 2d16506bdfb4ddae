"""What the backbones share: encoded negatives, the state of a scope, how processors go in and come off, the registry.

A backbone of your own, say for a model whose blocks have a text cross-attention of another kind:

    @register_backbone
    class MyBackbone(Backbone):
        @classmethod
        def fits(cls, model): return hasattr(model, "my_blocks")
        def find_layers(self): return [block.cross_attn for block in self.model.my_blocks]
        def make_processor(self, layer, before): ...   # calls self.state.guide(layer, q, positive_keys)
        def keys_of(self, negative): ...               # PromptKeys of an encoded negative
"""

# B batch, L text tokens, E text dim, P pooled dim, N keys, H heads, D head dim, Q queries

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

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
        weight: its share of the scale, see :class:`~nasa_video.guidance.terms.Negative`.
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


@dataclass
class ScopedState(GuidanceState):
    """Guidance of a model that is called with whole batches by someone else's loop.

    Attributes:
        muted: the running call is not to be guided (the unconditional pass of classifier-free guidance).
        doubled: the batch is [unconditional; conditional]: only its second half is guided.
        samples: conditional samples in a batch, where a pipeline says how many; batches of other sizes are refused.
    """

    muted: bool = False
    doubled: bool = False
    samples: int | None = None

    def acts(self, layer: int) -> bool:
        """Whether this layer is guided in the running call."""
        return not self.muted and super().acts(layer)

    def guide(self, layer: int, q: Tensor, positive: TextKeys) -> Tensor:
        """The layer's attention output, (B, Q, H, D); every sample of the conditional batch is guided."""
        method = self.methods[layer]
        if method is None or not self.acts(layer):
            return self.attend(q, positive)
        first = self._first_conditional(q.shape[0])
        negatives = [(expand_keys(keys.layers[layer], q.shape[0] - first), weight) for keys, weight in self.negatives]
        guided = method(q[first:], positive.by_rows(lambda x: x[first:]), negatives, self.attend)
        self.meter.add(guided)
        if not first:
            return guided.z
        return torch.cat([self.attend(q[:first], positive.by_rows(lambda x: x[:first])), guided.z])

    def _first_conditional(self, batch: int) -> int:
        """The row from which on a batch is conditional."""
        if not self.doubled or self.samples is None:
            return batch // 2 if self.doubled else 0
        if batch == 2 * self.samples:
            return self.samples
        raise InputError(
            f"a batch of {batch} rows for {self.samples} samples is not [unconditional; conditional], so that guidance "
            "cannot tell which rows to guide; switch the pipeline's own guidance off (guidance_scale=1)"
        )


class GuidedProcessor:
    """Base of what stands in for an attention layer's processor while it is guided."""

    def __init__(self, layer: int, state: Any) -> None:
        self.layer = layer
        self.state = state


@contextmanager
def processors(layers: Sequence[Any], make: Callable[[int, Any], Any]) -> Iterator[None]:
    """``make(index, before)`` for every layer's processor inside the scope; what was there comes back after it."""
    before = [layer.processor for layer in layers]
    try:
        for index, layer in enumerate(layers):
            layer.set_processor(make(index, before[index]))
        yield
    finally:
        for layer, processor in zip(layers, before, strict=True):
            layer.set_processor(processor)


class Backbone(ABC):
    """One denoiser that can be guided.

    Attributes:
        joint: its attention is joint: text and image share one softmax.
        zero_padded: the text is zero behind its tokens, so that an embedding alone says which are padding.
    """

    joint: ClassVar[bool] = False
    zero_padded: ClassVar[bool] = False

    def __init__(self, model: nn.Module, guidance: AttentionGuidance, attend: Attend, meter: EffectMeter) -> None:
        self.model: Any = model
        self.layers = self.find_layers()
        if not self.layers:
            raise InputError(
                "this model has no text cross-attention, so there is nothing that a negative prompt can guide"
            )
        for layer in self.layers:
            self._check_processor(layer)
        # A call is named only where a schedule needs one: it is read inside compiled layers, which then specialise.
        call = ModelCall(chunk=0, step=0, num_steps=1, clean=False) if guidance.schedule.over_layers else None
        self.state = ScopedState(attend, len(self.layers), guidance, call=call, meter=meter)

    @classmethod
    @abstractmethod
    def fits(cls, model: nn.Module) -> bool:
        """Whether this is the backbone of a model, by what its attention offers."""

    @abstractmethod
    def find_layers(self) -> list[Any]:
        """Its text attention layers, in the order in which they run; they have ``processor`` and ``set_processor``."""

    @abstractmethod
    def make_processor(self, layer: int, before: Any) -> Any:
        """What stands in for a layer's processor: its output is ``self.state.guide(layer, q, positive keys)``."""

    @abstractmethod
    def keys_of(self, negative: NegativeContext) -> PromptKeys:
        """Keys and values of a negative in every layer."""

    def replaces(self, layer: Any) -> bool:
        """Whether the layer's own processor does nothing that :meth:`make_processor`'s would not do."""
        return True

    def as_context(self, embeds: Tensor, second: Any, mask: Tensor) -> NegativeContext:
        """A negative from what the pipeline's ``encode_prompt`` gave first and second, and its tokenizer's mask."""
        return NegativeContext(embeds, mask)

    @property
    def guidance(self) -> AttentionGuidance:
        """The method."""
        assert self.state.guidance is not None
        return self.state.guidance

    @property
    def adapters(self) -> list[Any]:
        """What LoRAs do to the model now: keys are made for it."""
        tuned = [m for m in self.model.modules() if hasattr(m, "lora_A") and hasattr(m, "active_adapters")]
        return [(list(m.active_adapters), m.disable_adapters, dict(m.scaling)) for m in tuned]

    @torch.no_grad()
    def use(self, negatives: Sequence[NegativeContext], *, lora_scale: float | None = None) -> None:
        """Make the negatives' keys, which depend on the prompt alone; ``lora_scale`` as in the coming call."""
        if lora_scale is not None:
            scale_lora_layers(self.model, lora_scale)
        try:
            self.state.negatives = [(self._placed(negative), negative.weight) for negative in negatives]
        finally:
            if lora_scale is not None:
                unscale_lora_layers(self.model, lora_scale)

    @contextmanager
    def install(self) -> Iterator[None]:
        """Guide the model inside the scope; what was there comes back, also after an error."""
        with processors(self.layers, self.make_processor):
            yield

    def check_installed(self) -> None:
        """Refuse a call of the model in which guidance would be missing.

        Raises:
            InputError: the layers have other processors than those that were put in.
        """
        if any(not isinstance(layer.processor, GuidedProcessor) for layer in self.layers):
            raise InputError(
                "an attention processor was changed inside guided(...), which takes the guidance off: switch attention "
                "slicing, xformers and the like before it"
            )

    def _placed(self, negative: NegativeContext) -> PromptKeys:
        """Keys on the device on which the model will run: that of its weights, or the prompt's where they are away."""
        # Diffusers' own answer knows of group offloading.
        weights = getattr(self.model, "device", None) or next(self.model.parameters()).device
        device = negative.embeds.device if weights.type in ("cpu", "meta") else weights
        return PromptKeys(tuple(layer.to(device) for layer in self.keys_of(negative).layers))

    def _check_processor(self, layer: Any) -> None:
        if isinstance(layer.processor, GuidedProcessor):
            raise InputError(
                "this model is guided already: leave the other guided(...) first, or give it all negatives"
            )
        if not self.replaces(layer):
            raise InputError(
                f"attention processor {type(layer.processor).__name__} does more than attention over text (an "
                "IP-Adapter?); guidance would drop that: unload it first, for example with pipe.unload_ip_adapter()"
            )


B = TypeVar("B", bound=type[Backbone])
BACKBONES: list[type[Backbone]] = []
"""The known backbones; the last registered is asked first."""


def register_backbone(backbone: B) -> B:
    """Make a backbone known to ``guided`` and the guiders; a decorator."""
    BACKBONES.insert(0, backbone)
    return backbone


def find_backbone(model: nn.Module) -> type[Backbone]:
    """The backbone that fits a model.

    Raises:
        InputError: none does; the message says what does, and how to add one.
    """
    for backbone in BACKBONES:
        if backbone.fits(model):
            return backbone
    raise InputError(
        f"no way to guide a {type(model).__name__} is known; PixArt, UNet2DConditionModel (Stable Diffusion, SDXL), "
        "FLUX and models of Wan's shape (condition_embedder.text_embedder and blocks[i].attn2) can be guided. One of "
        "your own: a subclass of nasa_video.backbones.base.Backbone with @register_backbone"
    )
