"""A network that is trained: its weights, its optimiser, and its moving average; saved so that it goes on exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nasa_video.errors import InputError
from nasa_video.train.fleet import Fleet, part_like, whole
from nasa_video.train.optimiser import Muon, block_matrix
from nasa_video.train.settings import Optimiser


def rate_at(settings: Optimiser, progress: float) -> float:
    """Learning rate's scale at a share of the run: a rise, a plateau, a straight fall."""
    if progress < settings.warmup:
        return progress / settings.warmup
    if progress < settings.flat or settings.flat == 1:
        return 1.0
    return 1 - (1 - settings.last) * (progress - settings.flat) / (1 - settings.flat)


class Player:
    """One trained network.

    Args:
        model: its weights that need no gradient are not touched, saved or averaged.
        average_decay: of an exponential moving average of what is trained, in float32; None keeps none. It warms up as
            (1 + n) / (10 + n), so that a short run does not average its own beginning.
    """

    def __init__(self, model: nn.Module, settings: Optimiser, fleet: Fleet, average_decay: float | None = None) -> None:
        self.model, self.settings, self.fleet = model, settings, fleet
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise InputError("nothing is left to train: every weight of the network is frozen")
        self.optimisers = _optimisers(self.trained, settings)
        self.decay, self.updates = average_decay, 0
        self.shadow = {} if average_decay is None else {n: p.detach().float().clone() for n, p in self.trained.items()}

    def step(self, progress: float) -> float:
        """Average the gradients over the fleet, clip, update; returns their norm. Gradients not finite are dropped."""
        self.fleet.average_gradients(self.model)
        norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), self.settings.clip)
        size = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        if math.isfinite(size):
            for optimiser in self.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = group["own_rate"] * rate_at(self.settings, progress)
                optimiser.step()
            self._follow()
        self.model.zero_grad(set_to_none=True)
        return size

    @torch.no_grad()
    def _follow(self) -> None:
        self.updates += 1
        if self.decay is not None:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            for name, p in self.trained.items():
                self.shadow[name].lerp_(p.detach().float(), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The model with its average inside the scope; what was there comes back, bit for bit, also after an error."""
        before = {name: p.detach().clone() for name, p in self.trained.items()}
        try:
            _write(self.trained, self.shadow)
            yield self.model
        finally:
            _write(self.trained, before)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, in whole tensors on the CPU; every process has to call this."""
        state = {
            "updates": self.updates,
            "trained": dict(self.trained),
            "shadow": dict(self.shadow),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        return dict(whole(state, keep=self.fleet.leads))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` gave, whatever the number of processes was then.

        Raises:
            InputError: it is of another network or optimiser.
        """
        if state["trained"].keys() != self.trained.keys() or len(state["optimisers"]) != len(self.optimisers):
            raise InputError("the checkpoint is of another network or optimiser; choose another folder to start anew")
        self.updates = int(state["updates"])
        for own, saved in ((self.trained, state["trained"]), (self.shadow, state["shadow"])):
            _write(own, {name: part_like(value, own[name]) for name, value in saved.items()})
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            parameters = [p for group in optimiser.param_groups for p in group["params"]]
            entries = {
                index: {name: _like_parameter(value, parameters[index]) for name, value in entry.items()}
                for index, entry in saved["state"].items()
            }
            optimiser.load_state_dict({"state": entries, "param_groups": saved["param_groups"]})


def _like_parameter(value: Any, parameter: Tensor) -> Any:
    same = isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim > 0
    return part_like(value, parameter) if same else value


@torch.no_grad()
def _write(into: dict[str, Any], values: dict[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(values[name])


def _optimisers(trained: dict[str, nn.Parameter], settings: Optimiser) -> list[torch.optim.Optimizer]:
    rate, rest = settings.rate, settings.other_rate or settings.rate
    made: list[torch.optim.Optimizer] = []
    others = list(trained.values())
    if settings.kind == "matrix":
        inner = [p for name, p in trained.items() if block_matrix(name, p)]
        others = [p for name, p in trained.items() if not block_matrix(name, p)]
        made.append(Muon(inner, lr=rate, weight_decay=settings.weight_decay))
        rate = rest
    decay = settings.weight_decay
    made.append(torch.optim.AdamW(others, lr=rate, betas=settings.betas, weight_decay=decay, foreach=False))
    for optimiser in made:
        for group in optimiser.param_groups:
            group["own_rate"] = group["lr"]
    return made
