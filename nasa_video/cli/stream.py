"""``nasa-video stream``: a video without end to a media server or a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nasa_video.cli.console import emit_json, say, shown_warnings
from nasa_video.cli.options import MemoryOption


def stream(
    prompt: Annotated[str | None, typer.Argument(help="What the video should show.")] = None,
    to: Annotated[str, typer.Option(help="rtmp://, rtmps://, srt://, udp://, tcp://, or a file.")] = "",
    neg: Annotated[
        list[str] | None,
        typer.Option(
            "--neg", help="What must not be there: TEXT or TEXT:WEIGHT. Give it once a term.", show_default=False
        ),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Strength of the guidance; the model's own by default.")] = None,
    guidance: Annotated[str | None, typer.Option(help="nasa, nag, vsf or cfg.", show_default="nasa")] = None,
    model: Annotated[str | None, typer.Option(help="Preset, folder, or hub id.", show_default="sprites")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same video.", show_default="0")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps a chunk.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0, help="Stop after this long.", show_default="Ctrl-C")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second.", show_default="the model's")] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 ...", show_default="cuda if there is one")
    ] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="YAML file: prompts, negatives and scales at seconds.", show_default=False)
    ] = None,
    recompute: Annotated[
        bool, typer.Option(help="When the prompt changes, make the window's keys again under the new one.")
    ] = False,
    memory: MemoryOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
) -> None:
    """Make a video without end and send it on, until Ctrl-C."""
    from nasa_video.cli.streaming import StreamRequest, run_stream

    if not to:
        raise typer.BadParameter("say where the video goes: --to rtmp://HOST/APP/KEY, srt://HOST:PORT or FILE.mp4")
    request = StreamRequest(
        prompt, tuple(neg or ()), scale, guidance, model, seed, steps, seconds, fps, device, timeline, recompute, to,
        memory,
    )  # fmt: skip
    with shown_warnings():
        result = run_stream(request, say)
    if as_json:
        emit_json(result)
