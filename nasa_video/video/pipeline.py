"""Prompt to frames: encode, denoise chunk by chunk under guidance, decode as the latents come."""

# B batch, T latent frames, F frames, H W height and width in pixels

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from causvid_adapter import (
    CausalWan,
    ChunkSampler,
    SeededNoise,
    StreamingEncoder,
    load_generator,
    normalize,
)
from causvid_adapter.rollouts import overlap_latents
from causvid_adapter.vae_checkpoint import load_vae
from nasa_video.errors import InputError
from nasa_video.files.frames import tensor_from_frames
from nasa_video.guidance.attention import Backend, make_attend
from nasa_video.guidance.methods import METHODS, ClassifierFree, Guidance, did_you_mean
from nasa_video.guidance.terms import Negatives, as_negatives
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
from nasa_video.models.part_sizes import check_size
from nasa_video.models.placement import RESIDENT, Placement, place
from nasa_video.models.presets import OnChange, SamplerSettings, VideoPreset, find_preset
from nasa_video.text import TextEncoder
from nasa_video.text.vocabulary import find_vocabulary
from nasa_video.video.chunks import Chunk as Chunk
from nasa_video.video.chunks import ChunkDecoder, DecodeQueue
from nasa_video.video.controller import GuidanceController
from nasa_video.video.engine import InitialLatents, LongVideo
from nasa_video.video.request import (
    LoraFile,
    PromptRequest,
    PromptState,
    PromptStateOf,
    StartFile,
    VideoRequest,
    WindowRequest,
    find_guidance,
)
from nasa_video.video.result import Video

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

CompileKind = Literal["off", "on", "graphs"]
_OTHER_NAMES = {
    "negative_prompt": "negatives",
    "negative": "negatives",
    "num_inference_steps": "steps",
    "num_frames": "frames",
}
_SAY_INSTEAD = {
    "generator": "seed=7, from which the noise follows on every device",
    "guidance_scale": "guidance='nasa-centred:0.5' (a method and its scale)",
    "scale": "guidance='nasa-centred:0.5' (a method and its scale)",
    "compare": "two calls, one of them with guidance='none'",
    "num_videos_per_prompt": "pipeline.stream_batch(prompts, seeds=...)",
    "first_steps": "first_chunk_steps=",
    "prefix": "start=InitialLatents(context=...)",
    "source": "start=InitialLatents(source=..., strength=0.6)",
    "strength": "start=InitialLatents(source=..., strength=0.6)",
    "cues": "states=",
}
_OF_ONE_VIDEO = {"prompt", "negative", "negative_prompt", "seed", "timeline", "start", "extend_prompt"}
_KEYWORDS = [*VideoRequest.model_fields, "negative", "endless", "states"]


