"""The processes of a torchrun: which one this is, which device is its own, and how they find each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nasa_video.errors import InputError


@dataclass(frozen=True)
class Processes:
    """This process among those of its run; one of one where nothing else is said."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Processes:
        """What torchrun tells each of its processes.

        Raises:
            InputError: the variables are no numbers.
        """
        try:
            rank, world, local = (
                int(os.environ.get(name, default))
                for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
            )
        except ValueError as error:
            raise InputError(
                f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, as torchrun sets them: {error}"
            ) from error
        return cls(rank, world, local)

    def device(self, wanted: str | None) -> str | None:
        """The process's own device: of several GPUs, the one of its number on this machine."""
        if wanted in (None, "cuda") and torch.cuda.is_available() and self.world > 1:
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return wanted


@contextmanager
def process_group(device: str | None) -> Iterator[Processes]:
    """Join the processes of a torchrun: nccl between GPUs, gloo between CPUs.

    Raises:
        InputError: this is no process of a torchrun.
    """
    own = Processes.of_environment()
    if "MASTER_ADDR" not in os.environ:
        raise InputError(
            "--split makes one video on several devices; start it with: torchrun --nproc-per-node N -m nasa_video "
            "generate …"
        )
    place = torch.device(own.device(device) or "cpu")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    try:
        yield own
        dist.barrier()  # nobody takes connections down that a peer still uses: gloo has aborted a process here, once
    finally:
        dist.destroy_process_group()
