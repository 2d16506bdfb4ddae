"""Guidance in diffusers' legacy ``Attention``: PixArt, Stable Diffusion 1.5 and 2.1, SDXL."""

# B batch, Q image tokens, C channels, L text tokens, E text dim, H heads, D head dim

from __future__ import annotations

import math
from typing import Any, TypeAlias

from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.models import attention_processor as processors
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from nasa_video.backbones.base import Backbone, GuidedProcessor, NegativeContext, register_backbone
from nasa_video.errors import InputError
from nasa_video.guidance.attention import TextKeys
from nasa_video.guidance.state import PromptKeys

LegacyModel: TypeAlias = PixArtTransformer2DModel | UNet2DConditionModel
REPLACEABLE = (
    processors.AttnProcessor,
    processors.AttnProcessor2_0,
    processors.FusedAttnProcessor2_0,
    processors.SlicedAttnProcessor,
    processors.XFormersAttnProcessor,
)
"""Processors that compute plain softmax attention, so that ours may stand in for them."""


class GuidedLegacyAttention(GuidedProcessor):
    """Processor of a text cross-attention layer (diffusers' processor protocol).

    Where guidance does not act, the processor that was there before does the work.
    """

    def __init__(self, layer: int, state: Any, before: Any) -> None:
        super().__init__(layer, state)
        self.before = before

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """(B, Q, C) or (B, C, height, width) -> the same shape."""
        if not self.state.acts(self.layer):
            return self.before(  # type: ignore[no-any-return]
                attn, hidden_states, encoder_hidden_states, attention_mask=attention_mask, temb=temb
            )
        if encoder_hidden_states is None:
            raise InputError("a guided cross-attention layer was called without text; it cannot be guided")
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        grid = x.shape[2:] if x.ndim == 4 else None
        if grid is not None:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        q = attn.to_q(x).unflatten(2, (attn.heads, -1))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        bias = None
        if attention_mask is not None:
            batch, num_tokens = encoder_hidden_states.shape[:2]
            bias = attn.prepare_attention_mask(attention_mask, num_tokens, batch).unflatten(0, (batch, attn.heads))
        positive = project_text(attn, encoder_hidden_states, bias)
        z = self.state.guide(self.layer, q, positive).flatten(2).type_as(q)
        z = attn.to_out[1](attn.to_out[0](z))
        if grid is not None:
            z = z.transpose(1, 2).unflatten(2, grid)
        if attn.residual_connection:
            z = z + hidden_states
        return z / attn.rescale_output_factor  # type: ignore[no-any-return]


def project_text(attn: Attention, text: Tensor, bias: Tensor | None) -> TextKeys:
    """Keys and values of embedded text (B, L, E) in one layer, through all that the layer does to its text."""
    if attn.norm_cross is not None:
        text = attn.norm_encoder_hidden_states(text)
    if attn.fused_projections:
        k, v = attn.to_kv(text).chunk(2, dim=-1)
    else:
        k, v = attn.to_k(text), attn.to_v(text)
    k, v = (x.unflatten(2, (attn.heads, -1)) for x in (k, v))
    return TextKeys(k if attn.norm_k is None else attn.norm_k(k), v, bias)


def cross_attentions(model: LegacyModel) -> list[Attention]:
    """Text cross-attention layers in the order in which they run.

    Raises:
        InputError: one of them is of a kind whose output this module would not reproduce.
    """
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    named = sorted(model.named_modules(), key=lambda item: order.get(item[0].split(".")[0], 3))
    layers = [module for _, module in named if isinstance(module, Attention) and module.is_cross_attention]
    for attn in layers:
        head_dim = attn.to_q.out_features // attn.heads
        if attn.added_kv_proj_dim is not None or not math.isclose(attn.scale, head_dim**-0.5):
            raise InputError("layers with added keys or unscaled scores (unCLIP, DeepFloyd) cannot be guided")
    return layers


@register_backbone
class LegacyBackbone(Backbone):
    """A PixArt transformer or a UNet."""

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """By class: others with this attention do more to their text before it."""
        return isinstance(model, PixArtTransformer2DModel | UNet2DConditionModel)

    def find_layers(self) -> list[Attention]:
        return cross_attentions(self.model)

    def replaces(self, layer: Attention) -> bool:
        """Processors of plain softmax attention."""
        return isinstance(layer.processor, REPLACEABLE)

    def make_processor(self, layer: int, before: Any) -> GuidedLegacyAttention:
        return GuidedLegacyAttention(layer, self.state, before)

    def as_context(self, embeds: Tensor, second: Any, mask: Tensor) -> NegativeContext:
        return NegativeContext(embeds, second if self._is_pixart else mask)

    def keys_of(self, negative: NegativeContext) -> PromptKeys:
        """PixArt never attends to padding; a UNet does, and its negative's padding is the method's choice."""
        weight = self.layers[0].to_q.weight
        # Offloaded weights have no device of their own; the hooks of their layers move the input.
        device = negative.embeds.device if weight.device.type == "meta" else weight.device
        text = self._embed(negative.embeds.to(device, self.model.dtype))
        bias = negative.bias() if self._is_pixart or not self.guidance.negative_padding else None
        bias = None if bias is None else bias.to(device)
        return PromptKeys(tuple(project_text(attn, text, bias) for attn in self.layers))

    @property
    def _is_pixart(self) -> bool:
        return isinstance(self.model, PixArtTransformer2DModel)

    def _embed(self, text: Tensor) -> Tensor:
        if self._is_pixart:
            project = self.model.caption_projection
            return text if project is None else project(text)  # type: ignore[no-any-return]
        kind = self.model.config.encoder_hid_dim_type
        if kind not in (None, "text_proj", "ip_image_proj"):
            raise InputError(
                f"a UNet with encoder_hid_dim_type {kind!r} mixes images into its text; it cannot be guided"
            )
        return self.model.encoder_hid_proj(text) if kind == "text_proj" else text  # type: ignore[no-any-return]
