"""Guidance in Wan transformers that someone else's loop calls: classic pipelines, image to video, VACE, Wan 2.2."""

# B batch, L text tokens, E text dim

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor

from causvid_adapter import CausalWan
from nasa_video.backbones import wan
from nasa_video.backbones.scope import NegativeContext, new_steering, place_keys
from nasa_video.errors import InputError
from nasa_video.guidance.attention import Attend
from nasa_video.guidance.methods import AttentionGuidance
from nasa_video.guidance.state import EffectMeter, PromptKeys
from nasa_video.text import TextContext

WanModel: TypeAlias = WanTransformer3DModel | WanVACETransformer3DModel | CausalWan


def real_tokens(embeds: Tensor) -> Tensor:
    """Real tokens of each prompt, (B,), from embeddings (B, L, E) that are zero after them, as Wan pads."""
    return embeds.ne(0).any(dim=2).sum(dim=1)


class WanBackbone:
    """A Wan transformer; the positive prompt stays what the caller passes it, the negatives' keys are folded."""

    def __init__(self, model: WanModel, guidance: AttentionGuidance, attend: Attend, meter: EffectMeter) -> None:
        self.model = model.transformer if isinstance(model, CausalWan) else model
        self.steering = new_steering(guidance, attend, len(wan.guided_blocks(self.model)), meter)

    def use(self, negatives: Sequence[NegativeContext], *, lora_scale: float | None = None) -> None:
        """Make keys and values of the negatives in every layer: they depend on the prompt alone."""
        if self.model.device.type == "meta":
            raise InputError("Wan's text keys cannot be made under sequential offload; use enable_model_cpu_offload()")
        if lora_scale is not None:
            scale_lora_layers(self.model, lora_scale)
        try:
            self.steering.negatives = [(self._keys(negative), negative.weight) for negative in negatives]
        finally:
            if lora_scale is not None:
                unscale_lora_layers(self.model, lora_scale)

    def _keys(self, negative: NegativeContext) -> PromptKeys:
        guidance = self.steering.guidance
        assert guidance is not None
        context = TextContext(negative.embeds, real_tokens(negative.embeds))
        keys = wan.prompt_keys(self.model, context, padding=guidance.negative_padding)
        return place_keys(keys, self.model.device, negative)

    @contextmanager
    def install(self) -> Iterator[None]:
        """Guide the transformer's cross-attention inside the scope."""
        with wan.install(self.model, self.steering):
            yield
