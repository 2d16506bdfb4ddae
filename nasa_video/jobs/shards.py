"""A share of the jobs: of several processes or machines that work on one list."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nasa_video.errors import InputError


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 0) of ``count``; each job is in exactly one."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise InputError(
                f"a shard is i/n with i from 0 to n - 1, got {self.index}/{self.count}; "
                f"the {self.count} shards are 0/{self.count} to {self.count - 1}/{self.count}"
                if self.count > 0
                else f"a shard is i/n with n of 1 or more, got {self.index}/{self.count}"
            )

    @classmethod
    def choose(cls, text: str | None, environment: Mapping[str, str] | None = None) -> Shard:
        """The shard ``i/n`` that was asked for; else the one of torchrun's or Slurm's variables; else everything.

        RANK and WORLD_SIZE come before SLURM_PROCID and SLURM_NTASKS.

        Raises:
            InputError: neither ``i/n`` nor variables that make one.
        """
        if text is not None:
            return cls._parse(text, "--shard")
        environment = os.environ if environment is None else environment
        for index, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if index in environment and count in environment:
                return cls._parse(f"{environment[index]}/{environment[count]}", f"{index}/{count}")
        return cls()

    @classmethod
    def _parse(cls, text: str, source: str) -> Shard:
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if found is None:
            raise InputError(f"{source} must be i/n, such as 0/4 for the first of four shards, got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def of(self, jobs: Sequence[Any]) -> list[Any]:
        """This shard's jobs: every ``count``-th, so that shards are of like size and mix."""
        return list(jobs[self.index :: self.count])

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"
