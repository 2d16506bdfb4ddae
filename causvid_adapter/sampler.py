"""The few-step chunk loop: noise in, finished latents out, a chunk at a time."""

# B batch, T latent frames, C channels, H W latent height and width

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Protocol

import torch
from torch import Tensor

from causvid_adapter.errors import ShapeError
from causvid_adapter.kv_cache import RopeMode, check_window
from causvid_adapter.noise import GivenNoise, NoiseSource
from causvid_adapter.schedule import FlowMatchSchedule


class ChunkCache(Protocol):
    """History that a denoiser reads and stages into (one KVCache, or one a guidance branch)."""

    def commit(self) -> None: ...

    def reset(self) -> None: ...

    def seek(self, frame: int) -> None: ...


class Denoiser(Protocol):
    """What the sampler needs of a model: CausalWan itself, or something that wraps it, such as two-pass guidance."""

    def new_cache(
        self,
        height: int,
        width: int,
        window_frames: int | None,
        sink_frames: int,
        rope: RopeMode,
        num_frames: int | None,
    ) -> ChunkCache: ...

    def __call__(self, latents: Tensor, timestep: float, context: Tensor | None, *, cache: ChunkCache) -> Tensor: ...


@dataclass(frozen=True)
class ModelCall:
    """Which call of the model comes next."""

    chunk: int
    step: int
    num_steps: int
    clean: bool
    """True for the pass at t = 0 that writes the chunk's keys for later chunks."""


Context = Tensor | None | Callable[[int], Tensor | None]
"""Text embeddings (B, text tokens, text_dim), or a function of the chunk's index that gives them."""


class ChunkSampler:
    """Generates latent frames chunk by chunk.

    Args:
        model: the denoiser.
        schedule: its few steps.
        frames_per_chunk: latent frames of a chunk; 3 in CausVid.
        window_frames, sink_frames, rope: see :class:`~causvid_adapter.KVCache`.
        first_schedule: steps of the first chunk, if they differ.

    Raises:
        ShapeError: the window has no room for the sink and a chunk.
    """

    def __init__(
        self,
        model: Denoiser,
        schedule: FlowMatchSchedule,
        frames_per_chunk: int = 3,
        window_frames: int | None = None,
        sink_frames: int = 0,
        rope: RopeMode = "absolute",
        first_schedule: FlowMatchSchedule | None = None,
    ) -> None:
        if frames_per_chunk < 1:
            raise ShapeError(f"frames_per_chunk must be at least 1, got {frames_per_chunk}")
        check_window(window_frames, sink_frames, frames_per_chunk)
        self.model = model
        self.schedule = schedule
        self.frames_per_chunk = frames_per_chunk
        self.window_frames = window_frames
        self.sink_frames = sink_frames
        self.rope: RopeMode = rope
        self.first_schedule = first_schedule or schedule

    @torch.no_grad()
    def stream(
        self,
        context: Context,
        noise: Tensor | NoiseSource,
        *,
        num_frames: int | None = None,
        prefix: Tensor | None = None,
        source: Tensor | None = None,
        first_step: int = 0,
        before_call: Callable[[ModelCall], None] | None = None,
        recompute: Callable[[int], bool] | None = None,
    ) -> Iterator[Tensor]:
        """Yield the latents of each chunk, (B, frames_per_chunk, C, H, W), as soon as they are finished.

        Args:
            context: text embeddings, or a function of the chunk index (prompts may change between chunks).
            noise: start noise (B, T, C, H, W) of the frames to generate, or a source; a source without
                ``num_frames`` streams without end.
            num_frames: latent frames to generate, the prefix not counted.
            prefix: clean latents (B, T0, C, H, W) to continue; T0 is a multiple of frames_per_chunk.
            source: clean latents (B, T, C, H, W) of a video to start from instead of pure noise (video to video);
                they are noised to the timestep of ``first_step``, and the steps before it are left out.
            before_call: told of every model call before it is made.
            recompute: asked before each chunk; True reruns the window's clean latents at t = 0, so that its keys
                belong to the prompt of this chunk (the "KV recache" of LongLive, arXiv 2509.22622).

        Raises:
            ShapeError: a length that is not whole chunks.
        """
        size = self.frames_per_chunk
        offset = 0 if prefix is None else prefix.shape[1]
        if isinstance(noise, Tensor):
            noise = GivenNoise(noise, first_frame=offset)
        if isinstance(noise, GivenNoise) and num_frames is None:
            num_frames = noise.first_frame + noise.num_frames - offset
        self._check_whole_chunks("num_frames", num_frames)
        self._check_whole_chunks("the prefix", offset)
        if source is not None and num_frames is None:
            num_frames = source.shape[1] - offset
        total_frames = None if num_frames is None else offset + num_frames
        rollout = _Rollout(self, context, before_call, remember=recompute is not None, num_frames=total_frames)
        total = None if total_frames is None else total_frames // size
        for chunk in count() if total is None else range(total):
            frames = range(chunk * size, (chunk + 1) * size)
            if prefix is not None and frames.start < offset:
                rollout.keep(prefix[:, frames.start : frames.stop], chunk)
                continue
            if recompute is not None and chunk > 0 and recompute(chunk):
                rollout.recompute(chunk)
            given = None if source is None else source[:, frames.start : frames.stop]
            x = rollout.denoise(noise, frames, chunk, given, first_step)
            yield x
            # After the yield: whoever shows the frames need not wait for it, and the last chunk does not need it.
            if chunk + 1 != total:
                rollout.keep(x, chunk)

    def _check_whole_chunks(self, what: str, num_frames: int | None) -> None:
        size = self.frames_per_chunk
        if num_frames is not None and (num_frames < 0 or num_frames % size):
            below = num_frames // size * size
            raise ShapeError(
                f"{what} must be a multiple of {size} latent frames, got {num_frames}; use {below} or {below + size}"
            )


