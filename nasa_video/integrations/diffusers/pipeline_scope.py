"""Follows a classic diffusers pipeline from outside: encodes the negatives as it encodes its prompt, tells its passes.

Only instance attributes are set, inside a scope that removes them: ``pipe.encode_prompt`` (when a run begins, and with
what settings) and ``denoiser.cache_context`` (which of two classifier-free passes comes).
"""

# B batch, L text tokens

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from causvid_adapter import ModelCall
from nasa_video.backbones.base import Backbone, NegativeContext
from nasa_video.errors import InputError
from nasa_video.guidance.state import check_negative
from nasa_video.guidance.terms import Negative

_COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")


def unwrap(model: nn.Module) -> Any:
    """A model without torch.compile's wrapper."""
    return getattr(model, "_orig_mod", model)


class PipelineScope:
    """One ``with guided(pipe, …)``.

    Classifier-free guidance of a pipeline is either one call of the model with a batch [unconditional; conditional], or
    two calls that it names by ``cache_context`` (FLUX, Wan); a pipeline that does it otherwise is refused.

    Args:
        pipe: the pipeline.
        denoisers: its guided models by component name, as it holds them (compiled or not).
        backbones: theirs, in the same order.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        denoisers: dict[str, nn.Module],
        backbones: Sequence[Backbone],
        negatives: Sequence[Negative | NegativeContext],
    ) -> None:
        self.pipe = pipe
        self.denoisers = denoisers
        self.backbones = backbones
        self.negatives = negatives
        self._encode: Callable[..., Any] = pipe.encode_prompt
        self._signature = inspect.signature(pipe.encode_prompt)
        self._names_passes = "cache_context" in inspect.unwrap(type(pipe).__call__).__code__.co_names
        self._prompt_read = self._doubled = False
        self._settings: dict[str, Any] | None = None
        self._step = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Follow the pipeline inside the scope."""
        with ExitStack() as stack:
            stack.enter_context(_attribute(self.pipe, "encode_prompt", self._encode_prompt))
            for denoiser in self.denoisers.values():
                model = unwrap(denoiser)
                if self._names_passes and hasattr(model, "cache_context"):
                    stack.enter_context(_attribute(model, "cache_context", self._passes(model.cache_context)))
                stack.callback(denoiser.register_forward_pre_hook(self._before_call, with_kwargs=True).remove)
            for backbone in self.backbones:
                stack.enter_context(backbone.install())
            yield

    def _encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own, and the negatives behind it."""
        result = self._encode(*args, **kwargs)
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        settings = dict(bound.arguments)
        second = self.backbones[0].joint and self._prompt_read  # FLUX encodes the negative of its true CFG by itself
        if second and not self._names_passes:
            raise self._two_passes()
        if not second:
            self._doubled = bool(settings.get("do_classifier_free_guidance", False)) and not self._names_passes
            self._begin(settings)
        return result

    def _begin(self, settings: dict[str, Any]) -> None:
        self._prompt_read = True
        self._step = 0
        prompt, embeds = settings.get("prompt"), settings.get("prompt_embeds")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        samples = len(prompts) or (1 if embeds is None else len(embeds))
        for name in _COUNTS:
            samples *= settings.get(name) or 1
        for backbone in self.backbones:
            backbone.state.samples = samples
        own = {name: value for name, value in settings.items() if not _is_prompt(name)}
        extra = getattr(self.pipe, "_attention_kwargs", None) or {}  # Wan does not tell encode_prompt
        own["lora_scale"] = settings.get("lora_scale", extra.get("scale"))
        own["adapters"] = [backbone.adapters for backbone in self.backbones]
        texts = [negative for negative in self.negatives if isinstance(negative, Negative)]
        if texts and getattr(self.pipe, self._tokenizer_name.replace("tokenizer", "text_encoder"), None) is None:
            raise InputError(
                f"this {type(self.pipe).__name__} has no text encoder any more, so that {texts[0].text!r} cannot be "
                "encoded: give it encoded, NegativeContext(embeds), as you gave the prompt"
            )
        for negative in texts:
            check_negative(negative.text, self._count_tokens(negative.text), prompts)
        if own == self._settings:
            return
        with torch.no_grad():
            contexts = [
                self._context(negative, settings) if isinstance(negative, Negative) else negative
                for negative in self.negatives
            ]
        for backbone in self.backbones:
            backbone.use(contexts, lora_scale=own["lora_scale"])
        self._settings = own

    def _context(self, negative: Negative, settings: dict[str, Any]) -> NegativeContext:
        """A negative, encoded with the settings that the prompt was encoded with."""
        arguments = {name: None if _is_prompt(name) else value for name, value in settings.items()}
        extra = arguments.pop("kwargs", None) or {}
        arguments |= {name: 1 for name in _COUNTS if name in arguments}
        if "do_classifier_free_guidance" in arguments:
            arguments["do_classifier_free_guidance"] = False
        embeds, second, *_ = self._encode(**{**arguments, "prompt": negative.text}, **extra)
        context = self.backbones[0].as_context(embeds, second, self._mask(negative.text, embeds))
        return replace(context, weight=negative.weight)

    @property
    def _tokenizer_name(self) -> str:
        """Of the text encoder whose tokens the image attends to."""
        names = ("tokenizer_2", "tokenizer") if "transformer" in self.denoisers else ("tokenizer", "tokenizer_2")
        return next((name for name in names if getattr(self.pipe, name, None) is not None), "tokenizer")

    @property
    def _tokenizer(self) -> Any:
        return getattr(self.pipe, self._tokenizer_name)

    def _count_tokens(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _mask(self, text: str, embeds: Tensor) -> Tensor:
        batch = self._tokenizer(
            text, padding="max_length", max_length=embeds.shape[1], truncation=True, return_tensors="pt"
        )
        return batch.attention_mask.bool().to(embeds.device)  # type: ignore[no-any-return]

    def _passes(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            self._set(muted=name == "uncond")
            try:
                with original(name, *args, **kwargs) as value:
                    yield value
            finally:
                self._set(muted=False)

        return cache_context

    def _before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each call of a model: is guidance on it, which rows are conditional, where in the few steps is it."""
        for backbone in self.backbones:
            backbone.check_installed()
        state = self.backbones[0].state
        if self._doubled:
            # A callback may switch classifier-free guidance off between steps; the first call is of both halves.
            rows = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).shape[0]
            if rows == state.samples and self._prompt_read:
                raise self._two_passes()
            self._set(doubled=rows != state.samples)
        else:
            self._set(doubled=False)
        self._prompt_read = False
        if state.muted or not self.backbones[0].guidance.schedule.over_steps:
            return
        total = getattr(self.pipe, "_num_timesteps", None) or len(self.pipe.scheduler.timesteps)
        self._set(call=ModelCall(chunk=0, step=min(self._step, total - 1), num_steps=total, clean=False))
        self._step += 1

    def _set(self, **values: Any) -> None:
        for backbone in self.backbones:
            for name, value in values.items():
                setattr(backbone.state, name, value)

    def _two_passes(self) -> InputError:
        return InputError(
            f"{type(self.pipe).__name__} runs classifier-free guidance in two passes that cannot be told apart; switch "
            "it off (guidance_scale=1, true_cfg_scale=1) to use guidance in attention"
        )


def _is_prompt(name: str) -> bool:
    """Whether an argument of encode_prompt carries prompts, their embeddings or their masks."""
    return name.removeprefix("negative_") in ("prompt", "prompt_2", "prompt_3") or "embeds" in name or "mask" in name


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an instance attribute that hides the class's own; whatever was there before comes back."""
    had = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
