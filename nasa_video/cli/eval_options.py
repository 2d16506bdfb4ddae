"""What the evaluation commands share: options, progress, and the run of a benchmark from jobs to a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasa_video.cli.console import console, emit_json, say, shown_warnings
from nasa_video.cli.options import AsJsonOption, DeviceOption

if TYPE_CHECKING:
    from nasa_video.evaluation.benchmarks.base import Benchmark, Run
    from nasa_video.evaluation.results import Results
    from nasa_video.evaluation.samples import Model
    from nasa_video.jobs.processes import Shard
    from nasa_video.jobs.store import Outcome, Tell

MethodsOption = Annotated[
    str, typer.Option(help="Methods side by side: none,nasa:0.8 or 'none; nasa-centred:0.5,limit=0.3'.")
]
FolderOption = Annotated[Path, typer.Option("-o", "--output", help="Folder of everything; a rerun goes on there.")]


@dataclass(frozen=True)
class RunOptions:
    """How a benchmark is made."""

    steps: Annotated[str | None, typer.Option(help="Comma list of step counts.", show_default="the model's")] = None
    frames: Annotated[int | None, typer.Option(help="Length of a video.", show_default="the model's")] = None
    device: DeviceOption = None
    shard: Annotated[
        str | None, typer.Option(help="i/n: only this part, i from 0.", show_default="RANK or SLURM variables, or all")
    ] = None
    engine: Annotated[str, typer.Option(help="local, or ray: one actor a GPU of a cluster.")] = "local"
    as_json: AsJsonOption = False

    @property
    def counts(self) -> list[int | None]:
        """The step counts; None is the model's own.

        Raises:
            InputError: a word is no whole number.
        """
        from nasa_video.errors import InputError

        try:
            return [int(word) for word in words(self.steps or "")] or [None]
        except ValueError:
            raise InputError(f"steps must be whole numbers, got {self.steps!r}") from None

    def run(self, folder: Path, tell: Callable[[str], Tell] | None = None) -> Run:
        """Where and how it runs; InputError for an unknown engine or shard."""
        from nasa_video.errors import InputError
        from nasa_video.evaluation.benchmarks.base import Run
        from nasa_video.jobs.processes import Shard
        from nasa_video.jobs.store import ENGINES

        if self.engine not in ENGINES:
            raise InputError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        return Run(folder, Shard.choose(self.shard), self.engine, tell)


@dataclass(frozen=True)
class AnyModelOptions(RunOptions):
    """How a benchmark of videos or stills is made."""

    base: Annotated[Path | None, typer.Option(help="Of an image model: its base pipeline's folder.")] = None
    weights: Annotated[Path | None, typer.Option(help="Of an image model: its own weights on this machine.")] = None

    def model(self, name: str, first_steps: int | None = None) -> Model:
        """The model; InputError as :func:`model_of`."""
        from nasa_video.evaluation.samples import model_of

        return model_of(name, self.device, self.frames, self.base, self.weights, first_steps)


def words(text: str) -> list[str]:
    """A comma list."""
    return [word.strip() for word in text.split(",") if word.strip()]


@contextmanager
def job_progress(totals: Mapping[str, int]) -> Iterator[Callable[[str], Tell]]:
    """Bars by name; gives what makes ``tell`` for a bar."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with shown_warnings(), Progress(*columns, console=console, transient=True) as progress:

        def bar(name: str) -> Tell:
            task = progress.add_task(name, total=totals[name])
            return lambda record, made: progress.advance(task)

        yield bar


def run_benchmark(benchmark: Benchmark, model: Model, methods: str, folder: Path, options: RunOptions) -> None:
    """Make, measure, and where everything is there, write the results and say the table."""
    from nasa_video.evaluation.benchmarks.base import make_and_measure
    from nasa_video.evaluation.samples import methods_of

    plan = model.plan(benchmark.samples, methods_of(methods, model.preset), options.counts)
    count = len(options.run(folder).shard.of(plan))
    with job_progress({"make": count, "measure": count}) as bar:
        run = options.run(folder, bar)
        done = make_and_measure(plan, model, benchmark, run)
    say_made(done.generation)
    if done.missing:
        left_to_others(run.shard, done.missing, folder, options.as_json)
        return
    finish(benchmark.results(done, plan, {"methods": methods}), folder, options.as_json)


def say_made(outcome: Outcome) -> None:
    """How many were made and how many were there."""
    damaged = f" ({outcome.remade} were there, damaged)" if outcome.remade else ""
    say(f"{outcome.made} made{damaged}, {outcome.found} found finished")


def left_to_others(shard: Shard, missing: int, folder: Path, as_json: bool) -> None:
    """Say that a shard is done and the table must wait."""
    say(
        f"shard {shard} is done; {missing} samples are left to other shards. When they are done, the same command "
        f"without --shard writes the table into {folder}"
    )
    if as_json:
        emit_json({"complete": False, "missing": missing, "shard": str(shard)})


def finish(results: Results, folder: Path, as_json: bool, keep: bool = True) -> None:
    """Write results and reports (unless nothing is to be kept), and print the scores."""
    from nasa_video.evaluation.report import score_table, write_report

    if keep:
        results.write(folder)
        page, text = write_report(results, folder)
        say(f"{page}, {text}")
    if as_json:
        emit_json(scores_json(results))
        return
    parts = [score_table(results).markdown()]
    if len(results.groups) > 1:
        parts += [f"{group}:\n\n{score_table(results, group).markdown()}" for group in results.groups]
    typer.echo("\n\n".join(parts))


def scores_json(results: Results) -> dict[str, Any]:
    """The scores and differences of results, for machines."""
    groups = ["", *(results.groups if len(results.groups) > 1 else []), *results.parts]
    return {
        "complete": True,
        "kind": results.kind,
        "settings": results.settings,
        "scores": [
            {
                "arm": one.arm, "group": one.group or "all", "metric": one.metric, "n": one.n, "value": one.value,
                "interval": one.interval,
            }
            for one in results.scores(groups)
        ],
        "differences": [
            {
                "arm": one.arm, "against": one.against, "metric": one.metric, "pairs": one.n, "value": one.value,
                "interval": one.interval, "raised": one.raised, "lowered": one.lowered,
            }
            for one in results.differences()
        ],
    }  # fmt: skip
