"""One optimiser for a network: orthogonalised momentum for its inner weights, AdamW for everything else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Matrices (..., M, N) with their singular values moved to about one: the quintic Newton-Schulz iteration of Muon.

    K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = _NEWTON_SCHULZ
    upright = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if upright else matrix
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = (x.mT if upright else x).to(matrix.dtype)
    return result


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for weights of two or more dimensions (convolutions count as (out, everything else)).

    Updates are scaled to the root mean square of AdamW's (arXiv 2502.16982), so that learning rates are alike.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; `closure` is not used."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(parameter.shape)].append(parameter)
            for alike in by_shape.values():
                self._update(alike, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Parameters of one shape at once: on a GPU many small products take longer to start than to make."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
        updates = orthogonalise(torch.stack([n.flatten(1) for n in nesterov]))
        updates *= group["lr"] * 0.2 * math.sqrt(max(updates.shape[1:]))
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(parameters, [u.view_as(p) for u, p in zip(updates, parameters, strict=True)])


class MatrixOptimiser:
    """Muon on a network's inner weights, AdamW on the rest, with one schedule.

    Args:
        model: the module whose parameters are trained.
        inner: whether a parameter, given its name, goes to Muon.
        matrix_rate: Muon's learning rate.
        other_rate: AdamW's learning rate.
        betas: AdamW's momenta.
        decay: weight decay of both.
    """

    def __init__(
        self,
        model: nn.Module,
        inner: Callable[[str, nn.Parameter], bool],
        matrix_rate: float,
        other_rate: float,
        betas: tuple[float, float] = (0.9, 0.98),
        decay: float = 0.01,
    ) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.rates = (matrix_rate, other_rate)
        self.parts: tuple[torch.optim.Optimizer, ...] = (
            Muon([p for n, p in named if inner(n, p)], lr=matrix_rate, weight_decay=decay),
            torch.optim.AdamW([p for n, p in named if not inner(n, p)], lr=other_rate, betas=betas, weight_decay=decay),
        )
        self.parameters = [p for _, p in named]

    def step(self, scale: float, clip: float = 1.0) -> float:
        """One update at `scale` times the learning rates, gradients clipped; returns the gradients' norm.

        Gradients that are not finite are dropped.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, clip))
        if math.isfinite(norm):
            for part, rate in zip(self.parts, self.rates, strict=True):
                for group in part.param_groups:
                    group["lr"] = rate * scale
                part.step()
        for part in self.parts:
            part.zero_grad(set_to_none=True)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """A matrix inside a transformer's blocks."""
    return "blocks." in name and parameter.dim() == 2


def inner_convolution(name: str, parameter: nn.Parameter) -> bool:
    """A convolution's weight that neither reads nor writes pixels."""
    outer = name in ("encoder.conv_in.weight", "decoder.conv_out.weight")
    return parameter.dim() >= 3 and min(parameter.shape[:2]) > 1 and not outer


def warm_then_linear(progress: float, warmup: float = 0.02, last: float = 0.02, flat: float = 0.4) -> float:
    """Learning rate's scale at a share of the run: a short rise, a plateau, then a straight fall to `last`."""
    if progress < warmup:
        return progress / warmup
    if progress < flat:
        return 1.0
    return 1 - (1 - last) * (progress - flat) / (1 - flat)
