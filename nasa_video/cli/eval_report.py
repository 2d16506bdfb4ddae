"""``nasa-video eval report`` and ``nasa-video eval compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nasa_video.cli.console import emit_json, say
from nasa_video.cli.eval_options import scores_json
from nasa_video.cli.options import AsJsonOption


def report(
    run: Annotated[Path, typer.Argument(help="Folder of an evaluation, or its results.json.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="FILE.html; the Markdown is put beside it.")
    ] = None,
) -> None:
    """Write the report of a finished evaluation again: one HTML page, and Markdown."""
    from nasa_video.errors import InputError
    from nasa_video.evaluation.page import write_report
    from nasa_video.evaluation.results import Results

    results = Results.read(run)
    folder = run if run.is_dir() else run.parent
    place = output or folder / "report.html"
    if place.suffix != ".html":
        raise InputError(f"the report's name must end in .html, got {place.name}")
    page, text = write_report(results, place.parent, folder, place.stem)
    say(f"{page}, {text}")


def compare(
    a: Annotated[Path, typer.Argument(help="Folder or results.json of the first run.")],
    b: Annotated[Path, typer.Argument(help="Of the second; differences are B minus A.")],
    arms: Annotated[
        str | None,
        typer.Option(help="ARM_OF_A=ARM_OF_B, such as none=nasa:0.8.", show_default="those with the same name"),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Also a report: FILE.html.")] = None,
    as_json: AsJsonOption = False,
) -> None:
    """Compare two evaluations over the samples that both have, pair by pair, with intervals."""
    from nasa_video.errors import InputError
    from nasa_video.evaluation.compare import compare_runs, different_settings
    from nasa_video.evaluation.page import write_report
    from nasa_video.evaluation.results import Results
    from nasa_video.evaluation.tables import difference_table, score_table

    if output is not None and output.suffix != ".html":
        raise InputError(f"the report's name must end in .html, got {output.name}")
    first, second = Results.read(a), Results.read(b)
    folders = [path if path.is_dir() else path.parent for path in (a, b)]
    both = compare_runs(first, second, arms, folders)
    for name, old, new in different_settings(first, second):
        say(f"differs: {name}: {old} | {new}")
    if output is not None:
        # Media of a comparison are absolute, since they lie in two folders.
        page, text = write_report(both, output.parent, Path("/"), output.stem)
        say(f"{page}, {text}")
    if as_json:
        emit_json(scores_json(both))
    else:
        typer.echo("\n".join([*score_table(both), "", *difference_table(both, list(both.differences()))]))


def add_report(evaluate: typer.Typer) -> None:
    """Register the commands."""
    evaluate.command()(report)
    evaluate.command()(compare)
