"""Guidance in FLUX: joint attention over text and image, double and single blocks.

The image stream is one; each negative prompt has a text stream of its own that runs beside the positive one through
every block, with its own pooled embedding in its modulation. Only the image rows of the attention are guided.
"""

# B batch, L text tokens, S image tokens, C channels, E text dim, P pooled dim, H heads, D head dim

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, cat, nn

from nasa_video.backbones.base import Backbone, GuidedProcessor, NegativeContext, expand_keys, register_backbone
from nasa_video.backbones.flux_streams import FluxRun, TextStream, enter_block, leave_block
from nasa_video.backbones.joint import JointFormula, default_joint, join_keys
from nasa_video.errors import InputError
from nasa_video.guidance.attention import Attend, TextKeys
from nasa_video.guidance.methods import AttentionGuidance
from nasa_video.guidance.state import EffectMeter, PromptKeys

Rotary = tuple[Tensor, Tensor]


class GuidedJointAttention(GuidedProcessor):
    """Processor of ``block.attn`` (diffusers' processor protocol).

    It also takes the negatives' streams through the block: the whole of it runs inside the block's own forward, where
    offloading has its weights at hand.
    """

    def __init__(self, layer: int, block: Any, run: FluxRun, before: Any) -> None:
        super().__init__(layer, run.state)
        self.block, self.run, self.before = block, run, before

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Image (B, S, C) and text (B, L, C), or both in one (B, L + S, C) in a single block; the same back."""
        run, last = self.run, self.run.last_layer
        if self.layer > last:
            return self.before(  # type: ignore[no-any-return]
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
        if attention_mask is not None:
            raise InputError("FLUX's joint attention has no mask; a guided layer does not ignore an unknown one")
        double = encoder_hidden_states is not None
        length = run.text_tokens if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        text_rotary = image_rotary = None
        if image_rotary_emb is not None:
            cos, sin = image_rotary_emb
            text_rotary, image_rotary = (cos[:length], sin[:length]), (cos[length:], sin[length:])
        own, text = hidden_states, encoder_hidden_states
        if text is None:
            own, text = hidden_states[:, length:], hidden_states[:, :length]
        q_image, image = project(attn, own, image_rotary)
        q_text, positive = project(attn, text, text_rotary, added=double)
        z_text = run.state.attend(q_text, join_keys(positive, image)).flatten(2)
        negatives = self._advance_negatives(attn, image, text_rotary, length, double)
        z_image = self._guide(q_image, positive, negatives, image).flatten(2)
        if not double:
            return cat([z_text, z_image], dim=1).type_as(q_image)
        z_image, z_text = z_image.type_as(q_image), z_text.type_as(q_image)
        return attn.to_out[1](attn.to_out[0](z_image)), attn.to_add_out(z_text)

    def _advance_negatives(
        self, attn: FluxAttention, image: TextKeys, rotary: Rotary | None, length: int, double: bool
    ) -> list[tuple[TextKeys, float]]:
        """The negatives' keys; their streams move to the next block, where one reads them."""
        negatives = []
        for stream in self.run.streams:
            enter_block(self.block, stream, double=double)
            assert stream.inner is not None
            tokens = stream.inner.shape[1]
            if tokens > length:
                raise InputError(
                    f"the negative prompt has {tokens} tokens and the prompt {length}: FLUX has no positions for the "
                    "rest; encode both with the same max_sequence_length"
                )
            cut = None if rotary is None else (rotary[0][:tokens], rotary[1][:tokens])
            q, keys = project(attn, stream.inner, cut, added=double)
            if self.layer < self.run.last_layer:
                attended = self.run.state.attend(q, join_keys(keys, image)).flatten(2).type_as(q)
                leave_block(self.block, stream, attn.to_add_out(attended) if double else attended, double=double)
            else:
                stream.text = stream.inner = stream.mlp = stream.temb = None
            negatives.append((TextKeys(keys.k, keys.v, stream.bias), stream.context.weight))
        return negatives

    def _guide(
        self, q: Tensor, positive: TextKeys, negatives: Sequence[tuple[TextKeys, float]], image: TextKeys
    ) -> Tensor:
        state = self.state
        method = state.methods[self.layer]
        if method is None or not state.acts(self.layer):
            return state.attend(q, join_keys(positive, image))  # type: ignore[no-any-return]
        keys = [(expand_keys(negative, q.shape[0]), weight) for negative, weight in negatives]
        guided = self.run.formula(method, q, positive, keys, image, state.attend)
        state.meter.add(guided)
        return guided.z


