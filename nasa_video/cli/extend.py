"""``nasa-video extend``: go on from a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nasa_video.cli.console import chunk_progress, emit_json, say, shown_warnings
from nasa_video.cli.generate import default_output
from nasa_video.cli.option_groups import LoadOptions, VideoOptions, grouped
from nasa_video.cli.options import AsJsonOption, OutputOption


@grouped
def extend(
    clip: Annotated[Path, typer.Argument(help="The video to go on from.")],
    prompt: Annotated[str, typer.Argument(help="What it should go on to show.")],
    video: VideoOptions,
    load: LoadOptions,
    output: OutputOption = None,
    frames: Annotated[int | None, typer.Option(help="New frames to add.")] = None,
    as_json: AsJsonOption = False,
) -> None:
    """Continue CLIP: its frames fill the model's memory, and what comes after them is written behind them."""
    from nasa_video.cli.generation import Request, run
    from nasa_video.video.inputs import StoredStart

    with shown_warnings():
        start = StoredStart.of_file("extend", clip, new_frames=frames)
        request = Request(prompt=prompt, start=start, **video.asked, **load.asked)
        result = run(request, output or default_output(prompt, None), chunk_progress, say)
    if as_json:
        emit_json(result)
