"""Guidance in the cross-attention of Wan transformers, causal or not."""

# B batch, S video tokens, N text keys, H heads, D head dim, L text tokens, E text dim

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor

from causvid_adapter.accelerate.offload import resident
from causvid_adapter.model import IMAGE_MODEL_TEXT_TOKENS
from nasa_video.guidance.attention import TextKeys, folded_embeds, key_bias, shifted_bias
from nasa_video.guidance.state import GuidanceState, PromptKeys
from nasa_video.text import TextContext


class GuidedCrossAttention:
    """Processor of ``block.attn2`` (diffusers' processor protocol)."""

    def __init__(self, layer: int, steering: GuidanceState) -> None:
        self.layer = layer
        self.steering = steering

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """(B, S, dim) -> (B, S, dim), guided away from the negatives; image tokens keep the positive branch only."""
        if attention_mask is not None:
            raise NotImplementedError("Wan's cross-attention has no mask; an unknown one is not ignored")
        steering = self.steering
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        own = steering.positive
        image, text = None, encoder_hidden_states
        if attn.add_k_proj is not None:
            image, text = text[:, :-IMAGE_MODEL_TEXT_TOKENS], text[:, -IMAGE_MODEL_TEXT_TOKENS:]
        positive = own.layers[self.layer] if own is not None else project_text(attn, text)
        z = steering.guide(self.layer, q, positive).flatten(2)
        if image is not None and image.shape[1] > 0:
            z = z + steering.attend(q, project_image(attn, image)).flatten(2)
        return attn.to_out[1](attn.to_out[0](z.type_as(hidden_states)))  # type: ignore[no-any-return]


def project_text(
    attn: WanAttention, text: Tensor, bias: Tensor | None = None, rounded: Tensor | None = None
) -> TextKeys:
    """Keys and values of embedded text (B, N, dim) in one layer, through the layer's own norm of keys."""
    if attn.fused_projections:
        k, v = attn.to_kv(text).chunk(2, dim=-1)
    else:
        k, v = attn.to_k(text), attn.to_v(text)
    k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_k(k), v))
    return TextKeys(k, v, bias, rounded)


def project_image(attn: WanAttention, image: Tensor) -> TextKeys:
    """Keys and values of embedded image tokens (B, N, dim) of an image-to-video model."""
    if attn.fused_projections:
        k, v = attn.to_added_kv(image).chunk(2, dim=-1)
    else:
        k, v = attn.add_k_proj(image), attn.add_v_proj(image)
    k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_added_k(k), v))
    return TextKeys(k, v)


def prompt_keys(
    transformer: WanTransformer3DModel, context: TextContext, *, fold: bool = True, padding: bool = True
) -> PromptKeys:
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


def guided_blocks(transformer: WanTransformer3DModel) -> list[Any]:
    """Blocks with text cross-attention, numbered as the steering's layers; VACE has some of its own."""
    return [*transformer.blocks, *getattr(transformer, "vace_blocks", ())]


@contextmanager
def install(transformer: WanTransformer3DModel, steering: GuidanceState) -> Iterator[GuidanceState]:
    """Guide the transformer's cross-attention inside the scope; what was there comes back, also after an error."""
    blocks = guided_blocks(transformer)
    before = [block.attn2.processor for block in blocks]
    try:
        for layer, block in enumerate(blocks):
            block.attn2.set_processor(GuidedCrossAttention(layer, steering))
        yield steering
    finally:
        for block, processor in zip(blocks, before, strict=True):
            block.attn2.set_processor(processor)