def project(attn: FluxAttention, x: Tensor, rotary: Rotary | None, *, added: bool = False) -> tuple[Tensor, TextKeys]:
    """Queries and keys of a stream after QK-norm and rotation, (B, tokens, H, D); ``added``: by the text's weights."""
    norm_q, norm_k = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
    if attn.fused_projections:
        q, k, v = (attn.to_added_qkv if added else attn.to_qkv)(x).chunk(3, dim=-1)
    else:
        own = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if added else (attn.to_q, attn.to_k, attn.to_v)
        q, k, v = (projection(x) for projection in own)
    q, k, v = (part.unflatten(-1, (-1, attn.head_dim)) for part in (q, k, v))
    q, k = norm_q(q), norm_k(k)
    if rotary is not None:
        q, k = (apply_rotary_emb(part, rotary, sequence_dim=1) for part in (q, k))
    return q, TextKeys(k, v)


@register_backbone
class FluxBackbone(Backbone):
    """A FLUX transformer; ``formula`` is what guidance means in its joint attention."""

    joint = True

    def __init__(
        self,
        model: nn.Module,
        guidance: AttentionGuidance,
        attend: Attend,
        meter: EffectMeter,
        formula: JointFormula | None = None,
    ) -> None:
        super().__init__(model, guidance, attend, meter)
        formula = default_joint(guidance) if formula is None else formula
        formula.check(guidance)
        self.run = FluxRun(self.state, formula)

    @classmethod
    def fits(cls, model: nn.Module) -> bool:
        """By class: other joint models norm and modulate their text otherwise."""
        return isinstance(model, FluxTransformer2DModel)

    @property
    def blocks(self) -> list[Any]:
        """Double blocks, then single ones."""
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]

    def find_layers(self) -> list[Any]:
        return [block.attn for block in self.blocks]

    def replaces(self, layer: Any) -> bool:
        return isinstance(layer.processor, FluxAttnProcessor)

    def make_processor(self, layer: int, before: Any) -> GuidedJointAttention:
        return GuidedJointAttention(layer, self.blocks[layer], self.run, before)

    def keys_of(self, negative: NegativeContext) -> PromptKeys:
        """None beforehand: they differ from step to step."""
        return PromptKeys(())

    def as_context(self, embeds: Tensor, second: Any, mask: Tensor) -> NegativeContext:
        return NegativeContext(embeds, mask, second)

    def use(self, negatives: Sequence[NegativeContext], *, lora_scale: float | None = None) -> None:
        """Take the negatives; their streams depend on the image and are made in every call of the model."""
        if any(negative.pooled is None for negative in negatives):
            raise InputError("FLUX needs the pooled embedding of a negative too: NegativeContext(embeds, pooled=...)")
        active = negatives if self.guidance.active else ()
        padding = self.guidance.negative_padding
        self.run.streams = [TextStream(negative, None if padding else negative.bias()) for negative in active]
        super().use(active)

    @contextmanager
    def install(self) -> Iterator[None]:
        """Guide the model's joint attention inside the scope; what was there comes back, also after an error."""
        with ExitStack() as stack:
            stack.callback(self.run.streams.clear)
            stack.callback(self.model.time_text_embed.register_forward_hook(self.run.embed_time).remove)
            stack.callback(self.model.context_embedder.register_forward_hook(self.run.embed_text).remove)
            with super().install():
                yield
