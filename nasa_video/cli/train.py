"""``nasa-video train``: distillation with the negative prompt inside (NASA-T), and the lists that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nasa_video.cli.console import console, emit_json, say
from nasa_video.cli.options import AsJsonOption, default_command

if TYPE_CHECKING:
    from nasa_video.train.distributed import DistributedContext
    from nasa_video.train.settings import Settings


train = typer.Typer(
    name="train",
    cls=default_command("run"),  # train CONFIG is train run CONFIG
    help="Train with the negative prompt inside (NASA-T): nasa-video train CONFIG.yaml",
    no_args_is_help=True,
)


@train.command()
def run(
    config: Annotated[Path, typer.Argument(help="A YAML file, or a shipped config such as nasa-t-sprites.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder of the run; it goes on there.", show_default="runs/CONFIG"),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line, instead of the config's.")] = None,
    negatives: Annotated[
        Path | None, typer.Option(help="Negative prompts, one a line, instead of the config's.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Instead of the config's.", min=1)] = None,
    shard: Annotated[
        bool | None,
        typer.Option(
            "--shard/--no-shard", help="Spread weights over the processes, or not.", show_default="the config's"
        ),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Compute on the CPU although there is a GPU.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the true sizes and run a step on tiny networks; nothing is loaded.")
    ] = False,
    as_json: AsJsonOption = False,
) -> None:
    """Train, or go on where the run in the folder stopped.

    Several GPUs: accelerate launch --num_processes N -m nasa_video train CONFIG. Several processes on CPUs: torchrun
    --nproc-per-node N -m nasa_video train CONFIG --cpu.
    """
    from nasa_video.train.distributed import DistributedContext
    from nasa_video.train.settings import load_settings

    chosen = {"iterations": iterations, "shard": shard}
    settings = load_settings(config).over(
        prompts, negatives, {name: value for name, value in chosen.items() if value is not None}
    )

    context = DistributedContext(settings.run.shard and not dry_run, settings.run.precision, cpu)
    if dry_run:
        _dry_run(settings, context, as_json)
        return
    folder = output or Path("runs") / config.stem
    model = _train(settings, context, folder)
    if context.leads:
        say(f"{model}: the averaged student; {folder}/curves.png, {folder}/sheets")
        if as_json:
            emit_json({"model": str(model), "iterations": settings.run.iterations})


@train.command()
def negatives(
    output: Annotated[Path, typer.Argument(help="Text file to write, one negative a line.")],
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Same seed, same list.")] = 0,
    groups: Annotated[str | None, typer.Option(help="Comma list of groups of terms.", show_default="all")] = None,
) -> None:
    """Write negative prompts made by the grammar of common terms."""
    from nasa_video.train.lists import GROUPS, negative_list, write_texts

    chosen = tuple(word.strip() for word in groups.split(",") if word.strip()) if groups else tuple(GROUPS)
    write_texts(output, negative_list(count, seed, chosen), f"{count} negatives, seed {seed}: {', '.join(chosen)}")
    say(f"{output}: {count} negative prompts of {', '.join(chosen)}, seed {seed}")


@train.command()
def prompts(
    sources: Annotated[list[Path], typer.Argument(help="Text files, one prompt a line.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Text file to write.")],
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many.")] = None,
    longest: Annotated[int, typer.Option(min=1, help="Words; longer prompts are left out.")] = 80,
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
) -> None:
    """Write a prompt list from any text files: cleaned, each prompt once, in a seeded order."""
    from nasa_video.train.lists import build_prompts, write_texts

    texts = build_prompts(sources, longest, limit, seed)
    write_texts(output, texts)
    say(f"{output}: {len(texts)} prompts")


def _train(settings: Settings, context: DistributedContext, folder: Path) -> Path:
    from rich.progress import Progress, TextColumn

    from nasa_video.train.run import new_trainer
    from nasa_video.train.run import train as run_training

    trainer = new_trainer(settings, context, folder)
    columns = (*Progress.get_default_columns(), TextColumn("{task.completed}/{task.total}  {task.fields[values]}"))
    with Progress(*columns, console=console, disable=not context.leads) as progress:
        task = progress.add_task("iterations", total=settings.run.iterations, values="")

        def report(step: int, steps: int, values: dict[str, float]) -> None:
            text = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
            progress.update(task, completed=step, values=text)

        try:
            return run_training(trainer, folder, report)
        except KeyboardInterrupt:
            say(f"stopped; the same command goes on from the last checkpoint in {folder}")
            raise


def _dry_run(settings: Settings, context: DistributedContext, as_json: bool) -> None:
    """Sizes of the true networks, and the values of a step of the tiny ones."""
    from rich.table import Table

    from nasa_video.train.dry_run import dry_run, sizes

    rows = sizes(settings)
    values = dry_run(settings, context)
    if as_json:
        emit_json({"networks": rows, "values": values})
        return
    table = Table("network", "parameters", "trained", "weights, gradients, optimiser, average", title=settings.title)
    for row in rows:
        table.add_row(
            row["network"], f"{row['parameters'] / 1e6:,.0f} M", f"{row['trained'] / 1e6:,.0f} M",
            f"{row['bytes'] / 1e9:.1f} GB",
        )  # fmt: skip
    console.print(table)
    say("one step on tiny networks: " + ", ".join(f"{name} {value:.3g}" for name, value in values[-1].items()))
