"""``nasa-video eval quality``, ``eval report`` and ``eval compare``: what is made of files that are there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from nasa_video.cli.console import emit_json, say
from nasa_video.cli.eval_options import scores_json
from nasa_video.cli.options import AsJsonOption

NO_VMAF = (
    "this ffmpeg has no libvmaf, so there is no VMAF, only SSIM and PSNR; imageio-ffmpeg's own binary has it: unset "
    "IMAGEIO_FFMPEG_EXE, or pip install -U imageio-ffmpeg"
)


def quality(
    files: Annotated[list[Path], typer.Argument(help="Video or image files.")],
    reference: Annotated[
        Path | None, typer.Option(help="A video to compare each with: VMAF, SSIM and PSNR, frame by frame.")
    ] = None,
    as_json: AsJsonOption = False,
) -> None:
    """Sharpness, noise, luma, colourfulness, flicker and motion, without learned weights."""
    from rich.console import Console
    from rich.table import Table

    from nasa_video.evaluation.metrics import has_vmaf, likeness, measure, read_stills

    if reference is not None and not has_vmaf():
        say(f"note: {NO_VMAF}")
    rows: list[dict[str, Any]] = []
    for path in files:
        compared = {} if reference is None else dataclasses.asdict(likeness(path, reference))
        rows.append({"file": str(path), **measure(read_stills(path)), **compared})
    if as_json:
        emit_json({"rows": rows} | ({"reference": str(reference)} if reference else {}))
        return
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(_cell(name, value) for name, value in row.items()))
    Console().print(table)


def _cell(name: str, value: str | float | None) -> str:
    if isinstance(value, str):
        return value
    return "–" if value is None else f"{value:.{4 if name == 'ssim' else 2}f}"


def report(
    run: Annotated[Path, typer.Argument(help="Folder of an evaluation, or its results.json.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="FILE.html; the Markdown is put beside it.")
    ] = None,
) -> None:
    """Write the report of a finished evaluation again: one HTML page, and Markdown."""
    from nasa_video.evaluation.report import write_report
    from nasa_video.evaluation.results import Results

    results = Results.read(run)
    folder = run if run.is_dir() else run.parent
    place = _page(output or folder / "report.html")
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
    from nasa_video.evaluation.report import difference_table, score_table, write_report
    from nasa_video.evaluation.results import Results, compare_runs, different_settings

    place = None if output is None else _page(output)
    first, second = Results.read(a), Results.read(b)
    both = compare_runs(first, second, arms, [path if path.is_dir() else path.parent for path in (a, b)])
    for name, old, new in different_settings(first, second):
        say(f"differs: {name}: {old} | {new}")
    if place is not None:
        # Media of a comparison are absolute, since they lie in two folders.
        page, text = write_report(both, place.parent, Path("/"), place.stem)
        say(f"{page}, {text}")
    if as_json:
        emit_json(scores_json(both))
    else:
        differences = difference_table(both, list(both.differences()))
        typer.echo(f"{score_table(both).markdown()}\n\n{differences.markdown()}")


def _page(output: Path) -> Path:
    from nasa_video.errors import InputError

    if output.suffix != ".html":
        raise InputError(f"the report's name must end in .html, got {output.name}")
    return output
