"""Checkpoints of a training stage: written whole or not at all, read without executing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasa_video.files.atomic import atomic_write


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a state of tensors, numbers and containers; an interrupted write leaves the old file in place."""
    with atomic_write(path, parents=True) as part:
        torch.save(state, part)


def load_state(path: Path) -> dict[str, Any] | None:
    """The state saved at `path`, or None where there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


class Average:
    """An exponential moving average of a module's parameters, kept in float32.

    The decay warms up as (1 + n) / (10 + n), so that a short run does not average its own beginning.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.shadow = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards the module's present parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        named = [(name, p.detach().float()) for name, p in module.named_parameters()]
        torch._foreach_lerp_([self.shadow[name] for name, _ in named], [p for _, p in named], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Writes the average into a module of the same shape."""
        for name, p in module.named_parameters():
            p.copy_(self.shadow[name])

    def state_dict(self) -> dict[str, Any]:
        """State for `save_state`."""
        return {"updates": self.updates, "shadow": dict(self.shadow)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave."""
        self.updates = int(state["updates"])
        shadow: dict[str, Tensor] = state["shadow"]
        for name, value in shadow.items():
            self.shadow[name].copy_(value)