class _Rollout:
    """State of one stream: its cache and the clean latents that a recomputation needs."""

    def __init__(
        self,
        sampler: ChunkSampler,
        context: Context,
        before_call: Callable[[ModelCall], None] | None,
        remember: bool,
        num_frames: int | None = None,
    ) -> None:
        self.sampler = sampler
        self.num_frames = num_frames
        self.context_of = context if callable(context) else lambda chunk: context
        self.announce = before_call or (lambda call: None)
        self.remember = remember
        self.clean: dict[int, Tensor] = {}
        self._cache: ChunkCache | None = None

    def denoise(
        self, noise: NoiseSource, frames: range, chunk: int, source: Tensor | None = None, first_step: int = 0
    ) -> Tensor:
        """The few steps of a chunk, from noise or from a noised source (B, T, C, H, W)."""
        schedule = self.sampler.first_schedule if chunk == 0 else self.sampler.schedule
        timesteps = schedule.timesteps
        x = noise(frames, 0)
        if source is not None:
            x = schedule.add_noise(source, x, timesteps[first_step])
        for step, (t, t_next) in enumerate(pairwise((*timesteps, 0.0))):
            if step < first_step:
                continue
            self.announce(ModelCall(chunk, step, len(timesteps), clean=False))
            flow = self.sampler.model(x, t, self.context_of(chunk), cache=self.cache(x))
            x0 = schedule.to_x0(x, flow, t)
            x = schedule.add_noise(x0, noise(frames, step + 1), t_next) if t_next else x0
        return x

    def keep(self, latents: Tensor, chunk: int, prompt_chunk: int | None = None) -> None:
        """Write the keys of clean latents under the prompt of ``prompt_chunk`` (their own by default)."""
        prompt_chunk = chunk if prompt_chunk is None else prompt_chunk
        num_steps = len(self.sampler.schedule.timesteps)
        cache = self.cache(latents)
        self.announce(ModelCall(prompt_chunk, num_steps, num_steps, clean=True))
        cache.seek(chunk * self.sampler.frames_per_chunk)
        self.sampler.model(latents, 0.0, self.context_of(prompt_chunk), cache=cache)
        cache.commit()
        if self.remember:
            self.clean[chunk] = latents
            for old in [c for c in self.clean if not self._in_window(c, chunk)]:
                del self.clean[old]

    def recompute(self, chunk: int) -> None:
        """Make the window's keys again, under the prompt of ``chunk``."""
        window = dict(self.clean)
        assert self._cache is not None
        self._cache.reset()
        for index, latents in window.items():
            self.keep(latents, index, prompt_chunk=chunk)

    def cache(self, like: Tensor) -> ChunkCache:
        """The rollout's cache, made when the size of the latents is known."""
        if self._cache is None:
            s = self.sampler
            height, width = like.shape[-2:]
            self._cache = s.model.new_cache(height, width, s.window_frames, s.sink_frames, s.rope, self.num_frames)
        return self._cache

    def _in_window(self, chunk: int, newest: int) -> bool:
        s = self.sampler
        if s.window_frames is None:
            return True
        recent = (s.window_frames - s.sink_frames) // s.frames_per_chunk
        return chunk * s.frames_per_chunk < s.sink_frames or chunk > newest - recent
