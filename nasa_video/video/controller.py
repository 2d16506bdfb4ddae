"""Applies the prompt states: the prompts' keys, the method, the position in the loop, before each model call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from causvid_adapter import CausalWan, ModelCall, OnChange
from nasa_video.backbones import wan
from nasa_video.errors import InputError
from nasa_video.guidance.attention import Attend
from nasa_video.guidance.methods import AttentionGuidance, ClassifierFree
from nasa_video.guidance.state import Effect, GuidanceState, PromptKeys, check_negative
from nasa_video.guidance.terms import Negative
from nasa_video.text import TextContext, TextEncoder
from nasa_video.video.classifier_free import ClassifierFreeDenoiser
from nasa_video.video.request import PromptState, PromptStateOf
from nasa_video.video.request import PromptWarning as PromptWarning

# Below this relative change two branches are the same numbers: guidance runs, and does nothing.
NO_EFFECT = 1e-6


class GuidanceController:
    """Sets, before every model call, the prompts' keys, the method and the position in the loop."""

    def __init__(
        self,
        model: CausalWan,
        text_encoder: TextEncoder,
        attend: Attend,
        fold_padding: bool,
        state_of: PromptStateOf,
        on_change: OnChange,
    ) -> None:
        self.model = model
        self.text_encoder = text_encoder
        self.fold_padding = fold_padding
        self.state_of = state_of
        self._on_change = on_change
        self.steering = GuidanceState(attend, model.num_layers)
        if model.static_cache:
            self.steering.meter.prepare(model.device)
        first = state_of(0)
        self.branched: ClassifierFreeDenoiser | None = None
        if isinstance(first.guidance, ClassifierFree):
            self.branched = ClassifierFreeDenoiser(model, self.steering)
        self._current: PromptState | None = None
        self._encoded: dict[tuple[tuple[str, ...], bool], _EncodedPrompts] = {}
        self._apply(first)

    @property
    def denoiser(self) -> Any:
        """What the sampler calls."""
        return self.branched or self.model

    def before_call(self, call: ModelCall) -> None:
        """Called by the sampler before it calls the model."""
        self._apply(self.state_of(call.chunk))
        self.steering.call = call

    def shows_new(self, chunk: int) -> bool:
        """Whether prompt, negatives or guidance act otherwise than in the chunk before; not for the first."""
        return _acting(self.state_of(chunk)) != _acting(self.state_of(chunk - 1))

    def on_change(self, chunk: int) -> OnChange:
        """What becomes of the window before a chunk; it stays where the chunk shows nothing new."""
        if not self.shows_new(chunk):
            return "keep"
        wanted = self.state_of(chunk).on_change
        return self._on_change if wanted is None else wanted

    def _apply(self, state: PromptState) -> None:
        if state == self._current:
            return
        if state.guidance is not None and isinstance(state.guidance, ClassifierFree) != (self.branched is not None):
            raise InputError("a video cannot change between classifier-free and attention guidance while it runs")
        before, self._encoded = self._encoded, {}

        def keys(texts: tuple[str, ...], padding: bool = True, *, negative: bool = False) -> PromptKeys:
            # Only what the state uses is kept: a live session may be given prompts for hours.
            name = (texts, padding)
            made = self._encoded[name] = self._encoded.get(name) or before.get(name) or self._encode(*name)
            if negative:
                for text, length in zip(texts, made.lengths, strict=True):
                    check_negative(text, length, state.prompts)
            return made.keys

        guidance = state.guidance if state.guided else None
        if self.branched is not None:
            self.branched.positive = keys(state.prompts)
            self.branched.negative = keys(tuple(_joined(n) for n in state.negatives), negative=guidance is not None)
            self.branched.guidance = guidance if isinstance(guidance, ClassifierFree) else None
        else:
            self.steering.positive = keys(state.prompts)
            self.steering.guidance = guidance if isinstance(guidance, AttentionGuidance) else None
            branches = list(zip(*state.negatives, strict=True)) if guidance is not None else []
            padding = self.steering.guidance is None or self.steering.guidance.negative_padding
            self.steering.negatives = [
                (keys(tuple(n.text for n in branch), padding, negative=True), branch[0].weight) for branch in branches
            ]
        self._current = state

    def _encode(self, texts: tuple[str, ...], padding: bool) -> _EncodedPrompts:
        context = encode(self.text_encoder, texts)
        transformer = self.model.transformer
        keys = wan.prompt_keys(transformer, context, fold=self.fold_padding, padding=padding)
        return _EncodedPrompts(keys, tuple(context.lengths.tolist()))


def _acting(state: PromptState) -> tuple[Any, ...]:
    return state.prompts, (state.negatives, state.guidance) if state.guided else None


@dataclass(frozen=True)
class _EncodedPrompts:
    keys: PromptKeys
    lengths: tuple[int, ...]


def _joined(negatives: Sequence[Negative]) -> str:
    """The negatives as the one prompt that classifier-free guidance can take."""
    if any(negative.weight != 1.0 for negative in negatives):
        raise InputError(
            "classifier-free guidance has one negative branch and takes no weights; use nasa, or leave them out"
        )
    return ", ".join(negative.text for negative in negatives)


def encode(encoder: TextEncoder, texts: Sequence[str]) -> TextContext:
    """Encode, and warn of what did not fit."""
    context = encoder(texts)
    for cut in context.cut:
        if cut:
            shown = cut if len(cut) <= 80 else f"{cut[:77]}..."
            warnings.warn(
                f"the prompt is longer than the {encoder.max_tokens} tokens that the text encoder takes; "
                f"these {len(cut)} characters were cut: {shown!r}",
                PromptWarning,
                stacklevel=2,
            )
    return context


def require_effect(effect: Effect | None, state: PromptState) -> None:
    """Refuse to go on with a guidance that does nothing.

    Raises:
        InputError: the guided layers gave what the unguided ones give.
    """
    if effect is None or effect.relative_change < NO_EFFECT:
        texts = ", ".join(repr(negative.text) for negative in state.negatives[0])
        raise InputError(
            f"the negative prompt {texts} changed nothing: no layer and step is inside the guidance's schedule, or the "
            "scale is too small; widen the schedule, raise the scale, or leave the negative out"
        )
