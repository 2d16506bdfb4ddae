"""The few-step chunk loop: noise in, finished latents out, a chunk at a time."""

# B batch, T latent frames, C channels, H W latent height and width

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from causvid_adapter.errors import ShapeError
from causvid_adapter.noise import GivenNoise, NoiseSource
from causvid_adapter.schedule import FlowMatchSchedule
from causvid_adapter.window import UNLIMITED, OnChange, Window


class ChunkCache(Protocol):
    """History that a denoiser reads and stages into (one KVCache, or one a guidance branch)."""

    def commit(self) -> None: ...

    def reset(self) -> None: ...

    def seek(self, frame: int) -> None: ...


class Denoiser(Protocol):
    """What the sampler needs of a model: CausalWan itself, or something that wraps it, such as two-pass guidance."""

    def new_cache(self, height: int, width: int, window: Window, num_frames: int | None) -> ChunkCache: ...

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
        schedule: its few steps, and those of a chunk that nothing comes before.
        frames_per_chunk: latent frames of a chunk; 3 in CausVid.
        window: what a chunk may look back on.
        first_chunk_schedule: steps of a scene's first chunks, if they differ (``is_first_chunk`` of :meth:`stream`).

    Raises:
        ShapeError: the window has no room for the sink and a chunk.
    """

    def __init__(
        self,
        model: Denoiser,
        schedule: FlowMatchSchedule,
        frames_per_chunk: int = 3,
        window: Window = UNLIMITED,
        first_chunk_schedule: FlowMatchSchedule | None = None,
    ) -> None:
        if frames_per_chunk < 1:
            raise ShapeError(f"frames_per_chunk must be at least 1, got {frames_per_chunk}")
        window.check(frames_per_chunk)
        self.model = model
        self.schedule = schedule
        self.frames_per_chunk = frames_per_chunk
        self.window = window
        self.first_chunk_schedule = first_chunk_schedule or schedule

    @torch.no_grad()
    def stream(
        self,
        context: Context,
        noise: Tensor | NoiseSource,
        *,
        num_frames: int | None = None,
        prefix: Tensor | None = None,
        made_frames: int = 0,
        source: Tensor | None = None,
        first_step: int = 0,
        before_call: Callable[[ModelCall], None] | None = None,
        on_change: Callable[[int], OnChange] | None = None,
        is_first_chunk: Callable[[int], bool] | None = None,
    ) -> Iterator[Tensor]:
        """Yield the latents of each chunk, (B, frames_per_chunk, C, H, W), as soon as they are finished.

        Args:
            context: text embeddings, or a function of the chunk index (prompts may change between chunks).
            noise: start noise (B, T, C, H, W) of the frames to generate, or a source; a source without
                ``num_frames`` streams without end.
            num_frames: latent frames to generate, the prefix not counted.
            prefix: clean latents (B, T0, C, H, W) to continue; T0 is a multiple of frames_per_chunk.
            made_frames: latent frames at the end of the prefix that an interrupted stream like this one had made: its
                window becomes what it was then.
            source: clean latents (B, T, C, H, W) of a video to start from instead of pure noise (video to video);
                they are noised to the timestep of ``first_step``, and the steps before it are left out.
            before_call: told of every model call before it is made.
            on_change: asked before each chunk but the first: what becomes of the window. The prompt of the window's
                new keys is this chunk's. A given prefix cannot be regenerated: it is recached.
            is_first_chunk: which chunks, counted with the prefix, take the steps of ``first_chunk_schedule``, with
                what of the window is regenerated for them; by default the first that is neither given nor was made.

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
        self._check_whole_chunks("the made part of the prefix", made_frames)
        given = offset - made_frames
        if source is not None and num_frames is None:
            num_frames = source.shape[1] - offset
        total_frames = None if num_frames is None else offset + num_frames
        rollout = _Rollout(
            sampler=self,
            noise=noise,
            source=source,
            first_step=first_step,
            given_frames=given,
            context_of=context if callable(context) else lambda chunk: context,
            announce=before_call or (lambda call: None),
            remember=on_change is not None,
            num_frames=total_frames,
            is_first_chunk=is_first_chunk or (lambda chunk: chunk * size == given),
        )
        total = None if total_frames is None else total_frames // size
        for chunk in count() if total is None else range(total):
            if on_change is not None and chunk > 0 and chunk * size >= given:
                rollout.renew(chunk, on_change(chunk))
            if prefix is not None and chunk * size < offset:
                rollout.keep(prefix[:, chunk * size : (chunk + 1) * size], chunk)
                continue
            x = rollout.denoise(chunk)
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


