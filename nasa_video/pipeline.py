"""Prompt to frames: encode, denoise chunk by chunk under guidance, decode as the latents come."""

# B batch, T latent frames, F pictures, H W picture height and width

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from causvid_adapter.lora import merge_lora
from causvid_adapter.vae_checkpoint import load_vae
from diffusers import AutoencoderKLWan
from torch import Tensor

from causvid_adapter import (
    CausalWan,
    ChunkSampler,
    FlowMatchSchedule,
    ModelCall,
    SeededNoise,
    StreamingDecoder,
    StreamingEncoder,
    denormalize,
    load_generator,
    normalize,
)
from nasa_video import memory
from nasa_video.attention import Backend, make_attend
from nasa_video.backbones import wan
from nasa_video.classifier_free import ClassifierFreeDenoiser
from nasa_video.embedding_cache import CachedEncoder, identity_of
from nasa_video.errors import InputError
from nasa_video.guidance import GUIDANCE, AttentionGuidance, ClassifierFree, Guidance, Negative
from nasa_video.models import Source, Umt5Text, VideoPreset, WordLlamaText, find_preset
from nasa_video.steering import Effect, PromptKeys, Steering, check_negative
from nasa_video.text import TextContext, TextEncoder, Umt5Encoder, WordLlamaEncoder
from nasa_video.timeline import Cue, CueOf, Negatives, as_negatives
from nasa_video.video.frames import frames_from_tensor, tensor_from_frames

# Below this relative change two branches are the same numbers: guidance runs, and does nothing.
NO_EFFECT = 1e-6
# Decoders overshoot a little on any clean picture; only more than this counts as out of range.
RANGE_MARGIN = 0.05


class PromptWarning(UserWarning):
    """A prompt was changed before it was used, or has parts that the model cannot know."""


@dataclass(frozen=True)
class Chunk:
    """Finished frames of one chunk.

    Attributes:
        index: from 0.
        frames: (F, H, W, 3) uint8 RGB; (B, F, H, W, 3) from ``stream_batch``.
        latents: (B, T, C, h, w), normalised.
        cue: what it was made for.
        effect: what guidance did since the video's start; None while nothing was guided.
        own_effect: what it did since the chunk before was finished; None where nothing was guided.
        out_of_range: share of colour values that the decoder put beyond black or white by more than 5 %, one a sample.
    """

    index: int
    frames: np.ndarray[Any, np.dtype[np.uint8]]
    latents: Tensor
    cue: Cue
    effect: Effect | None
    out_of_range: list[float]
    own_effect: Effect | None = None


