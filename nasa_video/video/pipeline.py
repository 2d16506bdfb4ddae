"""Prompt to frames: encode, denoise chunk by chunk under guidance, decode as the latents come."""

# B batch, T latent frames, F pictures, H W picture height and width

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from causvid_adapter import (
    CausalWan,
    ChunkSampler,
    OnChange,
    SeededNoise,
    StreamingEncoder,
    compile_generator,
    load_generator,
    normalize,
)
from causvid_adapter.lora import merge_lora
from causvid_adapter.rollouts import overlap_latents
from causvid_adapter.vae_checkpoint import load_vae
from nasa_video.errors import InputError
from nasa_video.files.frames import tensor_from_frames
from nasa_video.guidance.attention import Backend, make_attend
from nasa_video.guidance.methods import METHODS, ClassifierFree, Guidance, parse_guidance
from nasa_video.models.free_memory import available
from nasa_video.models.loading import (
    Decoder,
    DecoderKind,
    FullDecoder,
    choose_device,
    default_dtype,
    load_decoder,
    load_text_encoder,
)
from nasa_video.models.memory_estimate import Run, frames_of_rollout, require
from nasa_video.models.placement import RESIDENT, Placement, place
from nasa_video.models.presets import SamplerSettings, VideoPreset, find_preset
from nasa_video.text import TextEncoder
from nasa_video.video.chunks import Chunk as Chunk
from nasa_video.video.chunks import ChunkDecoder, DecodedChunk
from nasa_video.video.controller import Director
from nasa_video.video.decoding import DecodeQueue
from nasa_video.video.engine import Beginning, LongVideo
from nasa_video.video.timeline import Cue, CueOf, Negatives, as_negatives

