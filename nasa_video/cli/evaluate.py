"""``nasa-video eval …``: measurements."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from nasa_video.cli.console import console, emit_json, say, shown_warnings

evaluate = typer.Typer(name="eval", help="Measure what guidance does.", no_args_is_help=True)


@evaluate.command()
def removal(
    model: Annotated[str, typer.Option(help="A sprites model: the judge knows no other world.")] = "sprites",
    methods: Annotated[
        str, typer.Option(help="Comma list of METHOD[:SCALE]; the model's own scale where none is given.")
    ] = "none,cfg,nasa,nag,vsf",
    steps: Annotated[str | None, typer.Option(help="Comma list of step counts.", show_default="the model's")] = None,
    cases: Annotated[str, typer.Option(help="Comma list of unmentioned, stated, conflict.")] = (
        "unmentioned,stated,conflict"
    ),
    attributes: Annotated[str | None, typer.Option(help="Comma list of attributes.", show_default="all")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Videos a cell.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the draw of prompts and of the videos.")] = 0,
    split: Annotated[str, typer.Option(help="report, or choose: the set on which settings are tuned.")] = "report",
    frames: Annotated[int | None, typer.Option(help="Length of a video.", show_default="the model's")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Videos made at once.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for table, plot and journal; a rerun resumes there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
) -> None:
    """How often the unwanted feature is gone, and everything asked for still there (table 2 of the paper)."""
    from rich.progress import Progress

    from nasa_video.errors import InputError
    from nasa_video.evaluation.cases import CaseKind, Split
    from nasa_video.evaluation.removal import KINDS, Cell, SpritesJudge, cells, parse_methods, removal_table
    from nasa_video.evaluation.report import markdown, plot
    from nasa_video.pipeline import VideoPipeline

    kinds = _words(cases)
    if not set(kinds) <= set(KINDS):
        raise InputError(f"cases must be among {', '.join(KINDS)}, got {cases}")
    if split not in ("choose", "report"):
        raise InputError(f"split must be choose or report, got {split}")
    with shown_warnings():
        pipeline = VideoPipeline.from_pretrained(model, device)
        if pipeline.preset.vocabulary != "sprites":
            raise InputError(f"eval removal judges with the sprites detectors; {model} is no sprites model")
        counts = [_whole(word) for word in _words(steps)] if steps else [pipeline.preset.sampler.default_steps]
        plan = list(
            cells(
                parse_methods(methods, pipeline),
                counts,
                cast("list[CaseKind]", kinds),
                _words(attributes) if attributes else None,
            )
        )
        for count in counts:
            pipeline.preset.sampler.timesteps(count)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("cells", total=len(plan))

            def tell(cell: Cell, row: dict[str, Any]) -> None:
                progress.update(task, advance=1, description=cell.key)

            rows = removal_table(
                pipeline,
                plan,
                SpritesJudge(),
                n=n,
                split=cast(Split, split),
                seed=seed,
                frames=frames or pipeline.preset.video.frames,
                batch=batch,
                journal=output / "journal.jsonl" if output else None,
                tell=tell,
            )
    table = markdown(rows)
    if output is not None:
        (output / "removal.md").write_text(table, encoding="utf-8")
        plot(rows, output / "removal.png")
        say(f"{output}/removal.md, {output}/removal.png")
    if as_json:
        emit_json({"rows": rows})
    else:
        typer.echo(table)


@evaluate.command()
def quality(
    files: Annotated[list[Path], typer.Argument(help="Video files.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
) -> None:
    """Sharpness, noise, luma, colourfulness, flicker and motion, without learned weights."""
    from rich.console import Console
    from rich.table import Table

    from nasa_video.evaluation.quality import quality as measure
    from nasa_video.video.source import read_frames

    rows = [{"file": str(path), **dataclasses.asdict(measure(read_frames(path)))} for path in files]
    if as_json:
        emit_json({"rows": rows})
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.2f}" for value in row.values()))
    Console().print(table)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _whole(word: str) -> int:
    from nasa_video.errors import InputError

    try:
        return int(word)
    except ValueError:
        raise InputError(f"steps must be whole numbers, got {word!r}") from None
