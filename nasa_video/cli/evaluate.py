"""``nasa-video eval …``: measurements."""

from __future__ import annotations

import typer

from nasa_video.cli.eval_quality import add_quality
from nasa_video.cli.eval_removal import add_removal
from nasa_video.cli.eval_report import add_report
from nasa_video.cli.eval_scores import add_scores
from nasa_video.cli.eval_vbench import add_vbench

evaluate = typer.Typer(name="eval", help="Measure what guidance does.", no_args_is_help=True)
add_removal(evaluate)
add_vbench(evaluate)
add_scores(evaluate)
add_quality(evaluate)
add_report(evaluate)