CompileKind = Literal["off", "on", "graphs"]


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
        new_decoder: makes the decoder of one video.
        decode_ahead: chunks that are decoded in a thread while the model goes on; 0 decodes each before the next.
    """

    def __init__(
        self,
        model: CausalWan,
        vae: AutoencoderKLWan,
        text_encoder: TextEncoder,
        preset: VideoPreset,
        attention: Backend = "sdpa",
        fold_padding: bool = True,
        new_decoder: Callable[[AutoencoderKLWan], Decoder] = FullDecoder,
        decode_ahead: int = 0,
    ) -> None:
        self.model = model
        self.vae = vae
        self.text_encoder = text_encoder
        self.preset = preset
        self.fold_padding = fold_padding
        self.attend = make_attend(attention)
        self._new_decoder = new_decoder
        self.decode_ahead = decode_ahead

    @classmethod
    def from_pretrained(
        cls,
        model: str = "sprites",
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        attention: Backend = "sdpa",
        fold_padding: bool = True,
        loras: Sequence[tuple[Path, float]] = (),
        decoder: DecoderKind = "full",
        placement: Placement = RESIDENT,
        decode_ahead: int = 0,
        compiled: CompileKind = "off",
    ) -> VideoPipeline:
        """Load a preset, a preset file, a folder or a hub id.

        Args:
            device: None takes CUDA where there is one.
            dtype: None takes bfloat16 on CUDA and float32 elsewhere.
            loras: LoRA files and their scales, merged in this order.
            decoder: "tiny" takes the preset's tiny decoder, for previews and small cards.
            placement: how the parts are stored and where they live (see planning.make_plan, which finds one).
            decode_ahead: as for the class.
            compiled: "on" passes the model through torch.compile, "graphs" through CUDA graphs as well.

        Raises:
            InputError: no such model, or a part of it is missing and cannot be had.
            CheckpointError: its weights are broken or of another model.
        """
        if compiled not in ("off", "on", "graphs"):
            raise InputError(f"--compile must be off, on or graphs, got {compiled!r}")
        preset = find_preset(model)
        device = choose_device(device)
        dtype = dtype or default_dtype(device)
        parts = preset.components
        new_decoder = load_decoder(parts, decoder, device)
        # What is made smaller, or stays elsewhere, must never be on the device as a whole.
        first = device if placement.weights == "plain" and not placement.offload else torch.device("cpu")
        generator = load_generator(parts.transformer.fetch(), parts.config, dtype=dtype, device=first)
        for path, scale in (*((lora.fetch(), lora.scale) for lora in parts.loras), *loras):
            merge_lora(generator, path, scale)
        generator = place(generator, placement, device)
        if compiled != "off":
            compile_generator(generator, cuda_graphs=compiled == "graphs")
        vae = load_vae(parts.vae.fetch(), torch.bfloat16 if placement.half_decoder else torch.float32)
        text_device = torch.device("cpu") if placement.text_on_cpu else device
        encoder = load_text_encoder(parts.text_encoder, text_device, dtype)
        return cls(generator, vae.to(device), encoder, preset, attention, fold_padding, new_decoder, decode_ahead)

    def with_sampler(self, sampler: SamplerSettings) -> VideoPipeline:
        """The same model with another loop (window, sink, positions, steps where a scene opens)."""
        other = copy.copy(self)
        other.preset = self.preset.model_copy(update={"sampler": sampler})
        return other

    def opening_in(self, first_steps: int | None) -> VideoPipeline:
        """The same model with another number of steps where a scene opens; None changes nothing.

        Raises:
            InputError: the model was not made for it.
        """
        return self.with_sampler(self.preset.sampler.with_first_chunk_steps(first_steps))

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
        on_change: OnChange | None = None,
        prefix: Tensor | None = None,
        source: Tensor | None = None,
        strength: float = 1.0,
        shown_prefix: int = 0,
        rollout: int | None = None,
    ) -> Iterator[Chunk]:
        """Make one video, yielding frames as they are made.

        Args:
            negative: what must not be there; a text, a Negative, or several.
            guidance: the method; None takes the preset's default when there is a negative.
            seed: the noise follows from it alone.
            frames: length; None takes the preset's. See :meth:`check_frames`.
            endless: go on until the caller stops. A loop without a window and rollouts gets a window of the preset's
                length, since its memory would grow without end.
            steps: denoising steps a chunk; None takes the preset's. Where its sampler has ``first_steps``, the first
                chunk that is made takes those, and each whose prompt, negatives or guidance are new.
            width, height: in pixels; None takes the preset's.
            cues: what each chunk shows, instead of prompt, negative and guidance (see Timeline.cues).
            on_change: what becomes of the window where prompt, negatives or guidance change; a cue may say otherwise
                for its chunk; None takes the preset's.
            prefix: latents (1, T0, C, h, w) of a video to continue (see :meth:`encode_frames`), on any device; only
                what comes after them is yielded, chunk indices count them, and ``frames`` is the length of prefix and
                new frames.
            source: latents (1, T, C, h, w) of a video to redraw, one for every frame.
            strength: how much of it is redrawn, above 0 to 1: that share of the steps is run.
            shown_prefix: latent frames at the end of the prefix that an interrupted run of this video had made, in
                whole chunks: they are decoded and yielded again.
            rollout: pictures after which a long video starts anew from its last chunk (see
                causvid_adapter.rollouts); None takes the preset's, 0 makes one rollout of all.

        Raises:
            InputError: anything above that cannot be used; before the first chunk is made.
        """
        cue = Cue.of(prompt, negative, guidance or (self.guidance() if as_negatives(negative) else None))
        chunks = self._plan(
            cues or (lambda index: cue), [seed], frames, endless, steps, width, height, on_change,
            start=Beginning(prefix, None if source is None else source.to(self.model.device), strength, shown_prefix),
            rollout=rollout,
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
        cues: CueOf | None = None,
        on_change: OnChange | None = None,
    ) -> Iterator[Chunk]:
        """Make a batch of videos at once, each equal to the one made alone with its prompt, negatives and seed.

        Arguments as of :meth:`stream`; cues have as many prompts as ``prompts``.
        """
        if len(seeds) != len(prompts):
            raise InputError(f"{len(prompts)} prompts need as many seeds, got {len(seeds)}")
        lists = tuple(as_negatives(n) for n in negatives) if negatives is not None else ((),) * len(prompts)
        cue = Cue(tuple(prompts), lists, guidance or (self.guidance() if any(lists) else None))
        return self._plan(cues or (lambda index: cue), seeds, frames, False, steps, width, height, on_change)

    def guidance(self, method: str | None = None, scale: float | None = None) -> Guidance:
        """A method by its spelling (None: this model's default) with this model's settings, and another scale if given.

        Raises:
            InputError: no such method or setting, or a value that it cannot take.
        """
        found = parse_guidance(method or self.preset.default_guidance, self.preset.guidance)
        if found is None:
            raise InputError(f"guidance must be one of {', '.join(METHODS)}, got {method!r}")
        return found if scale is None else dataclasses.replace(found, scale=scale)

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

    def check_cue(self, cue: Cue) -> None:
        """Encode a cue's texts and look whether a chunk can show it; generates nothing.

        Raises:
            InputError: a negative that cannot act, or what the guidance cannot take.
        """
        Director(self.model, self.text_encoder, self.attend, self.fold_padding, lambda chunk: cue, "keep")

    def check_frames(self, frames: int | None) -> int:
        """Latent frames of a video of ``frames`` pictures.

        Raises:
            InputError: the chunking does not allow it; the message names the nearest two that it does.
        """
        frames = self.preset.video.frames if frames is None else frames
        stride: int = self.vae.config.scale_factor_temporal
        chunk = stride * self.preset.sampler.frames_per_chunk
        first = chunk - stride + 1
        if frames < first or (frames - first) % chunk:
            below = first + max(0, frames - first) // chunk * chunk
            near = f"{first} or {first + chunk}" if frames < first else f"{below} or {below + chunk}"
            raise InputError(f"frames must be {first} + {chunk}k for this model, got {frames}; use {near}")
        return (frames - 1) // stride + 1

    def check_rollout(self, pictures: int | None) -> int | None:
        """Latent frames of a rollout of that many pictures; None where the video is one rollout.

        Raises:
            InputError: the chunking does not allow it, or it leaves nothing behind its overlap.
        """
        settings = self.preset.sampler
        if pictures is None:
            return settings.rollout_frames
        if pictures == 0:
            return None
        frames = self.check_frames(pictures)
        if frames <= settings.frames_per_chunk:
            raise InputError(
                f"a rollout must have more than one chunk, got {pictures} frames; use {self.frames_until(2)}"
            )
        return frames

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
        stride: int = self.vae.config.scale_factor_temporal
        pictures = tensor_from_frames(frames).unsqueeze(0).to(self.model.device)
        # Some frames at a time: a long clip's activations need not fit at once.
        bounds = [0, *range(1 + 2 * stride, len(frames), 2 * stride), len(frames)]
        parts = [encoder.encode(pictures[:, a:b]) for a, b in itertools.pairwise(bounds)]
        return normalize(self.vae, torch.cat(parts, dim=1)).float()

    def frames_until(self, chunk: int) -> int:
        """Pictures shown before a chunk starts."""
        stride: int = self.vae.config.scale_factor_temporal
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
        on_change: OnChange | None = None,
        start: Beginning | None = None,
        rollout: int | None = None,
    ) -> Iterator[Chunk]:
        """Check everything and encode the first cue now; the returned iterator only generates."""
        latent_frames = None if endless else self.check_frames(frames)
        latent_width, latent_height = self.check_size(width, height)
        settings = self.preset.sampler
        num_steps = settings.default_steps if steps is None else steps
        channels = self.model.transformer.config.in_channels
        start = start or Beginning()
        first_steps = num_steps if settings.first_chunk_steps is None else settings.first_chunk_steps
        if start.source is not None and first_steps != num_steps:
            raise InputError(f"a redrawn video has as many steps in every chunk; give --first-steps {num_steps}")
        first_step = start.first_step(num_steps)
        start.check(latent_frames, settings.frames_per_chunk, (channels, latent_height, latent_width))
        rollout_frames = self.check_rollout(rollout)
        if endless:
            settings = settings.without_end(rollout_frames, self.check_frames(None))
        self._check_memory(cue_of(0), len(seeds), latent_frames, latent_width, latent_height, rollout_frames, settings)
        director = Director(
            self.model, self.text_encoder, self.attend, self.fold_padding, cue_of, on_change or settings.on_change
        )

        sampler = ChunkSampler(
            director.denoiser,
            settings.schedule(num_steps),
            settings.frames_per_chunk,
            settings.window,
            settings.schedule(first_steps),
        )
        noise = SeededNoise(seeds, (channels, latent_height, latent_width), self.model.device)
        queue = DecodeQueue(
            ChunkDecoder(self.vae, self._new_decoder, settings.frames_per_chunk), self.decode_ahead, self.model.device
        )

        def overlap_of(tail: Tensor) -> Tensor:
            return overlap_latents(self.vae, tail, queue.latest().tail)

        video = LongVideo(sampler, director, noise, start, latent_frames, rollout_frames, first_step, overlap_of)
        return self._decoded(video, queue)

    def _check_memory(
        self, cue: Cue, batch: int, latent_frames: int | None, width: int, height: int, rollout_frames: int | None,
        settings: SamplerSettings,
    ) -> None:  # fmt: skip
        """Refuse what cannot fit on the device (latent width and height)."""
        prompts = 1 + max(len(negatives) for negatives in cue.negatives)
        stride = self.vae.config.scale_factor_spatial
        run = Run(
            self.model.transformer.config,
            self.vae.config,
            settings,
            width * stride,
            height * stride,
            frames_of_rollout(latent_frames, rollout_frames),
            overlapped=self.decode_ahead > 0,
            dtype=self.model.dtype,
            vae_dtype=self.vae.dtype,
            caches=2 if isinstance(cue.guidance, ClassifierFree) else 1,
            text_tokens=prompts * (self.text_encoder.max_tokens + 1),
            batch=batch,
            num_layers=self.model.num_layers,
            tiny_decoder=self._new_decoder is not FullDecoder,
            processes=self.model.processes,
        )
        require(run, available(self.model.device), str(self.model.device), loaded=True)

    def _decoded(self, video: LongVideo, queue: DecodeQueue[DecodedChunk]) -> Iterator[Chunk]:
        with queue:
            for made in video.chunks():
                for done in queue.put(made):
                    if done.shown:
                        yield done.chunk
            for done in queue.rest():
                if done.shown:
                    yield done.chunk
