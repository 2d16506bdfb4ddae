"""What the evaluation commands share: options, progress, and the run of a benchmark from jobs to a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasa_video.cli.console import console, emit_json, say, shown_warnings

if TYPE_CHECKING:
    from nasa_video.evaluation.picture_scores import Benchmark
    from nasa_video.evaluation.results import Results
    from nasa_video.evaluation.sampling import Model
    from nasa_video.jobs.processes import Shard
    from nasa_video.jobs.store import Engine, Tell

MethodsOption = Annotated[str, typer.Option(help="Comma list of METHOD[:SCALE], side by side.")]
FolderOption = Annotated[Path, typer.Option("-o", "--output", help="Folder of everything; a rerun goes on there.")]
StepListOption = Annotated[str | None, typer.Option(help="Comma list of step counts.", show_default="the model's")]
FramesOption = Annotated[int | None, typer.Option(help="Length of a video.", show_default="the model's")]
BaseOption = Annotated[Path | None, typer.Option(help="Of an image model: its base pipeline's folder.")]
WeightsOption = Annotated[Path | None, typer.Option(help="Of an image model: its own weights on this machine.")]
ShardOption = Annotated[
    str | None, typer.Option(help="i/n: only this part, i from 0.", show_default="RANK or SLURM variables, or all")
]
EngineOption = Annotated[str, typer.Option(help="local, or ray: one actor a GPU of a cluster.")]


def words(text: str) -> list[str]:
    """A comma list."""
    return [word.strip() for word in text.split(",") if word.strip()]


def whole_numbers(text: str, name: str) -> list[int]:
    """A comma list of whole numbers.

    Raises:
        InputError: a word is none.
    """
    from nasa_video.errors import InputError

    try:
        return [int(word) for word in words(text)]
    except ValueError:
        raise InputError(f"{name} must be whole numbers, got {text!r}") from None


def check_engine(engine: str) -> Engine:
    """The engine by name.

    Raises:
        InputError: there is none such.
    """
    from nasa_video.errors import InputError
    from nasa_video.jobs.store import ENGINES

    for known in ENGINES:
        if engine == known:
            return known
    raise InputError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")


@contextmanager
def job_progress(total: int) -> Iterator[Callable[[str], Tell]]:
    """Bars over jobs; gives what makes ``tell`` for a bar by its name."""
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
    with Progress(*columns, console=console, transient=True) as progress:

        def bar(name: str) -> Tell:
            task = progress.add_task(name, total=total)
            return lambda record, made: progress.advance(task)

        yield bar


def run_benchmark(
    benchmark: Benchmark,
    model: Model,
    methods: str,
    steps: str | None,
    folder: Path,
    shard: str | None,
    engine: str,
    as_json: bool,
) -> None:
    """Make, measure, and where everything is there, write the results and say the table."""
    from nasa_video.evaluation.measuring import make_and_measure
    from nasa_video.jobs.processes import Shard

    part, how = Shard.choose(shard), check_engine(engine)
    counts = whole_numbers(steps, "steps") if steps else [None]
    plan = model.plan(benchmark.samples, model.methods(methods), counts)
    with shown_warnings(), job_progress(len(part.of(plan))) as bar:
        done = make_and_measure(
            plan, model.suffix, model.new_worker, benchmark.measurement, folder, shard=part, engine=how, tell=bar
        )
    made = done.generation
    damaged = f" ({made.remade} were there, damaged)" if made.remade else ""
    say(f"{made.made} made{damaged}, {made.found} found finished")
    if done.missing:
        left_to_others(part, done.missing, folder, as_json)
        return
    finish(benchmark.results(done, plan, {"methods": methods}), folder, as_json)


def left_to_others(shard: Shard, missing: int, folder: Path, as_json: bool) -> None:
    """Say that a shard is done and the table must wait."""
    say(
        f"shard {shard} is done; {missing} samples are left to other shards. When they are done, the same command "
        f"without --shard writes the table into {folder}"
    )
    if as_json:
        emit_json({"complete": False, "missing": missing, "shard": str(shard)})


def finish(results: Results, folder: Path, as_json: bool, extra: dict[str, Any] | None = None) -> None:
    """Write results and reports, and print the scores."""
    from nasa_video.evaluation.page import write_report
    from nasa_video.evaluation.tables import score_table

    results.write(folder)
    page, text = write_report(results, folder)
    say(f"{page}, {text}")
    if as_json:
        emit_json(scores_json(results) | (extra or {}))
    else:
        typer.echo("\n".join(score_table(results)))


def scores_json(results: Results) -> dict[str, Any]:
    """The scores and differences of results, for machines."""
    groups = ["", *(results.groups if len(results.groups) > 1 else [])]
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
