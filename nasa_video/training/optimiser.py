"""One optimiser for a transformer: Muon for its inner matrices, AdamW for everything else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


class MatrixOptimiser:
    """Muon (orthogonalised momentum) on the blocks' two-dimensional weights, AdamW on the rest, with one schedule.

    Args:
        model: the module whose parameters are trained; matrices under a name with "blocks." go to Muon.
        matrix_rate: Muon's learning rate, scaled so that updates have AdamW's size.
        other_rate: AdamW's learning rate.
        betas: AdamW's momenta.
        decay: weight decay of both.
    """

    def __init__(
        self,
        model: nn.Module,
        matrix_rate: float,
        other_rate: float,
        betas: tuple[float, float] = (0.9, 0.98),
        decay: float = 0.01,
    ) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if "blocks." in n and p.dim() == 2]
        others = [p for n, p in named if not ("blocks." in n and p.dim() == 2)]
        self.rates = (matrix_rate, other_rate)
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=other_rate, betas=betas, weight_decay=decay),
        )
        self.parameters = [p for _, p in named]

    def step(self, scale: float, clip: float = 1.0) -> float:
        """One update at `scale` times the learning rates, gradients clipped; returns the gradients' norm."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, clip))
        if not math.isfinite(norm):
            self.zero_grad()
            return norm
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * scale
            part.step()
        self.zero_grad()
        return norm

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def warm_then_linear(progress: float, warmup: float = 0.02, last: float = 0.02, flat: float = 0.4) -> float:
    """Learning rate's scale at a share of the run: a short rise, a plateau, then a straight fall to `last`."""
    if progress < warmup:
        return progress / warmup
    if progress < flat:
        return 1.0
    return 1 - (1 - last) * (progress - flat) / (1 - flat)
