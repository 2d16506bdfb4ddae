"""The text streams of FLUX's negatives: each runs beside the positive one, through the blocks' own modules."""

# B batch, L text tokens, C channels, E text dim, P pooled dim

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, cat, float16, nn

from nasa_video.backbones.base import NegativeContext, ScopedState, expand_rows
from nasa_video.backbones.joint import JointFormula


@dataclass
class TextStream:
    """One negative prompt on its way through the blocks.

    Attributes:
        temb: (B, C), timestep and pooled embedding.
        text: (B, L, C), as it enters the running block.
        inner: (B, L, C), after the block's norm: what its attention sees.
        modulation: gates and shifts of the block for this stream.
        mlp: (B, L, 4 C), the single block's parallel branch.
    """

    context: NegativeContext
    bias: Tensor | None
    temb: Tensor | None = None
    text: Tensor | None = None
    inner: Tensor | None = None
    modulation: tuple[Tensor, ...] = ()
    mlp: Tensor | None = None


@dataclass
class FluxRun:
    """What the hooks and processors of one transformer share; ``text_tokens`` is the positive prompt's length."""

    state: ScopedState
    formula: JointFormula
    streams: list[TextStream] = field(default_factory=list)
    text_tokens: int = 0

    @property
    def last_layer(self) -> int:
        """The last layer that is guided in the running call; -1 when none is."""
        layers = range(self.state.num_layers - 1, -1, -1)
        return next((layer for layer in layers if self.streams and self.state.acts(layer)), -1)

    def embed_time(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Hook of the timestep embedding: the same for each negative, with its own pooled embedding."""
        if self.last_layer < 0:
            return
        *times, pooled = args
        for stream in self.streams:
            assert stream.context.pooled is not None
            own = expand_rows(stream.context.pooled.to(pooled), pooled.shape[0])
            stream.temb = module.forward(*times, own)

    def embed_text(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Hook of the text embedding: starts each negative's stream, and notes how long the positive one is."""
        if self.last_layer < 0:
            return
        self.text_tokens = args[0].shape[1]
        for stream in self.streams:
            embeds = expand_rows(stream.context.embeds.to(args[0]), args[0].shape[0])
            stream.text = module.forward(embeds)


def enter_block(block: Any, stream: TextStream, *, double: bool) -> None:
    """The block's norm of the stream (and a single block's MLP), before its attention."""
    if double:
        stream.inner, *modulation = block.norm1_context(stream.text, emb=stream.temb)
        stream.modulation = tuple(modulation)
    else:
        stream.inner, gate = block.norm(stream.text, emb=stream.temb)
        stream.modulation = (gate,)
        stream.mlp = block.act_mlp(block.proj_mlp(stream.inner))


def leave_block(block: Any, stream: TextStream, attended: Tensor, *, double: bool) -> None:
    """The rest of the block; ``attended`` is the stream's attention (B, L, C), after to_add_out in a double block."""
    assert stream.text is not None
    gate = stream.modulation[0].unsqueeze(1)
    if double:
        _, shift_mlp, scale_mlp, gate_mlp = (x.unsqueeze(1) for x in stream.modulation)
        text = stream.text + gate * attended
        inner = block.norm2_context(text) * (1 + scale_mlp) + shift_mlp
        stream.text = text + gate_mlp * block.ff_context(inner)
    else:
        assert stream.mlp is not None
        stream.text = stream.text + gate * block.proj_out(cat([attended, stream.mlp], dim=2))
    if stream.text.dtype == float16:
        stream.text = stream.text.clip(-65504, 65504)