class VideoPipeline:
    """A causal video model with everything that it needs to run.

    Args:
        model: the generator.
        vae: its decoder; latents are in the scale of ``vae.config``.
        text_encoder: its text encoder.
        preset: its loop and sizes.
        attention: kernel of the text cross-attention.
        fold_padding: compute text attention over the real tokens and one padding token (exact, faster); False
            computes all of them, as the public code does.
    """

    def __init__(
        self,
        model: CausalWan,
        vae: AutoencoderKLWan,
        text_encoder: TextEncoder,
        preset: VideoPreset,
        attention: Backend = "sdpa",
        fold_padding: bool = True,
    ) -> None:
        self.model = model
        self.vae = vae
        self.text_encoder = text_encoder
        self.preset = preset
        self.fold_padding = fold_padding
        self.attend = make_attend(attention)

    @classmethod
    def from_pretrained(
        cls,
        model: str = "sprites",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        attention: Backend = "sdpa",
        fold_padding: bool = True,
        loras: Sequence[tuple[Path, float]] = (),
    ) -> VideoPipeline:
        """Load a preset, a preset file, a folder or a hub id.

        Args:
            device: None takes CUDA where there is one.
            dtype: None takes bfloat16 on CUDA and float32 elsewhere.
            loras: LoRA files and their scales, merged in this order.

        Raises:
            InputError: no such model, or a part of it is missing and cannot be had.
            CheckpointError: its weights are broken or of another model.
        """
        preset = find_preset(model)
        device = choose_device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        parts = preset.components
        generator = load_generator(parts.transformer.fetch(), parts.config, dtype=dtype, device=device)
        for path, scale in (*((lora.fetch(), lora.scale) for lora in parts.loras), *loras):
            merge_lora(generator, path, scale)
        vae = load_vae(parts.vae.fetch())
        encoder = load_text_encoder(parts.text_encoder, device, dtype)
        return cls(generator, vae.to(device), encoder, preset, attention, fold_padding)

    def stream(
        self,
        prompt: str,
        *,
        negative: Negatives = None,
        guidance: Guidance | None = None,
        seed: int = 0,
        frames: int | None = None,
        endless: bool = False,
        steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
        cues: CueOf | None = None,
        recompute_window: bool = False,
        prefix: Tensor | None = None,
        source: Tensor | None = None,
        strength: float = 1.0,
    ) -> Iterator[Chunk]:
        """Make one video, yielding frames as they are made.

        Args:
            negative: what must not be there; a text, a Negative, or several.
            guidance: the method; None takes the preset's NASA when there is a negative.
            seed: the noise follows from it alone.
            frames: length; None takes the preset's. See :meth:`check_frames`.
            endless: go on until the caller stops.
            steps: denoising steps a chunk; None takes the preset's.
            width, height: in pixels; None takes the preset's.
            cues: what each chunk shows, instead of prompt, negative and guidance (see Timeline.cues).
            recompute_window: when the prompt or the negatives change, make the window's keys again under the new
                ones; a cue may say otherwise for its chunk.
            prefix: latents (1, T0, C, h, w) of a video to continue (see :meth:`encode_frames`); only what comes after
                them is yielded, chunk indices count them, and ``frames`` is the length of prefix and new frames.
            source: latents (1, T, C, h, w) of a video to redraw, one for every frame.
            strength: how much of it is redrawn, above 0 to 1: that share of the steps is run.

        Raises:
            InputError: anything above that cannot be used; before the first chunk is made.
        """
        cue = Cue.of(prompt, negative, guidance or (self.guidance() if as_negatives(negative) else None))
        chunks = self._plan(
            cues or (lambda index: cue), [seed], frames, endless, steps, width, height, recompute_window,
            start=_Start(prefix, source, strength),
        )  # fmt: skip
        return (dataclasses.replace(chunk, frames=chunk.frames[0]) for chunk in chunks)

    def stream_batch(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        negatives: Sequence[Negatives] | None = None,
        guidance: Guidance | None = None,
        frames: int | None = None,
        steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> Iterator[Chunk]:
        """Make a batch of videos at once, each equal to the one made alone with its prompt, negatives and seed."""
        if len(seeds) != len(prompts):
            raise InputError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        lists = tuple(as_negatives(n) for n in negatives) if negatives is not None else ((),) * len(prompts)
        cue = Cue(tuple(prompts), lists, guidance or (self.guidance() if any(lists) else None))
        return self._plan(lambda index: cue, seeds, frames, False, steps, width, height, False)

    def guidance(self, method: str = "nasa", scale: float | None = None) -> Guidance:
        """A method with this model's settings, and another scale where one is given.

        Raises:
            InputError: no such method, or a scale that it cannot take.
        """
        if method not in GUIDANCE:
            raise InputError(f"guidance must be one of {', '.join(GUIDANCE)} or none, got {method!r}")
        settings: dict[str, Any] = dict(self.preset.guidance.get(method, {}))  # type: ignore[call-overload]
        if scale is not None:
            settings["scale"] = scale
        return GUIDANCE[method](**settings)

    def guide(self, current: Guidance | None, method: str | None, scale: float | None) -> Guidance | None:
        """The guidance after a change: a method by name or "none", or the current one with another scale.

        Raises:
            InputError: as :meth:`guidance`.
        """
        if method is not None:
            return None if method == "none" else self.guidance(method, scale)
        if current is None or scale is None:
            return current if scale is None else self.guidance(scale=scale)
        return dataclasses.replace(current, scale=scale)

    def check_frames(self, frames: int | None) -> int:
        """Latent frames of a video of ``frames`` pictures.

        Raises:
            InputError: the chunking does not allow it; the message names the nearest two that it does.
        """
        frames = self.preset.video.frames if frames is None else frames
        stride = self.vae.config.scale_factor_temporal
        chunk = stride * self.preset.sampler.frames_per_chunk
        first = chunk - stride + 1
        if frames < first or (frames - first) % chunk:
            below = first + max(0, frames - first) // chunk * chunk
            near = f"{first} or {first + chunk}" if frames < first else f"{below} or {below + chunk}"
            raise InputError(f"frames must be {first} + {chunk}k for this model, got {frames}; use {near}")
        return (frames - 1) // stride + 1

    def check_size(self, width: int | None, height: int | None) -> tuple[int, int]:
        """Latent width and height of a picture.

        Raises:
            InputError: patch and VAE do not allow it; the message names the nearest sizes.
        """
        video = self.preset.video
        sizes = (video.width if width is None else width, video.height if height is None else height)
        stride = self.vae.config.scale_factor_spatial
        _, patch_height, patch_width = self.model.transformer.config.patch_size
        for name, size, unit in (
            ("width", sizes[0], stride * patch_width),
            ("height", sizes[1], stride * patch_height),
        ):
            if size <= 0 or size % unit:
                below = max(unit, size // unit * unit)
                raise InputError(
                    f"{name} must be a multiple of {unit} for this model, got {size}; use {below} or {below + unit}"
                )
        return sizes[0] // stride, sizes[1] // stride

    def encode_frames(self, frames: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
        """Latents (1, T, C, h, w) of a video (F, H, W, 3), in the transformer's scale.

        Raises:
            InputError: a length or size that the model does not allow.
        """
        self.check_frames(len(frames))
        self.check_size(frames.shape[2], frames.shape[1])
        encoder = StreamingEncoder(self.vae)
        stride = self.vae.config.scale_factor_temporal
        pictures = tensor_from_frames(frames).unsqueeze(0).to(self.model.device)
        # Some frames at a time: a long clip's activations need not fit at once.
        bounds = [0, *range(1 + 2 * stride, len(frames), 2 * stride), len(frames)]
        parts = [encoder.encode(pictures[:, a:b]) for a, b in itertools.pairwise(bounds)]
        return normalize(self.vae, torch.cat(parts, dim=1)).float()

    def frames_until(self, chunk: int) -> int:
        """Pictures shown before a chunk starts."""
        stride = self.vae.config.scale_factor_temporal
        return max(0, chunk * stride * self.preset.sampler.frames_per_chunk - (stride - 1))

    def _plan(
        self,
        cue_of: CueOf,
        seeds: Sequence[int],
        frames: int | None,
        endless: bool,
        steps: int | None,
        width: int | None,
        height: int | None,
        recompute_window: bool,
        start: _Start | None = None,
    ) -> Iterator[Chunk]:
        """Check everything and encode the first cue now; the returned iterator only generates."""
        latent_frames = None if endless else self.check_frames(frames)
        latent_width, latent_height = self.check_size(width, height)
        settings = self.preset.sampler
        num_steps = settings.default_steps if steps is None else steps
        channels = self.model.transformer.config.in_channels
        start = start or _Start()
        offset = 0 if start.prefix is None else start.prefix.shape[1]
        first_step = start.first_step(num_steps)
        start.check(offset, latent_frames, settings.frames_per_chunk, (channels, latent_height, latent_width))
        self._check_memory(cue_of(0), len(seeds), latent_frames, latent_width, latent_height)
        director = _Director(self, cue_of, recompute_window)
        sampler = ChunkSampler(
            director.denoiser,
            FlowMatchSchedule(settings.shift, settings.timesteps(num_steps), settings.warp),
            settings.frames_per_chunk,
            settings.window_frames,
            settings.sink_frames,
            settings.rope,
        )
        latents = sampler.stream(
            None,
            SeededNoise(seeds, (channels, latent_height, latent_width), self.model.device),
            num_frames=None if latent_frames is None else latent_frames - offset,
            prefix=start.prefix,
            source=start.source,
            first_step=first_step,
            before_call=director.before_call,
            recompute=director.recompute,
        )
        return self._generate(latents, director, start.prefix)

    def _check_memory(self, cue: Cue, batch: int, latent_frames: int | None, width: int, height: int) -> None:
        """Refuse what cannot fit on the device (latent width and height)."""
        prompts = 1 + max(len(negatives) for negatives in cue.negatives)
        stride = self.vae.config.scale_factor_spatial
        run = memory.Run(
            self.model.transformer.config,
            self.vae.config,
            self.preset.sampler,
            width * stride,
            height * stride,
            latent_frames,
            dtype=self.model.dtype,
            vae_dtype=self.vae.dtype,
            caches=2 if isinstance(cue.guidance, ClassifierFree) else 1,
            text_tokens=prompts * (self.text_encoder.max_tokens + 1),
            batch=batch,
            num_layers=self.model.num_layers,
        )
        memory.require(run, memory.available(self.model.device), str(self.model.device), loaded=True)

    def _generate(self, latents: Iterator[Tensor], director: _Director, prefix: Tensor | None) -> Iterator[Chunk]:
        decoder = StreamingDecoder(self.vae)
        first = 0
        if prefix is not None:
            # The decoder must have seen the given frames: its convolutions look back on them.
            decoder.decode(denormalize(self.vae, prefix))
            first = prefix.shape[1] // self.preset.sampler.frames_per_chunk
        for index in count(first):
            # Installed around the model's calls and not around the yield: between two chunks, and when a caller
            # drops the stream, the model is as it was found.
            with wan.install(self.model.transformer, director.steering):
                x = next(latents, None)
            if x is None:
                return
            pictures = decoder.decode(denormalize(self.vae, x), clamp=False)
            out_of_range = (pictures.abs() > 1 + RANGE_MARGIN).float().mean(dim=(1, 2, 3, 4))
            cue, effect = director.cue_of(index), director.steering.meter.effect
            if cue.guided:
                require_effect(effect, cue)
            frames = np.stack([frames_from_tensor(sample) for sample in pictures])
            yield Chunk(index, frames, x, cue, effect, out_of_range.tolist(), director.steering.meter.lap())


@dataclass(frozen=True)
class _Start:
    """What a video starts from, beside noise."""

    prefix: Tensor | None = None
    source: Tensor | None = None
    strength: float = 1.0

    def first_step(self, num_steps: int) -> int:
        """The step at which a redrawn video enters the loop."""
        if not 0 < self.strength <= 1:
            raise InputError(f"strength must be above 0 and at most 1, got {self.strength}")
        if self.source is None:
            return 0
        return num_steps - max(1, round(self.strength * num_steps))

    def check(self, offset: int, latent_frames: int | None, per_chunk: int, shape: tuple[int, int, int]) -> None:
        """Raise InputError where the given latents do not fit the video."""
        for name, given in (("prefix", self.prefix), ("source", self.source)):
            if given is not None and tuple(given.shape[2:]) != shape:
                raise InputError(f"the {name} must have latents of {shape}, got {tuple(given.shape[2:])}")
        if offset % per_chunk:
            raise InputError(f"the prefix must be whole chunks of {per_chunk} latent frames, got {offset}")
        if latent_frames is not None and latent_frames <= offset:
            raise InputError(
                f"a video of {latent_frames} latent frames leaves nothing to make behind {offset} given ones"
            )
        if self.source is not None and (latent_frames is None or self.source.shape[1] < latent_frames):
            raise InputError("the source must have latents for every frame of the video")


class _Director:
    """Sets the stage before every model call: the prompts' keys, the method, the position in the loop."""

    def __init__(self, pipeline: VideoPipeline, cue_of: CueOf, recompute_window: bool) -> None:
        self.pipeline = pipeline
        self.cue_of = cue_of
        self.recompute_window = recompute_window
        self.steering = Steering(pipeline.attend, pipeline.model.num_layers)
        first = cue_of(0)
        self.branched: ClassifierFreeDenoiser | None = None
        if isinstance(first.guidance, ClassifierFree):
            self.branched = ClassifierFreeDenoiser(pipeline.model, self.steering)
        self._current: Cue | None = None
        self._encoded: dict[tuple[tuple[str, ...], bool], _EncodedPrompts] = {}
        self._stage(first)

    @property
    def denoiser(self) -> Any:
        """What the sampler calls."""
        return self.branched or self.pipeline.model

    def before_call(self, call: ModelCall) -> None:
        """Called by the sampler before it calls the model."""
        self._stage(self.cue_of(call.chunk))
        self.steering.call = call

    def recompute(self, chunk: int) -> bool:
        """Whether a chunk needs the window's keys anew: its prompt or acting negatives are new."""
        now, before = self.cue_of(chunk), self.cue_of(chunk - 1)
        wanted = self.recompute_window if now.recompute is None else now.recompute
        return wanted and _acting_texts(now) != _acting_texts(before)

    def _stage(self, cue: Cue) -> None:
        if cue == self._current:
            return
        if cue.guidance is not None and isinstance(cue.guidance, ClassifierFree) != (self.branched is not None):
            raise InputError("a video cannot change between classifier-free and attention guidance while it runs")
        before, self._encoded = self._encoded, {}

        def keys(texts: tuple[str, ...], padding: bool = True, *, negative: bool = False) -> PromptKeys:
            # Only what the cue uses is kept: a live session may be given prompts for hours.
            name = (texts, padding)
            made = self._encoded[name] = self._encoded.get(name) or before.get(name) or self._encode(*name)
            if negative:
                for text, length in zip(texts, made.lengths, strict=True):
                    check_negative(text, length, cue.prompts)
            return made.keys

        guidance = cue.guidance if cue.guided else None
        if self.branched is not None:
            self.branched.positive = keys(cue.prompts)
            self.branched.negative = keys(tuple(_joined(n) for n in cue.negatives), negative=guidance is not None)
            self.branched.guidance = guidance if isinstance(guidance, ClassifierFree) else None
        else:
            self.steering.positive = keys(cue.prompts)
            self.steering.guidance = guidance if isinstance(guidance, AttentionGuidance) else None
            branches = list(zip(*cue.negatives, strict=True)) if guidance is not None else []
            padding = self.steering.guidance is None or self.steering.guidance.negative_padding
            self.steering.negatives = [
                (keys(tuple(n.text for n in branch), padding, negative=True), branch[0].weight) for branch in branches
            ]
        self._current = cue

    def _encode(self, texts: tuple[str, ...], padding: bool) -> _EncodedPrompts:
        context = encode(self.pipeline.text_encoder, texts)
        transformer = self.pipeline.model.transformer
        keys = wan.prompt_keys(transformer, context, fold=self.pipeline.fold_padding, padding=padding)
        return _EncodedPrompts(keys, tuple(context.lengths.tolist()))


def _acting_texts(cue: Cue) -> tuple[Any, ...]:
    return cue.prompts, cue.negatives if cue.guided else None


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


def require_effect(effect: Effect | None, cue: Cue) -> None:
    """Refuse to go on with a guidance that does nothing.

    Raises:
        InputError: the guided layers gave what the unguided ones give.
    """
    if effect is None or effect.relative_change < NO_EFFECT:
        texts = ", ".join(repr(negative.text) for negative in cue.negatives[0])
        raise InputError(
            f"the negative prompt {texts} changed nothing: no layer and step is inside the guidance's schedule, or the "
            "scale is too small; widen the schedule, raise the scale, or leave the negative out"
        )


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device by name; None takes CUDA where there is one.

    Raises:
        InputError: there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        available = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used ({reason}); available: {available}") from error
    return chosen


def load_text_encoder(settings: WordLlamaText | Umt5Text, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """The text encoder of a preset, on its device."""
    if isinstance(settings, WordLlamaText):
        return WordLlamaEncoder(settings.max_tokens)
    folder = settings.fetch()
    in_repository = settings.tokenizer
    tokenizer_path = in_repository[0].fetch() if in_repository else folder.parent / settings.tokenizer_folder

    def load() -> TextEncoder:
        return Umt5Encoder(folder, tokenizer_path, settings.max_tokens, device, dtype)

    return CachedEncoder(load, identity_of(folder, dtype), settings.max_tokens)
