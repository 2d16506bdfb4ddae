"""``nasa-video eval …``: measurements."""

from __future__ import annotations

from importlib.util import find_spec

import typer

from nasa_video.cli.eval_benchmarks import hpsv2, negopt, removal
from nasa_video.cli.eval_report import compare, quality, report
from nasa_video.cli.eval_vbench import setup, vbench
from nasa_video.cli.options import Command

evaluate = typer.Typer(name="eval", help="Measure what guidance does.", no_args_is_help=True)
evaluate.add_typer(setup)
for _command in (removal, vbench, hpsv2, negopt, quality, report, compare):
    evaluate.command(cls=Command)(_command)


@evaluate.callback()
def _check(context: typer.Context) -> None:
    """Measure what guidance does."""
    from nasa_video.errors import InputError

    missing = [name for name in ("scipy", "jinja2", "matplotlib", "httpx") if find_spec(name) is None]
    if missing and context.invoked_subcommand not in ("quality", "setup"):
        raise InputError(f"evaluation needs {', '.join(missing)}: pip install 'nasa-video[evaluation]'")
