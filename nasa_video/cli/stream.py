"""``nasa-video stream``: a video without end to a media server or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nasa_video.cli.console import emit_json, say, shown_warnings
from nasa_video.cli.option_groups import LoadOptions, grouped
from nasa_video.cli.options import (
    AsJsonOption,
    FirstStepsOption,
    NegOption,
    OnChangeOption,
    ScaleOption,
    SeedOption,
    StepsOption,
)


@grouped
def stream(
    load: LoadOptions,
    prompt: Annotated[str | None, typer.Argument(help="What the video should show.")] = None,
    to: Annotated[str, typer.Option(help="rtmp://, rtmps://, srt://, udp://, tcp://, or a file.")] = "",
    neg: NegOption = None,
    scale: ScaleOption = None,
    guidance: Annotated[
        str | None, typer.Option(help="nasa, nasa-centred, nag, vsf or cfg.", show_default="the model's own")
    ] = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    first_steps: FirstStepsOption = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="Stop after this long.", show_default="Ctrl-C")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second.", show_default="the model's")] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="YAML file: prompts, negatives and scales at seconds.", show_default=False)
    ] = None,
    on_change: OnChangeOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Make a video without end and send it on, until Ctrl-C."""
    from nasa_video.cli.streaming import StreamRequest, run_stream

    if not to:
        raise typer.BadParameter("say where the video goes: --to rtmp://HOST/APP/KEY, srt://HOST:PORT or FILE.mp4")
    request = StreamRequest(
        prompt=prompt,
        negatives=tuple(neg or ()),
        scale=scale,
        guidance=guidance,
        seed=seed,
        steps=steps,
        first_steps=first_steps,
        seconds=seconds,
        fps=fps,
        timeline=timeline,
        on_change=on_change,
        to=to,
        **load.asked,
    )
    with shown_warnings():
        result = run_stream(request, say)
    if as_json:
        emit_json(result)
