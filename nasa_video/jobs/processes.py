"""The processes of one run: which one this is, which device and which share of the work are its own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nasa_video.errors import InputError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_LAUNCHERS = (TORCHRUN, ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))


@dataclass(frozen=True)
class Processes:
    """This process among those of its run; one of one where nothing else is said."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] | None = None) -> Processes:
        """What torchrun, or else Slurm, tells each of its processes; half of a pair is none.

        Raises:
            InputError: the variables are no numbers.
        """
        environment = os.environ if environment is None else environment
        for names in _LAUNCHERS:
            if names[0] in environment and names[1] in environment:
                try:
                    return cls(*(int(environment.get(name, "0")) for name in names))
                except ValueError as error:
                    raise InputError(
                        f"{', '.join(names)} must be numbers, as their launcher sets them: {error}"
                    ) from None
        return cls()

    def device(self, wanted: str | None) -> str | None:
        """The process's own device: of several GPUs, the one of its number on this machine."""
        import torch

        if wanted in (None, "cuda") and torch.cuda.is_available() and self.world > 1:
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return wanted


@contextmanager
def process_group(device: str | None) -> Iterator[Processes]:
    """Join the processes of a torchrun: nccl between GPUs, gloo between CPUs.

    Raises:
        InputError: this is no process of a torchrun.
    """
    import torch
    import torch.distributed as dist

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


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 0) of ``count``; each job is in exactly one."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"a shard is i/n with n of 1 or more, got {self}")
        if not 0 <= self.index < self.count:
            raise InputError(
                f"a shard is i/n with i from 0 to n - 1, got {self}; the {self.count} shards are 0/{self.count} to "
                f"{self.count - 1}/{self.count}"
            )

    @classmethod
    def choose(cls, text: str | None, environment: Mapping[str, str] | None = None) -> Shard:
        """The shard ``i/n`` that was asked for; else this process's part of its run; else everything.

        Raises:
            InputError: neither ``i/n`` nor variables that make one.
        """
        if text is None:
            own = Processes.of_environment(environment)
            return cls(own.rank, own.world)
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if found is None:
            raise InputError(f"--shard must be i/n, such as 0/4 for the first of four shards, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def of(self, jobs: Sequence[Any]) -> list[Any]:
        """This shard's jobs: every ``count``-th, so that shards are of like size and mix."""
        return list(jobs[self.index :: self.count])

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"