class VideoPipeline:
    """A causal video model with everything that it needs to run.

    >>> pipe = VideoPipeline.from_pretrained("sprites")
    >>> pipe("a red ball bouncing", negative="blurry, rain:0.4", seed=7).save("ball.mp4")

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

    Attributes:
        loaded: the part of a request that was settled when the model was loaded.
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
        self.loaded = VideoRequest(
            model=preset.name, fold_padding=fold_padding, decoder="full" if new_decoder is FullDecoder else "tiny"
        )

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
            placement: how the parts are stored and where they live (see memory_plan.make_plan, which finds one).
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
        if parts.loras or loras:
            from causvid_adapter.lora import merge_lora
        for path, scale in (*((lora.fetch(), lora.scale) for lora in parts.loras), *loras):
            merge_lora(generator, path, scale)
        generator = place(generator, placement, device)
        if compiled != "off":
            from causvid_adapter import compile_generator

            compile_generator(generator, cuda_graphs=compiled == "graphs")
        vae = load_vae(parts.vae.fetch(), torch.bfloat16 if placement.half_decoder else torch.float32)
        text_device = torch.device("cpu") if placement.text_on_cpu else device
        encoder = load_text_encoder(parts.text_encoder, text_device, dtype)
        pipeline = cls(generator, vae.to(device), encoder, preset, attention, fold_padding, new_decoder, decode_ahead)
        files = tuple(LoraFile(path=str(path), scale=scale) for path, scale in loras)
        pipeline.loaded = pipeline.loaded.merged(
            VideoRequest(model=str(model), loras=files, decoder=decoder, placement=placement)
        )
        return pipeline

    def with_sampler(self, sampler: SamplerSettings) -> VideoPipeline:
        """The same model with another loop."""
        other = copy.copy(self)
        other.preset = self.preset.model_copy(update={"sampler": sampler})
        return other

    def __call__(self, prompt: str | VideoRequest | None = None, **options: Any) -> Video:
        """Make one whole video.

        Arguments and errors as of :meth:`stream`, which yields the same frames while they are made.

        >>> video = pipe("a red ball bouncing", negative="blurry", frames=81)
        >>> video.frames.shape, video.fps, video.save("ball.mp4")
        """
        if options.get("endless"):
            raise InputError("an endless video is never whole; take its chunks as they come from stream(...)")
        request, start = None, options.get("start")
        if options.get("states") is None and not isinstance(start, InitialLatents):
            said = {name: value for name, value in options.items() if name not in ("states", "endless")}
            request, start = self.prepared(self.resolve(_request(prompt, said)))
            prompt, options = request, {"start": start}
        chunks = list(self.stream(prompt, **options))
        frames = [chunk.frames for chunk in chunks]
        if isinstance(start, InitialLatents) and start.lead is not None:
            frames.insert(0, start.lead)
        video = self.preset.video
        fps = options.get("fps") if request is None else request.fps
        return Video(np.concatenate(frames), fps or video.fps, request, chunks[-1].effect, video.upscale)

    def stream(
        self,
        prompt: str | VideoRequest | None = None,
        *,
        negative: Negatives = None,
        guidance: str | Guidance | None = None,
        seed: int | None = None,
        frames: int | None = None,
        endless: bool = False,
        steps: int | None = None,
        first_chunk_steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
        window: WindowRequest | None = None,
        rollout: int | None = None,
        on_change: OnChange | None = None,
        states: PromptStateOf | None = None,
        start: StartFile | InitialLatents | None = None,
        **others: Any,
    ) -> Iterator[Chunk]:
        """Make one video, yielding frames as they are made.

        Args:
            prompt: what it shows, or a whole request, over which the other arguments are put.
            negative: what must not be there, as text or Negatives: "blurry, rain:0.4".
            guidance: a method or its spelling "nasa:0.8"; None takes the preset's.
            seed: the noise follows from it alone; None is 0.
            frames: length; None takes the preset's. See :meth:`check_frames`.
            endless: go on until the caller stops. A loop without a window and rollouts gets a window of the preset's
                length, since its memory would grow without end.
            steps: denoising steps a chunk; None takes the preset's.
            first_chunk_steps: of the first chunk that is made, and of each whose prompt, negatives or guidance are new.
            width, height: in pixels; None takes the preset's.
            window: what of the model's window, sink and positions is replaced.
            rollout: frames after which a long video starts again from its last chunk (see
                causvid_adapter.rollouts); None takes the preset's, 0 makes one rollout of all.
            on_change: what becomes of the window where prompt, negatives or guidance change; a state may say otherwise
                for its chunk; None takes the preset's.
            states: what each chunk shows, instead of prompt, negative and guidance.
            start: latents or a file to go on from, or to redraw; with :class:`InitialLatents` ``frames`` counts the
                context too.

        Raises:
            InputError: anything above that cannot be used; before the first chunk is made.
        """
        if endless and frames is not None:
            raise InputError(f"an endless video has no length, got frames={frames}; leave out one of the two")
        if states is not None and (negative is not None or guidance is not None):
            raise InputError("states say what each chunk shows; give negative and guidance in them")
        request = _request(
            prompt if prompt is not None or states is None else states(0).prompts[0], others,
            negatives=negative, guidance=guidance, seed=seed, frames=frames, steps=steps,
            first_chunk_steps=first_chunk_steps, width=width, height=height, window=window, rollout=rollout,
            on_change=on_change, start=start if isinstance(start, StartFile) else None,
        )  # fmt: skip
        request = self.resolve(request)
        initial = start if isinstance(start, InitialLatents) else self.read_start(request)
        states = states or self.states(request)
        assert request.seed is not None
        chunks = self._plan(request, states, [request.seed], initial or InitialLatents(), endless)
        return (dataclasses.replace(chunk, frames=chunk.frames[0]) for chunk in chunks)

    def stream_batch(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        negatives: Sequence[Negatives] | None = None,
        guidance: str | Guidance | None = None,
        states: PromptStateOf | None = None,
        **options: Any,
    ) -> Iterator[Chunk]:
        """Make a batch of videos at once, each equal to the one made alone with its prompt, negatives and seed.

        Arguments as of :meth:`stream`; states have as many prompts as ``prompts``.
        """
        if isinstance(prompts, str) or len(seeds) != len(prompts):
            count = 1 if isinstance(prompts, str) else len(prompts)
            raise InputError(f"{count} prompts need as many seeds, in lists, got {len(seeds)}")
        if unused := sorted(_OF_ONE_VIDEO & set(options)):
            raise TypeError(f"a batch has no {unused[0]!r}; it takes prompts, negatives and seeds, in lists, or states")
        lists = tuple(as_negatives(n) for n in negatives) if negatives is not None else ((),) * len(prompts)
        if len(lists) != len(prompts):
            raise InputError(f"{len(prompts)} prompts need as many lists of negatives, got {len(lists)}")
        method = find_guidance(guidance, self.preset)
        state = PromptState(tuple(prompts), lists, method if guidance is not None or any(lists) else None)
        request = self.resolve(_request(prompts[0] if prompts else "", options))
        return self._plan(request, states or (lambda chunk: state), seeds, InitialLatents(), False)

    def resolve(self, request: VideoRequest) -> VideoRequest:
        """The request with everything that is open filled in: a recipe that makes the same video again.

        Raises:
            InputError: it is for another model than this, or as :meth:`VideoRequest.resolved`.
        """
        for name in ("model", "loras", "decoder", "fold_padding"):
            wanted, own = getattr(request, name), getattr(self.loaded, name)
            if None not in (wanted, own) and wanted != own and not (name == "model" and wanted == self.preset.name):
                raise InputError(
                    f"this pipeline was loaded with {name} {own!r}, and the request is for {wanted!r}; load one with "
                    "VideoPipeline.from_pretrained(...)"
                )
        resolved = request.merged(self.loaded).resolved(self.preset)
        return self._with_extended_prompts(resolved) if resolved.extend_prompt else resolved

    def _with_extended_prompts(self, request: VideoRequest) -> VideoRequest:
        """The request with what its prompts leave open written into them; all of them by the video's seed."""
        vocabulary, seed = find_vocabulary(self.preset.vocabulary), request.seed or 0
        assert vocabulary is not None

        def extended(part: PromptRequest) -> dict[str, Any]:
            return {"prompt": part.prompt and vocabulary.extend_prompt(part.prompt, seed, self.text_encoder)}

        timeline = request.timeline and tuple(entry.model_copy(update=extended(entry)) for entry in request.timeline)
        return request.model_copy(update={**extended(request), "timeline": timeline, "extend_prompt": None})

    def prepared(self, request: VideoRequest) -> tuple[VideoRequest, InitialLatents | None]:
        """A resolved request with the number of frames that will be made, and what it starts from.

        Raises:
            InputError: as :meth:`read_start`.
        """
        start = self.read_start(request)
        if start is None:
            return request, None
        assert start.frames is not None
        known = self.frames_until(start.context_frames // self.preset.sampler.frames_per_chunk)
        return request.model_copy(update={"frames": start.frames - known}), start

    def read_start(self, request: VideoRequest) -> InitialLatents | None:
        """What a resolved request starts from, read from its file; None for noise.

        Raises:
            InputError: see :func:`nasa_video.video.inputs.read_start`.
        """
        if request.start is None:
            return None
        from nasa_video.video.inputs import read_start

        assert request.width is not None
        assert request.height is not None
        return read_start(request.start, self, request.width, request.height, request.frames)

    def states(self, request: VideoRequest) -> PromptStateOf:
        """What each chunk of a resolved request shows."""
        fps = request.fps or self.preset.video.fps
        return request.states(self.preset, lambda chunk: self.frames_until(chunk) / fps)

    def guidance(self, method: str | None = None, scale: float | None = None) -> Guidance:
        """A method by its spelling (None: this model's default) with this model's settings, and another scale if given.

        Raises:
            InputError: no such method or setting, or a value that it cannot take.
        """
        found = find_guidance(method, self.preset)
        if found is None:
            raise InputError(f"guidance must be one of {', '.join(METHODS)}, got {method!r}")
        return found if scale is None else dataclasses.replace(found, scale=scale)

    def check_state(self, state: PromptState) -> None:
        """Encode a state's texts and look whether a chunk can show it; generates nothing.

        Raises:
            InputError: a negative that cannot act, or what the guidance cannot take.
        """
        self._controller(lambda chunk: state, "keep")

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
        check_size(*sizes, (stride * patch_width, stride * patch_height))
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

    def _controller(self, state_of: PromptStateOf, on_change: OnChange) -> GuidanceController:
        return GuidanceController(self.model, self.text_encoder, self.attend, self.fold_padding, state_of, on_change)

    def _plan(
        self, request: VideoRequest, state_of: PromptStateOf, seeds: Sequence[int], start: InitialLatents, endless: bool
    ) -> Iterator[Chunk]:
        """Check everything and encode the first state now; the returned iterator only generates."""
        latent_frames = None if endless else self.check_frames(start.frames or request.frames)
        width, height = self.check_size(request.width, request.height)
        settings = request.sampler(self.preset.sampler)
        num_steps = settings.default_steps if request.steps is None else request.steps
        shape = (self.model.transformer.config.in_channels, height, width)
        start = start.to(self.model.device)
        start.check(latent_frames, settings, num_steps, shape)
        rollout_frames = self.check_rollout(request.rollout)
        if endless:
            settings = settings.without_end(rollout_frames, self.check_frames(None))
        held = frames_of_rollout(latent_frames, rollout_frames)
        self._check_memory(state_of(0), len(seeds), held, (width, height), settings)
        controller = self._controller(state_of, request.on_change or settings.on_change)
        sampler = ChunkSampler(
            controller.denoiser,
            settings.schedule(num_steps),
            settings.frames_per_chunk,
            settings.window,
            settings.schedule(settings.first_chunk_steps or num_steps),
        )
        noise = SeededNoise(seeds, shape, self.model.device)
        decoder = ChunkDecoder(self.vae, self._new_decoder, settings.frames_per_chunk)
        queue = DecodeQueue(decoder, self.decode_ahead, self.model.device)

        def overlap_of(tail: Tensor) -> Tensor:
            return overlap_latents(self.vae, tail, queue.latest().tail)

        first_step = start.first_step(num_steps)
        video = LongVideo(sampler, controller, noise, start, latent_frames, rollout_frames, first_step, overlap_of)
        return queue.decoded(video.chunks())

    def _check_memory(
        self, state: PromptState, batch: int, held: int | None, size: tuple[int, int], settings: SamplerSettings
    ) -> None:
        """Refuse what cannot fit on the device (``held`` frames, latent width and height)."""
        prompts = 1 + max(len(negatives) for negatives in state.negatives)
        stride = self.vae.config.scale_factor_spatial
        run = Run(
            self.model.transformer.config,
            self.vae.config,
            settings,
            size[0] * stride,
            size[1] * stride,
            held,
            overlapped=self.decode_ahead > 0,
            dtype=self.model.dtype,
            vae_dtype=self.vae.dtype,
            caches=2 if isinstance(state.guidance, ClassifierFree) else 1,
            text_tokens=prompts * (self.text_encoder.max_tokens + 1),
            batch=batch,
            num_layers=self.model.num_layers,
            tiny_decoder=self._new_decoder is not FullDecoder,
            processes=self.model.processes,
        )
        require(run, available(self.model.device), str(self.model.device), loaded=True)


def _request(prompt: str | VideoRequest | None, others: dict[str, Any], **said: Any) -> VideoRequest:
    """The keyword form as a request.

    Raises:
        InputError: a value that cannot be used. TypeError: a keyword that there is not; it says what to write.
    """
    for name, value in others.items():
        own = _OTHER_NAMES.get(name, name)
        if name in _SAY_INSTEAD or own not in VideoRequest.model_fields:
            hint = f"; write {_SAY_INSTEAD[name]}" if name in _SAY_INSTEAD else did_you_mean(name, _KEYWORDS)
            raise TypeError(f"a video has no {name!r}{hint}")
        if said.get(own) is not None:
            raise TypeError(f"{name!r} is given twice, as {own!r} too")
        said[own] = value
    said = {name: value.__index__() if isinstance(value, np.integer) else value for name, value in said.items()}
    stated = {name: value for name, value in said.items() if value is not None}
    if isinstance(prompt, VideoRequest):
        return prompt.merged(VideoRequest.read(stated))
    if prompt is not None and not isinstance(prompt, str):
        raise InputError(f"the prompt must be a text or a VideoRequest, got {type(prompt).__name__}")
    return VideoRequest.read(stated if prompt is None else {"prompt": prompt, **stated})
