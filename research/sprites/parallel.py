"""Data-parallel training on one machine.

Two processes of one thread each beat one process of two threads on a small CPU: the threads of one process wait for
each other after every operation, the processes only once an iteration.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes that train together; a team of one needs no communication."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @torch.no_grad()
    def average_gradients(self, module: nn.Module) -> None:
        """Replaces every gradient by its mean over the team."""
        if self.size == 1:
            return
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            dist.barrier()


def join_team(rank: int, size: int, meeting_point: Path) -> Team:
    """Meets the other processes at a file that none of them has used before."""
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting_point.absolute()}", rank=rank, world_size=size)
    return Team(rank, size)


def made_ahead(items: Dataset[T], steps: range, device: torch.device) -> Iterable[T]:
    """The items of these steps in order, made ahead by other processes where a GPU trains.

    On a CPU the cores are busy training. Items travel as they are: tensors in them would take shared memory, of which
    containers have little, arrays do not.
    """
    workers = 0 if device.type == "cpu" else min(8, max(1, (os.cpu_count() or 2) - 2))
    ahead = 8 if workers else None
    return DataLoader(
        items, batch_size=None, sampler=steps, num_workers=workers, prefetch_factor=ahead, collate_fn=_as_it_is
    )


def _as_it_is(item: T) -> T:
    return item
