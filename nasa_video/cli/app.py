"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from nasa_video import __version__
from nasa_video.cli.batch import batch
from nasa_video.cli.bench import bench
from nasa_video.cli.evaluate import evaluate
from nasa_video.cli.extend import extend
from nasa_video.cli.generate import generate
from nasa_video.cli.image import image
from nasa_video.cli.models import models
from nasa_video.cli.options import Command
from nasa_video.cli.serve import serve
from nasa_video.cli.stream import stream
from nasa_video.cli.train import train

app = typer.Typer(
    name="nasa-video",
    help="Negative prompts for few-step and one-step video and image generators.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Negative prompts for few-step and one-step video and image generators."""


for command in (generate, serve, stream, bench, extend, batch, image):
    app.command(cls=Command)(command)
app.add_typer(models)
app.add_typer(evaluate)
app.add_typer(train)
