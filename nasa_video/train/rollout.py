"""The student's own rollouts, with a gradient through one step of each chunk (Self-Forcing, arXiv 2506.08009)."""

# B batch, T latent frames, C channels, h w latent height and width, S tokens, H heads, D head dim

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from causvid_adapter import CausalWan, FlowMatchSchedule, KVCache
from causvid_adapter.window import UNLIMITED, Window


class FrozenHistory(KVCache):
    """What one pass looks back on, kept as it is now: the pass stages nothing, and may be computed a second time.

    Gradient checkpointing runs a block again in the backward pass, when the cache holds later chunks too, or, with a
    window, has moved its frames along: silently other keys. Views are enough where committed frames stay in place.

    Args:
        cache: the history; room for the coming chunk is made in it.
        chunk_frames: latent frames of the pass.
        copy: keep copies, where the frames of ``cache`` will move before the second run.
    """

    def __init__(self, cache: KVCache, chunk_frames: int, *, copy: bool) -> None:
        cache.begin(chunk_frames)
        super().__init__(cache.num_layers, cache.tokens_per_frame, cache.window)
        self.held, self.next_frame = list(cache.held), cache.next_frame
        self._kept: list[tuple[Tensor, Tensor]] = []
        if self.frames_held:
            pairs = (cache.history(layer) for layer in range(cache.num_layers))
            self._kept = [(k.detach().clone(), v.detach().clone()) if copy else (k, v) for k, v in pairs]

    def begin(self, chunk_frames: int) -> None:
        """Note the chunk's length; room was made in the cache that was copied."""
        self._chunk_frames = chunk_frames

    def extend(self, layer: int, k_BSHD: Tensor, v_BSHD: Tensor) -> tuple[Tensor, Tensor]:
        """History and the given chunk together, (B, S_history + S, H, D); no gradient reaches the history."""
        if not self._kept:
            return k_BSHD, v_BSHD
        keys, values = self._kept[layer]
        return torch.cat([keys.detach(), k_BSHD], dim=1), torch.cat([values.detach(), v_BSHD], dim=1)

    def commit(self) -> None:
        """A frozen history never grows."""
        raise RuntimeError("commit to the cache itself, after its clean pass")


@dataclass(frozen=True)
class RolloutPlan:
    """How a clip is rolled out.

    Attributes:
        schedule: the few steps.
        exit_step: after which every chunk stops; the only step with a gradient. Where the first chunk has Euler steps,
            it stops behind them at the earliest: they lead to noise, not to a clean chunk.
        frames_per_chunk, window: as in causvid_adapter.ChunkSampler.
    """

    schedule: FlowMatchSchedule
    exit_step: int
    frames_per_chunk: int = 3
    window: Window = UNLIMITED


def roll_out(
    student: CausalWan,
    context: Tensor,
    noise: Tensor,
    plan: RolloutPlan,
    generator: torch.Generator,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """A clip (B, T, C, h, w) by the student, float32.

    Every chunk stops at the same step, whose x0 is its result. Later chunks see keys from a pass without a gradient on
    that result, so that no gradient passes from a chunk to an earlier one. Where gradients are off, none is kept.

    Args:
        context: (B, L, E), or (B * chunks, L, E) for a text a chunk; 2 L inside a scope of ``guided_training``.
        noise: (B, T, C, h, w), T whole chunks.
        generator: of the noise between steps.
        autocast: makes the context of every model call.
    """
    size = plan.frames_per_chunk
    with_gradient = torch.is_grad_enabled()
    height, width = noise.shape[-2:]
    cache = student.new_cache(height, width, plan.window, noise.shape[1])
    texts = context.unflatten(0, (len(noise), -1))
    chunks: list[Tensor] = []
    for start in range(0, noise.shape[1], size):
        text = texts[:, min(start // size, texts.shape[1] - 1)]
        x = noise[:, start : start + size]
        schedule = plan.schedule if start else plan.schedule.without_history
        exit_step = max(plan.exit_step, schedule.euler_steps)
        for step, t in enumerate(schedule.timesteps[: exit_step + 1]):
            last = step == exit_step
            # committed frames move only in a window, and only a pass with a gradient may be run again
            moves = last and with_gradient and plan.window.frames is not None
            history = FrozenHistory(cache, size, copy=moves)
            with torch.set_grad_enabled(last and with_gradient), autocast():
                flow = student(x, t, text, cache=history)
            if last:
                x = schedule.to_x0(x, flow.float(), t)
            else:
                x = schedule.step(x, flow.float(), step, partial(_fresh_noise, x, generator))
        chunks.append(x)
        if start + size < noise.shape[1]:
            with torch.no_grad(), autocast():
                student(x.detach(), 0.0, text, cache=cache)
            cache.commit()
    return torch.cat(chunks, dim=1)


def _fresh_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like)
