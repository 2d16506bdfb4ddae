"""Data-parallel training on one machine.

Two processes of one thread each beat one process of two threads on a small CPU: the threads of one process wait for
each other after every operation, the processes only once an iteration.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


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