@dataclass
class _Rollout:
    """State of one stream: its cache, and the clean latents from which the window's keys can be made again."""

    sampler: ChunkSampler
    noise: NoiseSource
    source: Tensor | None
    first_step: int
    given_frames: int
    context_of: Callable[[int], Tensor | None]
    announce: Callable[[ModelCall], None]
    remember: bool
    num_frames: int | None
    is_first_chunk: Callable[[int], bool]
    clean: dict[int, Tensor] = field(default_factory=dict)
    has_history: bool = False
    _cache: ChunkCache | None = None

    def denoise(self, chunk: int, prompt_chunk: int | None = None) -> Tensor:
        """The few steps of a chunk, from noise or from the noised source, under the prompt of ``prompt_chunk``."""
        prompt_chunk = chunk if prompt_chunk is None else prompt_chunk
        size = self.sampler.frames_per_chunk
        frames = range(chunk * size, (chunk + 1) * size)
        sampler = self.sampler
        schedule = sampler.first_chunk_schedule if self.is_first_chunk(prompt_chunk) else sampler.schedule
        schedule = schedule if self.has_history else schedule.without_history
        timesteps = schedule.timesteps
        x = self.noise(frames, 0)
        if self.source is not None:
            x = schedule.add_noise(self.source[:, frames.start : frames.stop], x, timesteps[self.first_step])
        cache = self.cache(x)
        cache.seek(frames.start)
        for step in range(self.first_step, len(timesteps)):
            self.announce(ModelCall(prompt_chunk, step, len(timesteps), clean=False))
            flow = self.sampler.model(x, timesteps[step], self.context_of(prompt_chunk), cache=cache)
            x = schedule.step(x, flow, step, partial(self.noise, frames, step + 1))
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
        self.has_history = True
        if self.remember:
            self.clean[chunk] = latents
            self.clean = self._in_window(chunk + 1, room=0)

    def renew(self, chunk: int, change: OnChange) -> None:
        """What becomes of the window before ``chunk``, which shows something new."""
        if change == "keep":
            return
        # What is regenerated is no more than the chunk will look back on; keys need the frames before theirs as well.
        room = self.sampler.frames_per_chunk if change == "regenerate" else 0
        window, self.clean = self._in_window(chunk, room), {}
        assert self._cache is not None
        self._cache.reset()
        self.has_history = False
        for index, latents in window.items():
            given = index * self.sampler.frames_per_chunk < self.given_frames
            again = change == "regenerate" and not given
            self.keep(self.denoise(index, chunk) if again else latents, index, prompt_chunk=chunk)

    def cache(self, like: Tensor) -> ChunkCache:
        """The rollout's cache, made when the size of the latents is known."""
        if self._cache is None:
            s = self.sampler
            height, width = like.shape[-2:]
            self._cache = s.model.new_cache(height, width, s.window, self.num_frames)
        return self._cache

    def _in_window(self, chunk: int, room: int) -> dict[int, Tensor]:
        """The latents that the window holds before ``chunk`` when it has room for ``room`` further frames."""
        size = self.sampler.frames_per_chunk
        seen = self.sampler.window.seen(chunk * size + room)

        def held(index: int) -> bool:
            return any(frame in part for part in seen for frame in range(index * size, (index + 1) * size))

        return {index: latents for index, latents in self.clean.items() if held(index)}
