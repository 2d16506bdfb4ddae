"""The chunks of a video, rollout by rollout, with guidance installed around the model's calls."""

# B batch, T latent frames, C channels, h w latent height and width, H W picture height and width

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from causvid_adapter import ChunkSampler, ModelCall
from causvid_adapter.noise import NoiseSource
from causvid_adapter.rollouts import Rollout, ShiftedNoise, rollouts
from nasa_video.backbones import wan
from nasa_video.errors import InputError
from nasa_video.video.controller import Director, require_effect
from nasa_video.video.decoding import Made


@dataclass(frozen=True)
class Beginning:
    """What a video starts from, beside noise; see :meth:`VideoPipeline.stream`."""

    prefix: Tensor | None = None
    source: Tensor | None = None
    strength: float = 1.0
    shown_prefix: int = 0

    @property
    def given(self) -> int:
        """Latent frames of the prefix."""
        return 0 if self.prefix is None else self.prefix.shape[1]

    def first_step(self, num_steps: int) -> int:
        """The step at which a redrawn video enters the loop."""
        if not 0 < self.strength <= 1:
            raise InputError(f"strength must be above 0 and at most 1, got {self.strength}")
        if self.source is None:
            return 0
        return num_steps - max(1, round(self.strength * num_steps))

    def check(self, latent_frames: int | None, per_chunk: int, shape: tuple[int, int, int]) -> None:
        """Raise InputError where the given latents do not fit the video."""
        for name, given in (("prefix", self.prefix), ("source", self.source)):
            if given is not None and tuple(given.shape[2:]) != shape:
                raise InputError(f"the {name} must have latents of {shape}, got {tuple(given.shape[2:])}")
        if self.given % per_chunk or self.shown_prefix % per_chunk or self.shown_prefix > self.given:
            raise InputError(f"the prefix must be whole chunks of {per_chunk} latent frames, got {self.given}")
        if latent_frames is not None and latent_frames - self.given < (0 if self.shown_prefix else 1):
            raise InputError(
                f"a video of {latent_frames} latent frames leaves nothing to make behind {self.given} given ones"
            )
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
    director: Director
    noise: NoiseSource
    start: Beginning
    num_frames: int | None
    rollout_frames: int | None
    first_step: int
    overlap_of: Callable[[Tensor], Tensor]

    def chunks(self) -> Iterator[Made]:
        """Every chunk in order, the given ones too."""
        overlap = None
        size = self.sampler.frames_per_chunk
        for rollout in rollouts(self.num_frames, self.rollout_frames, size):
            made = None
            for made in self._rollout(rollout, overlap):
                yield made
            if made is not None and rollout.end != self.num_frames:
                overlap = self.overlap_of(made.latents)

    def _rollout(self, rollout: Rollout, overlap: Tensor | None) -> Iterator[Made]:
        size, start = self.sampler.frames_per_chunk, self.start
        # Views, and no copies: the latents of a long video that is resumed are mapped from disk.
        given = None if start.prefix is None else start.prefix[:, rollout.first : rollout.end]
        if given is not None and not given.shape[1]:
            given = None
        index = rollout.first // size
        restart = overlap
        for latents in () if given is None else given.split(size, dim=1):
            shown = index >= (start.given - start.shown_prefix) // size
            yield Made(index, latents, self.director.cue_of(index), shown=shown, restart=restart)
            index, restart = index + 1, None
        if rollout.end is not None and index * size >= rollout.end:
            return
        before = given if overlap is None else overlap
        if overlap is not None and given is not None:
            before = torch.cat([overlap, given.to(overlap.device)], dim=1)
        # Of what an earlier run of this video has made, the part that is in this rollout.
        made = 0 if given is None else start.given - max(rollout.first, start.given - start.shown_prefix)
        latents_of = self._stream(rollout, before, made)
        director = self.director
        while True:
            # Installed around the model's calls and not around the yield: between two chunks, and when a caller drops
            # the stream, the model is as it was found.
            with wan.install(self.transformer, director.steering):
                latents = next(latents_of, None)
            if latents is None:
                return
            effect = director.steering.meter.effect
            cue = director.cue_of(index)
            if cue.guided:
                require_effect(effect, cue)
            yield Made(index, latents, cue, effect, director.steering.meter.lap(), restart=restart)
            index, restart = index + 1, None

    @property
    def transformer(self) -> WanTransformer3DModel:
        """The transformer in which guidance is installed."""
        return self.director.model.transformer

    def _stream(self, rollout: Rollout, before: Tensor | None, made_frames: int) -> Iterator[Tensor]:
        """The sampler's own stream of a rollout, which counts from the rollout's start."""
        shift = rollout.shift
        size = self.sampler.frames_per_chunk
        shift_chunks = shift // size
        first_made = (self.start.given - self.start.shown_prefix) // size
        known = 0 if before is None else before.shape[1]
        source = self.start.source

        def announce(call: ModelCall) -> None:
            self.director.before_call(dataclasses.replace(call, chunk=call.chunk + shift_chunks))

        def is_first_chunk(chunk: int) -> bool:
            index = chunk + shift_chunks
            return index == first_made or (index > 0 and self.director.shows_new(index))

        return self.sampler.stream(
            None,
            ShiftedNoise(self.noise, shift) if shift else self.noise,
            num_frames=None if rollout.end is None else rollout.end - shift - known,
            prefix=before,
            made_frames=made_frames,
            source=None if source is None else source[:, shift : rollout.end],
            first_step=self.first_step,
            before_call=announce,
            on_change=lambda chunk: self.director.on_change(chunk + shift_chunks),
            is_first_chunk=is_first_chunk,
        )
