"""The shifted flow-matching schedule of CausVid and Self-Forcing, and its few steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


class FlowMatchSchedule:
    """Noise levels of a rectified flow, ``x_t = (1 - sigma) x0 + sigma noise``.

    ``sigma_i = shift u / (1 + (shift - 1) u)`` with u from 1 down in 1000 steps, ``timestep = 1000 sigma``. A timestep
    that is not in this table takes the sigma of the nearest entry, as the public code does.

    Args:
        shift: of the table; 8 in CausVid, 5 in Self-Forcing.
        timesteps: the few steps of the sampler, falling, in 1..1000.
        warp: read ``timesteps`` as positions in the unshifted schedule: t becomes the table's entry 1000 - t
            (1000, 750, 500, 250 with shift 5 becomes 1000, 937.5, 833.3, 625).
        euler_steps: how many of the first steps keep their noise and follow the flow (Euler); the others guess the
            picture and renoise it, as consistency models do.
        without_history: the steps of a chunk with nothing before it, if they differ.
    """

    def __init__(
        self,
        shift: float,
        timesteps: Sequence[float],
        warp: bool = False,
        euler_steps: int = 0,
        without_history: FlowMatchSchedule | None = None,
    ) -> None:
        if not 0 < shift < math.inf:
            raise ValueError(f"shift must be positive, got {shift}")
        steps = list(timesteps)
        inside = all(0 < t <= NUM_TRAIN_TIMESTEPS for t in steps)
        if not steps or not inside or any(t <= t_next for t, t_next in pairwise(steps)):
            raise ValueError(f"timesteps must fall strictly and lie in (0, {NUM_TRAIN_TIMESTEPS}], got {steps}")
        if not 0 <= euler_steps < len(steps):
            raise ValueError(f"euler_steps must be from 0 to {len(steps) - 1}, fewer than the steps, got {euler_steps}")
        self.euler_steps = euler_steps
        self.without_history = without_history or self
        self.shift = shift
        u = torch.linspace(1, 0, NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64)[:-1]
        self._sigmas = shift * u / (1 + (shift - 1) * u)
        self._table = self._sigmas * NUM_TRAIN_TIMESTEPS
        self.timesteps: tuple[float, ...] = tuple(
            float(self._table[round(NUM_TRAIN_TIMESTEPS - t)]) if warp else float(t) for t in steps
        )

    def sigma(self, timestep: Tensor | float) -> Tensor:
        """Noise level of each timestep, float64, same shape. Timestep 0 is the clean picture: exactly 0."""
        t = torch.as_tensor(timestep, dtype=torch.float64)
        nearest = (self._table.to(t.device) - t.unsqueeze(-1)).abs().argmin(dim=-1)
        return torch.where(t == 0, torch.zeros_like(t), self._sigmas.to(t.device)[nearest])

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: Tensor | float) -> Tensor:
        """``(1 - sigma) x0 + sigma noise``; timestep a number, (B,) or (B, T) against (B, T, ...)."""
        sigma = self._broadcast(timestep, x0)
        return ((1 - sigma) * x0 + sigma * noise).to(x0.dtype)

    def to_x0(self, x_t: Tensor, flow: Tensor, timestep: Tensor | float) -> Tensor:
        """``x_t - sigma flow``: the clean picture that a predicted flow points at; same shapes as ``add_noise``."""
        return (x_t - self._broadcast(timestep, x_t) * flow).to(x_t.dtype)

    def step(self, x_t: Tensor, flow: Tensor, index: int, fresh: Callable[[], Tensor]) -> Tensor:
        """From timestep number ``index`` to the next, behind the last to the picture; ``fresh`` makes noise."""
        t = self.timesteps[index]
        if index < self.euler_steps:
            way = self._broadcast(self.timesteps[index + 1], x_t) - self._broadcast(t, x_t)
            return (x_t + way * flow).to(x_t.dtype)
        x0 = self.to_x0(x_t, flow, t)
        return x0 if index + 1 == len(self.timesteps) else self.add_noise(x0, fresh(), self.timesteps[index + 1])

    def _broadcast(self, timestep: Tensor | float, like: Tensor) -> Tensor:
        sigma = self.sigma(timestep).to(like.device)
        return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim)) if sigma.ndim else sigma
