"""The chunks of a video, rollout by rollout, with guidance installed around the model's calls."""

# B batch, T latent frames, C channels, h w latent height and width, H W picture height and width

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from causvid_adapter import ChunkSampler, ModelCall
from causvid_adapter.noise import NoiseSource
from causvid_adapter.rollouts import Rollout, ShiftedNoise, rollouts
from nasa_video.backbones import wan
from nasa_video.errors import InputError
from nasa_video.files.frames import Frames
from nasa_video.models.presets import SamplerSettings
from nasa_video.video.chunks import LatentChunk
from nasa_video.video.controller import GuidanceController, require_effect

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel


@dataclass(frozen=True)
class InitialLatents:
    """What a video starts from, beside noise.

    Attributes:
        context: latents (1, T0, C, h, w) of a video to continue (see :meth:`VideoPipeline.encode_frames`), on any
            device; only what comes after them is yielded, and chunk indices count them.
        source: latents (1, T, C, h, w) of a video to redraw, one for every frame.
        strength: how much of it is redrawn, above 0 to 1: that share of the steps is run.
        shown_context: latent frames at the end of the context that an interrupted run of this video had made, in
            whole chunks: they are decoded and yielded again.
        frames: length in frames of context and new ones together; None is the request's.
        lead: frames (F, H, W, 3) that a file begins with, before what is generated.
    """

    context: Tensor | None = None
    source: Tensor | None = None
    strength: float = 1.0
    shown_context: int = 0
    frames: int | None = None
    lead: Frames | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise InputError(f"strength must be above 0 and at most 1, got {self.strength}")
        if self.source is None and self.strength != 1:
            raise InputError(f"a strength of {self.strength:g} is for a source that is redrawn, and there is none")

    @property
    def context_frames(self) -> int:
        """Latent frames of the context."""
        return 0 if self.context is None else self.context.shape[1]

    @property
    def first_made(self) -> int:
        """The latent frame with which this video, and an interrupted run of it, begins."""
        return self.context_frames - self.shown_context

    def first_step(self, num_steps: int) -> int:
        """The step at which a redrawn video enters the loop."""
        if self.source is None:
            return 0
        return num_steps - max(1, round(self.strength * num_steps))

    def to(self, device: torch.device) -> InitialLatents:
        """The same with the source on a device; the context is brought there chunk by chunk."""
        return self if self.source is None else dataclasses.replace(self, source=self.source.to(device))

    def check(
        self, latent_frames: int | None, settings: SamplerSettings, num_steps: int, shape: tuple[int, int, int]
    ) -> None:
        """Raise InputError where the latents do not fit the video, of latents (C, h, w)."""
        per_chunk = settings.frames_per_chunk
        if self.source is not None and settings.first_chunk_steps not in (None, num_steps):
            raise InputError(f"a redrawn video has as many steps in every chunk; give --first-chunk-steps {num_steps}")
        for name, given in (("context", self.context), ("source", self.source)):
            if given is not None and tuple(given.shape[2:]) != shape:
                raise InputError(f"the {name} must have latents of {shape}, got {tuple(given.shape[2:])}")
        known = self.context_frames
        if known % per_chunk or self.shown_context % per_chunk or self.shown_context > known:
            raise InputError(f"the context must be whole chunks of {per_chunk} latent frames, got {known}")
        if latent_frames is not None and latent_frames - known < (0 if self.shown_context else 1):
            raise InputError(f"{latent_frames} latent frames leave nothing to make behind {known} of context")
        if self.source is not None and (latent_frames is None or self.source.shape[1] < latent_frames):
            raise InputError("the source must have latents for every frame of the video")


@dataclass(frozen=True)
class LongVideo:
    """Everything that the chunks of a video follow from.

    Attributes:
        num_frames: latent frames; None goes on without end.
        rollout_frames: latent frames of a rollout; None makes one of all.
        overlap_of: start latents of the next rollout, from the last latents of the one before.
    """

    sampler: ChunkSampler
    controller: GuidanceController
    noise: NoiseSource
    start: InitialLatents
    num_frames: int | None
    rollout_frames: int | None
    first_step: int
    overlap_of: Callable[[Tensor], Tensor]

    def chunks(self) -> Iterator[LatentChunk]:
        """Every chunk in order, the context's too."""
        overlap = None
        size = self.sampler.frames_per_chunk
        for rollout in rollouts(self.num_frames, self.rollout_frames, size):
            made = None
            for made in self._rollout(rollout, overlap):
                yield made
            if made is not None and rollout.end != self.num_frames:
                overlap = self.overlap_of(made.latents)

    def _rollout(self, rollout: Rollout, overlap: Tensor | None) -> Iterator[LatentChunk]:
        size, start = self.sampler.frames_per_chunk, self.start
        # Views, and no copies: the latents of a long video that is resumed are mapped from disk.
        given = None if start.context is None else start.context[:, rollout.first : rollout.end]
        if given is not None and not given.shape[1]:
            given = None
        index = rollout.first // size
        restart = overlap
        for latents in () if given is None else given.split(size, dim=1):
            shown = index >= start.first_made // size
            yield LatentChunk(index, latents, self.controller.state_of(index), shown=shown, restart=restart)
            index, restart = index + 1, None
        if rollout.end is not None and index * size >= rollout.end:
            return
        before = given if overlap is None else overlap
        if overlap is not None and given is not None:
            before = torch.cat([overlap, given.to(overlap.device)], dim=1)
        # Of what an earlier run of this video has made, the part that is in this rollout.
        made = 0 if given is None else start.context_frames - max(rollout.first, start.first_made)
        latents_of = self._stream(rollout, before, made)
        controller = self.controller
        while True:
            # Installed around the model's calls and not around the yield: between two chunks, and when a caller drops
            # the stream, the model is as it was found.
            with wan.install(self.transformer, controller.steering):
                latents = next(latents_of, None)
            if latents is None:
                return
            effect = controller.steering.meter.effect
            state = controller.state_of(index)
            if state.guided:
                require_effect(effect, state)
            yield LatentChunk(index, latents, state, effect, controller.steering.meter.lap(), restart=restart)
            index, restart = index + 1, None

    @property
    def transformer(self) -> WanTransformer3DModel:
        """The transformer in which guidance is installed."""
        return self.controller.model.transformer

    def _stream(self, rollout: Rollout, before: Tensor | None, made_frames: int) -> Iterator[Tensor]:
        """The sampler's own stream of a rollout, which counts from the rollout's start."""
        shift = rollout.shift
        size = self.sampler.frames_per_chunk
        shift_chunks = shift // size
        first_made = self.start.first_made // size
        known = 0 if before is None else before.shape[1]
        source = self.start.source

        def announce(call: ModelCall) -> None:
            self.controller.before_call(dataclasses.replace(call, chunk=call.chunk + shift_chunks))

        def is_first_chunk(chunk: int) -> bool:
            index = chunk + shift_chunks
            return index == first_made or (index > 0 and self.controller.shows_new(index))

        return self.sampler.stream(
            None,
            ShiftedNoise(self.noise, shift) if shift else self.noise,
            num_frames=None if rollout.end is None else rollout.end - shift - known,
            prefix=before,
            made_frames=made_frames,
            source=None if source is None else source[:, shift : rollout.end],
            first_step=self.first_step,
            before_call=announce,
            on_change=lambda chunk: self.controller.on_change(chunk + shift_chunks),
            is_first_chunk=is_first_chunk,
        )
