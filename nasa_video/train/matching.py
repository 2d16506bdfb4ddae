"""The formulas of distribution matching, for flows and for noise predictions."""

# B batch, everything after it is the sample

from __future__ import annotations

import torch
from torch import Tensor


def per_sample(values_B: Tensor, like: Tensor) -> Tensor:
    """(B,) against (B, ...)."""
    return values_B.to(like.device, torch.float32).reshape(-1, *(1,) * (like.ndim - 1))


def guided_target(x_pos: Tensor, x_neg: Tensor, kappa_B: Tensor) -> Tensor:
    """``(1 - kappa) x(y-) + kappa x(y)``: the teacher with the negative in its guidance (arXiv 2412.02687, sec. 5.3).

    Holds for clean estimates as well as for noise or flow predictions.
    """
    kappa = per_sample(kappa_B, x_pos)
    return (1 - kappa) * x_neg + kappa * x_pos


def matching_direction(sample: Tensor, x_real: Tensor, x_fake: Tensor) -> Tensor:
    """DMD's gradient ``(x_fake - x_real) / mean |sample - x_real|``, by sample (arXiv 2311.18828, eq. 7 and 8)."""
    size = (sample - x_real).abs().flatten(1).mean(1)
    return torch.nan_to_num((x_fake - x_real) / (per_sample(size, sample) + 1e-6))


def score_direction(eps_real: Tensor, eps_fake: Tensor, weight_B: Tensor) -> Tensor:
    """Variational score distillation's ``w (eps_teacher - eps_lora)`` (arXiv 2305.16213, eq. 9; 2412.02687, sec. 5.3).

    A sample moves against it: where the teacher sees more noise in it than the LoRA teacher does, it is taken out.
    """
    return torch.nan_to_num(per_sample(weight_B, eps_real) * (eps_real - eps_fake))


def descend(sample: Tensor, direction: Tensor) -> Tensor:
    """A loss whose gradient with respect to the sample is the direction, over the number of elements."""
    target = (sample - direction).detach()
    return 0.5 * (sample.double() - target.double()).square().mean().float()


def stratified(batch: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers (B,), one in each of B equal parts of [0, 1], shuffled: less noise than B free draws."""
    u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return u[torch.randperm(batch, generator=generator)]


def shifted(u: Tensor, shift: float) -> Tensor:
    """Noise level of a uniform draw: ``shift u / (1 + (shift - 1) u)``, as in causvid_adapter's schedule."""
    return shift * u / (1 + (shift - 1) * u)
