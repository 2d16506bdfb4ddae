"""``nasa-video extend``: go on from a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nasa_video.cli.console import chunk_progress, emit_json, loading_line, say, shown_warnings
from nasa_video.cli.generate import default_output
from nasa_video.cli.lean import start_lean
from nasa_video.cli.options import (
    SIZE,
    AsJsonOption,
    ModelOptions,
    OutputOption,
    VideoOptions,
    grouped,
    option,
    requested,
    run_options,
)


@grouped
def extend(
    clip: Annotated[Path, typer.Argument(help="The video to go on from.")],
    prompt: Annotated[str, typer.Argument(help="What it should go on to show.")],
    video: VideoOptions,
    model: ModelOptions,
    output: OutputOption = None,
    frames: Annotated[int | None, option("New frames to add.", panel=SIZE)] = None,
    as_json: AsJsonOption = False,
) -> None:
    """Continue CLIP: its frames fill the model's memory, and what comes after them is written behind them."""
    from nasa_video.video.request import StartFile

    with shown_warnings(), loading_line(model.model):
        start = StartFile.of_file("extend", clip)
        request = requested({"prompt": prompt, "start": start, "frames": frames, **video.said, **model.said})
        start_lean(request, model.loading())
        from nasa_video.cli.generation import run

        options = run_options(video, model.loading())
        result = run(request, output or default_output(prompt, None), options, chunk_progress, say)
    if as_json:
        emit_json(result)
