"""What the stages that train a student share: their loop, their checkpoint, and the average that comes of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar

from torch.utils.data import Dataset

from causvid_adapter import CausalWan
from nasa_video.train.checkpoint import Average, load_state, save_state
from nasa_video.train.journal import Journal
from research.sprites.parallel import Team, made_ahead

D = TypeVar("D")


class StageSettings(Protocol):
    """How long a stage is, and how often it is saved and shown."""

    @property
    def iterations(self) -> int:
        """Iterations in all."""
        ...

    @property
    def checkpoint_every(self) -> int:
        """Iterations between checkpoints."""
        ...

    @property
    def sheet_every(self) -> int:
        """Iterations between contact sheets."""
        ...


class Stage(ABC, Generic[D]):
    """A stage that trains `student`; `PARTS` names the attributes whose state goes on changing."""

    PARTS: ClassVar[tuple[str, ...]]
    team: Team
    student: CausalWan
    average: Average
    draws: Dataset[D]

    @abstractmethod
    def iterate(self, step: int, drawn: D) -> dict[str, float]:
        """One iteration; returns what the journal records."""

    def save(self, path: Path, step: int) -> None:
        """Writes everything that goes on changing."""
        save_state(path, {"step": step, **{name: getattr(self, name).state_dict() for name in self.PARTS}})

    def load(self, path: Path) -> int:
        """Continues from a file where there is one; returns the iterations done."""
        state = load_state(path)
        if state is None:
            return 0
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        return int(state["step"])

    def run(
        self,
        settings: StageSettings,
        averaged: CausalWan,
        path: Path,
        journal: Journal,
        show: Callable[[CausalWan, int], None] | None = None,
    ) -> CausalWan:
        """Trains to the end, writes the student's average into `averaged` and returns it.

        Resumes from the checkpoint at `path`.
        """
        steps = range(self.load(path) + 1, settings.iterations + 1)
        for step, drawn in zip(steps, made_ahead(self.draws, steps, self.student.device), strict=True):
            values = self.iterate(step, drawn)
            if not self.team.leads:
                continue
            journal.record(step, settings.iterations, values)
            if step % settings.checkpoint_every == 0 or step == settings.iterations:
                self.save(path, step)
            if show is not None and (step % settings.sheet_every == 0 or step == settings.iterations):
                self.average.copy_to(averaged)
                show(averaged, step)
        self.team.wait()
        self.average.copy_to(averaged)
        return averaged
