"""``nasa-video eval quality``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from nasa_video.cli.console import emit_json, say

NO_VMAF = (
    "this ffmpeg has no libvmaf, so there is no VMAF, only SSIM and PSNR; imageio-ffmpeg's own binary has it: unset "
    "IMAGEIO_FFMPEG_EXE, or pip install -U imageio-ffmpeg"
)


def quality(
    files: Annotated[list[Path], typer.Argument(help="Video or picture files.")],
    reference: Annotated[
        Path | None, typer.Option(help="A video to compare each with: VMAF, SSIM and PSNR, frame by frame.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
) -> None:
    """Sharpness, noise, luma, colourfulness, flicker and motion, without learned weights."""
    from rich.console import Console
    from rich.table import Table

    from nasa_video.evaluation.quality import quality as measure
    from nasa_video.evaluation.reference import has_vmaf, likeness
    from nasa_video.evaluation.sampling import pictures_of

    if reference is not None and not has_vmaf():
        say(f"note: {NO_VMAF}")
    rows = []
    for path in files:
        row = {"file": str(path), **dataclasses.asdict(measure(pictures_of(path, None)))}
        if reference is not None:
            row |= dataclasses.asdict(likeness(path, reference))
        rows.append(row)
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


def add_quality(evaluate: typer.Typer) -> None:
    """Register the command."""
    evaluate.command()(quality)
