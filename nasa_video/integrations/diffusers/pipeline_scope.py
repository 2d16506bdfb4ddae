"""Follows a classic diffusers pipeline from outside: encodes the negatives as it encodes its prompt, tells its passes.

Only instance attributes are set, inside a scope that removes them: ``pipe.encode_prompt`` (when a run begins, and with
what settings) and ``denoiser.cache_context`` (which of two classifier-free passes comes).
"""

# B batch, L text tokens

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, PixArtTransformer2DModel
from torch import Tensor, nn

from causvid_adapter import ModelCall
from nasa_video.backbones.scope import Backbone, NegativeContext
from nasa_video.errors import InputError
from nasa_video.guidance.schedule import ScaleSchedule
from nasa_video.guidance.state import check_negative
from nasa_video.guidance.terms import Negative

_ONE = ("num_images_per_prompt", "num_videos_per_prompt")


class PipelineScope:
    """One ``with guided(pipe, …)``.

    Args:
        pipe: the pipeline.
        denoisers: its guided models by component name, as it holds them (compiled or not).
        backbones: theirs, in the same order.
        two_passes: classifier-free guidance calls the model twice (FLUX, Wan) instead of with a doubled batch.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        denoisers: dict[str, nn.Module],
        backbones: Sequence[Backbone],
        negatives: Sequence[Negative | NegativeContext],
        schedule: ScaleSchedule,
        *,
        two_passes: bool,
    ) -> None:
        self.pipe = pipe
        self.denoisers = denoisers
        self.backbones = backbones
        self.negatives = negatives
        self.schedule = schedule
        self.two_passes = two_passes
        self._encode: Callable[..., Any] = pipe.encode_prompt
        self._signature = inspect.signature(pipe.encode_prompt)
        self._names_passes = "cache_context" in inspect.unwrap(type(pipe).__call__).__code__.co_names
        self._prompt_read = False
        self._settings: dict[str, Any] | None = None
        self._step = 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Follow the pipeline inside the scope."""
        with ExitStack() as stack:
            stack.enter_context(_attribute(self.pipe, "encode_prompt", self._encode_prompt))
            for denoiser in self.denoisers.values():
                if self.two_passes and hasattr(denoiser, "cache_context"):
                    model: Any = getattr(denoiser, "_orig_mod", denoiser)
                    stack.enter_context(_attribute(model, "cache_context", self._passes(model.cache_context)))
                if self.schedule.over_steps:
                    stack.callback(denoiser.register_forward_pre_hook(self._count_step).remove)
            for backbone in self.backbones:
                stack.enter_context(backbone.install())
            yield

    def _encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own, and the negatives behind it."""
        result = self._encode(*args, **kwargs)
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        settings = dict(bound.arguments)
        second = self.two_passes and self._prompt_read  # FLUX encodes the negative of its true CFG by itself
        doubled = bool(settings.get("do_classifier_free_guidance", False))
        if (second or doubled) and self.two_passes and not self._names_passes:
            raise InputError(
                f"{type(self.pipe).__name__} runs classifier-free guidance in two passes that cannot be told apart; "
                "switch it off (guidance_scale=1, true_cfg_scale=1) to use guidance in attention"
            )
        if not second:
            self._begin(settings, doubled and not self.two_passes)
        return result

    def _begin(self, settings: dict[str, Any], doubled: bool) -> None:
        self._prompt_read = True
        self._step = 0
        prompt = settings.get("prompt")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
        for backbone in self.backbones:
            backbone.steering.doubled = doubled
        own = {name: value for name, value in settings.items() if not _is_prompt(name)}
        extra = getattr(self.pipe, "_attention_kwargs", None) or {}  # Wan does not tell encode_prompt
        own["lora_scale"] = settings.get("lora_scale", extra.get("scale"))
        for negative in self.negatives:
            if isinstance(negative, Negative):
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
        arguments |= {name: 1 for name in _ONE if name in arguments}
        if "do_classifier_free_guidance" in arguments:
            arguments["do_classifier_free_guidance"] = False
        embeds, second, *_ = self._encode(**{**arguments, "prompt": negative.text}, **extra)
        denoiser = next(iter(self.denoisers.values()))
        denoiser = getattr(denoiser, "_orig_mod", denoiser)
        if isinstance(denoiser, PixArtTransformer2DModel):
            return NegativeContext(embeds, mask=second, weight=negative.weight)
        pooled = second if isinstance(denoiser, FluxTransformer2DModel) else None
        return NegativeContext(embeds, self._mask(negative.text, embeds), pooled, negative.weight)

    def _tokenizer(self) -> Any:
        """That of the text encoder whose tokens the image attends to."""
        names = ("tokenizer_2", "tokenizer") if "transformer" in self.denoisers else ("tokenizer", "tokenizer_2")
        return next(own for name in names if (own := getattr(self.pipe, name, None)) is not None)

    def _count_tokens(self, text: str) -> int:
        return len(self._tokenizer()(text, add_special_tokens=False).input_ids)

    def _mask(self, text: str, embeds: Tensor) -> Tensor:
        batch = self._tokenizer()(
            text, padding="max_length", max_length=embeds.shape[1], truncation=True, return_tensors="pt"
        )
        return batch.attention_mask.bool().to(embeds.device)  # type: ignore[no-any-return]

    def _passes(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            self._prompt_read = False
            for backbone in self.backbones:
                backbone.steering.muted = name == "uncond"
            try:
                with original(name, *args, **kwargs) as value:
                    yield value
            finally:
                for backbone in self.backbones:
                    backbone.steering.muted = False

        return cache_context

    def _count_step(self, module: nn.Module, args: Any) -> None:
        """Before each call of a model: where in the few steps it is."""
        if self.backbones[0].steering.muted:
            return
        total = getattr(self.pipe, "_num_timesteps", None) or len(self.pipe.scheduler.timesteps)
        call = ModelCall(chunk=0, step=min(self._step, total - 1), num_steps=total, clean=False)
        for backbone in self.backbones:
            backbone.steering.call = call
        self._step += 1


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
