"""What all stages of the sprites training share: their optimisers, their loop, and their checkpoint.

Data-parallel on one machine: two processes of one thread each beat one process of two threads on a small CPU: the
threads of one process wait for each other after every operation, the processes only once an iteration.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from causvid_adapter import CausalWan
from nasa_video.train.curves import Curves
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.run import Report
from nasa_video.train.settings import Optimiser
from nasa_video.train.state import TrainState, load_state, save_state, split_optimisers

D = TypeVar("D")
T = TypeVar("T")


class StageSettings(Protocol):
    """How long a stage is, and how often it is saved."""

    @property
    def iterations(self) -> int:
        """Iterations in all."""
        ...

    @property
    def checkpoint_every(self) -> int:
        """Iterations between checkpoints."""
        ...


class Part(Protocol):
    """Something whose state goes on changing."""

    def state_dict(self) -> Mapping[str, Any]:
        """For a checkpoint."""
        ...

    def load_state_dict(self, state: Any) -> None:
        """From a checkpoint."""
        ...


def matrix_optimiser(
    rate: float, other_rate: float, betas: tuple[float, float] = (0.9, 0.98), flat: float = 0.4
) -> Optimiser:
    """Muon and AdamW with a short rise, a plateau up to ``flat`` of the run, and a straight fall."""
    return Optimiser(
        kind="matrix", rate=rate, other_rate=other_rate, betas=betas, weight_decay=0.01, warmup=0.02, flat=flat,
        last=0.02,
    )  # fmt: skip


class ConvolutionMuon(torch.optim.Muon):
    """PyTorch's Muon, which takes matrices, for convolutions: each counts as a matrix (out, everything else)."""

    def __init__(self, params: Iterable[nn.Parameter], **settings: Any) -> None:
        self.weights = list(params)
        super().__init__([nn.Parameter(w.detach().flatten(1).clone()) for w in self.weights], **settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; ``closure`` is not used."""
        matrices = self.param_groups[0]["params"]
        for matrix, weight in zip(matrices, self.weights, strict=True):
            matrix.copy_(weight.flatten(1))
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step()
        for matrix, weight in zip(matrices, self.weights, strict=True):
            weight.copy_(matrix.view_as(weight))


def convolution_optimisers(trained: Mapping[str, nn.Parameter], settings: Optimiser) -> list[torch.optim.Optimizer]:
    """Muon for convolutions that neither read nor write pixels, AdamW for the rest."""
    outer = ("encoder.conv_in.weight", "decoder.conv_out.weight")
    inner = {n for n, p in trained.items() if p.dim() >= 3 and min(p.shape[:2]) > 1 and n not in outer}
    return split_optimisers(trained, settings, inner, ConvolutionMuon)


def run_steps(
    parts: Mapping[str, Part],
    iterate: Callable[[int, Any], dict[str, float]],
    settings: StageSettings,
    path: Path,
    context: DistributedContext,
    report: Report | None = None,
    draws: Dataset[Any] | None = None,
    show: Callable[[int], None] | None = None,
) -> None:
    """Run a stage to its end; resumes from the checkpoint at ``path``, beside which its curves are.

    Args:
        iterate: one iteration, of the step and what was drawn for it; returns values for the curves.
        draws: what is drawn for each step; None draws nothing.
        show: called every ``sheet_every`` iterations and after the last one, in the first process.
    """
    saved = load_state(path)
    for name, part in parts.items() if saved else ():
        part.load_state_dict(saved[name])  # type: ignore[index]
    start = int(saved["step"]) if saved else 0
    steps = range(start + 1, settings.iterations + 1)
    curves = Curves(path.parent, start, 50, path.stem) if context.leads else None
    for step, drawn in zip(steps, steps if draws is None else made_ahead(draws, steps, context.device), strict=True):
        values, last = iterate(step, drawn), step == settings.iterations
        if step % settings.checkpoint_every == 0 or last:
            state = {name: part.state_dict() for name, part in parts.items()}
            if context.leads:
                save_state(path, {"step": step, **state})
        if curves is None:
            continue
        curves.record(step, values, last)
        if report is not None:
            report(step, settings.iterations, values)
        if show is not None and (step % settings.sheet_every == 0 or last):  # type: ignore[attr-defined]
            show(step)
    context.wait()


class Stage(ABC, Generic[D]):
    """A stage that trains ``student``; ``PARTS`` names the attributes whose state goes on changing."""

    PARTS: ClassVar[tuple[str, ...]] = ("state",)
    context: DistributedContext
    student: CausalWan
    state: TrainState
    draws: Dataset[D]

    @abstractmethod
    def iterate(self, step: int, drawn: D) -> dict[str, float]:
        """One iteration; returns values for the curves."""

    def run(
        self,
        settings: StageSettings,
        averaged: CausalWan,
        path: Path,
        report: Report | None = None,
        show: Callable[[CausalWan, int], None] | None = None,
    ) -> CausalWan:
        """Train to the end, write the student's average into ``averaged`` and return it."""

        def show_average(step: int) -> None:
            if show is not None:
                self.state.copy_average_to(averaged)
                show(averaged, step)

        parts = {name: getattr(self, name) for name in self.PARTS}
        run_steps(parts, self.iterate, settings, path, self.context, report, self.draws, show_average)
        self.state.copy_average_to(averaged)
        return averaged


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


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 matrix products and convolutions on this device."""
    return torch.autocast(device.type, torch.bfloat16)


def per_clip(values_B: Tensor) -> Tensor:
    """(B,) against clips (B, T, C, h, w)."""
    return values_B[:, None, None, None, None]
