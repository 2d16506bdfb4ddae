"""Guidance in the cross-attention of Wan and of the models of its shape, causal or not.

Of its shape are models with ``condition_embedder.text_embedder`` and ``blocks[i].attn2``: Wan 2.1 and 2.2, VACE,
WanAnimate, ChronoEdit, SkyReels-V2, AnyFlow and Helios.
"""

# B batch, S video tokens, N text keys, H heads, D head dim, L text tokens, E text dim

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from causvid_adapter import CausalWan
from causvid_adapter.accelerate.offload import resident
from causvid_adapter.model import IMAGE_MODEL_TEXT_TOKENS
from nasa_video.backbones.base import Backbone, GuidedProcessor, NegativeContext, processors, register_backbone
from nasa_video.errors import InputError
from nasa_video.guidance.attention import TextKeys, folded_embeds, key_bias, shifted_bias
from nasa_video.guidance.state import GuidanceState, PromptKeys
from nasa_video.text import TextContext

_OFFERED = ("to_q", "to_k", "to_v", "norm_q", "norm_k", "to_out", "heads", "set_processor")


class GuidedCrossAttention(GuidedProcessor):
    """Processor of ``block.attn2`` (diffusers' processor protocol)."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
        original_context_length: int | None = None,
    ) -> Tensor:
        """(B, S, dim) -> (B, S, dim), guided away from the negatives; image tokens keep the positive branch only.

        ``original_context_length`` is Helios', whose self-attention alone heeds it.
        """
        if attention_mask is not None:
            raise NotImplementedError("Wan's cross-attention has no mask; an unknown one is not ignored")
        state = self.state
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        own = state.positive
        image, text = None, encoder_hidden_states
        if getattr(attn, "add_k_proj", None) is not None:
            image, text = text[:, :-IMAGE_MODEL_TEXT_TOKENS], text[:, -IMAGE_MODEL_TEXT_TOKENS:]
        positive = own.layers[self.layer] if own is not None else project_text(attn, text)
        z = state.guide(self.layer, q, positive).flatten(2)
        if image is not None and image.shape[1] > 0:
            z = z + state.attend(q, project_image(attn, image)).flatten(2)
        return attn.to_out[1](attn.to_out[0](z.type_as(hidden_states)))  # type: ignore[no-any-return]


def project_text(attn: Any, text: Tensor, bias: Tensor | None = None, rounded: Tensor | None = None) -> TextKeys:
    """Keys and values of embedded text (B, N, dim) in one layer, through the layer's own norm of keys."""
    k, v = attn.to_kv(text).chunk(2, dim=-1) if _fused(attn) else (attn.to_k(text), attn.to_v(text))
    k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_k(k), v))
    return TextKeys(k, v, bias, rounded)


def project_image(attn: Any, image: Tensor) -> TextKeys:
    """Keys and values of embedded image tokens (B, N, dim) of an image-to-video model."""
    k, v = attn.to_added_kv(image).chunk(2, -1) if _fused(attn) else (attn.add_k_proj(image), attn.add_v_proj(image))
    k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_added_k(k), v))
    return TextKeys(k, v)


def _fused(attn: Any) -> bool:
    return bool(getattr(attn, "fused_projections", False))


def prompt_keys(transformer: Any, context: TextContext, *, fold: bool = True, padding: bool = True) -> PromptKeys:
    """Keys and values of a prompt batch in every layer.

    Args:
        context: (B, L, E), zero-padded.
        fold: keep the real tokens and one padding token that stands for all (exact); otherwise all L.
        padding: whether padding takes part (as Wan does it) or is masked out.
    """
    # A row that ends in padding has its value; folded, all do. Prompts that fill all L tokens have none.
    ends: int | None = 0 if fold else int(context.lengths.argmin())
    if not fold and int(context.lengths[ends]) == context.embeds.shape[1]:
        ends = None
    bias = key_bias(context.lengths, context.embeds.shape[1], fold=fold, padding=padding)
    embeds = folded_embeds(context.embeds, context.lengths) if fold else context.embeds
    device, dtype = transformer.device, transformer.dtype
    rounded = None
    if bias is not None:
        bias = bias.to(device)
        rounded, _ = shifted_bias(bias, dtype)
    layers = []
    with torch.no_grad():
        with resident(transformer):
            text = transformer.condition_embedder.text_embedder(embeds.to(device, dtype))
        for block in guided_blocks(transformer):
            with resident(block):
                keys = project_text(block.attn2, text, bias, rounded)
                layers.append(replace(keys, padding_v=None if ends is None else keys.v[ends : ends + 1, -1:]))
    return PromptKeys(tuple(layers))


def guided_blocks(transformer: Any) -> list[Any]:
    """Blocks with text cross-attention, numbered as the layers of the state; VACE has some of its own."""
    return [*transformer.blocks, *getattr(transformer, "vace_blocks", ())]


@contextmanager
def install(transformer: WanTransformer3DModel, state: GuidanceState) -> Iterator[GuidanceState]:
    """Guide the transformer's cross-attention inside the scope; what was there comes back, also after an error."""
    layers = [block.attn2 for block in guided_blocks(transformer)]
    with processors(layers, lambda layer, before: GuidedCrossAttention(layer, state)):
        yield state


def real_tokens(embeds: Tensor) -> Tensor:
    """Real tokens of each prompt, (B,), from embeddings (B, L, E) that are zero after them, as Wan pads."""
    return embeds.ne(0).any(dim=2).sum(dim=1)


@register_backbone
class WanBackbone(Backbone):
    """Wan, or a model of its shape, that someone else's loop calls.

    The positive prompt stays what the caller passes; the negatives' keys are folded.
    """

    zero_padded = True

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """Text embedder and blocks with a cross-attention that has its own norms."""
        model = _transformer(model)
        blocks = getattr(model, "blocks", None)
        if not hasattr(getattr(model, "condition_embedder", None), "text_embedder") or not blocks:
            return False
        return all(hasattr(getattr(block, "attn2", None), name) for block in blocks for name in _OFFERED)

    def find_layers(self) -> list[Any]:
        self.model = _transformer(self.model)
        return [block.attn2 for block in guided_blocks(self.model)]

    def replaces(self, layer: Any) -> bool:
        """The model's own processor: the one that is defined beside its attention."""
        return type(layer.processor).__module__ == type(layer).__module__

    def make_processor(self, layer: int, before: Any) -> GuidedCrossAttention:
        return GuidedCrossAttention(layer, self.state)

    def keys_of(self, negative: NegativeContext) -> PromptKeys:
        """Folded; where the method wants no padding, without it."""
        if self.model.device.type == "meta":
            raise InputError("Wan's text keys cannot be made under sequential offload; use enable_model_cpu_offload()")
        context = TextContext(negative.embeds, real_tokens(negative.embeds))
        return prompt_keys(self.model, context, padding=self.guidance.negative_padding)


def _transformer(model: nn.Module) -> Any:
    return model.transformer if isinstance(model, CausalWan) else model
