"""What one prompt passes on its way to a file: python research/trace_prompt.py [PROMPT] [--negative TEXT].

Runs `nasa-video generate` in this process under a profiler hook and prints how many of our files the trip passes, the
arrows between them (a function of one file calls one of another; imports do not count), and the kinds of record that
are handed over from file to file: dataclasses and pydantic models of ours among the arguments.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
IMPORTING = "<import>"
PACKAGES = tuple(f"{ROOT / name}/" for name in ("nasa_video", "causvid_adapter"))


class Tracer:
    """Counts calls from file to file, and the records that they hand over."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.arrows: Counter[tuple[str, str]] = Counter()
        self.records: dict[str, set[str]] = {}

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """The hook of ``sys.setprofile``."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGES) or code.co_name in ("<module>", "__repr__"):
            return
        callee, caller = _name(code.co_filename), _caller(frame.f_back)
        if caller == IMPORTING:
            return
        self.files.add(callee)
        if caller in (None, callee):
            return
        self.arrows[str(caller), callee] += 1
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]:
            kind = _record(frame.f_locals.get(name))
            if kind is not None:
                self.records.setdefault(kind, set()).add(callee)


def _name(path: str) -> str:
    return str(Path(path).relative_to(ROOT))


def _caller(frame: FrameType | None) -> str | None:
    """The nearest of our files that is waiting for this call, through libraries; None for none.

    ``IMPORTING`` while one of our modules is imported: what runs then is no part of the trip.
    """
    nearest = None
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGES):
            if frame.f_code.co_name == "<module>":
                return IMPORTING
            nearest = nearest or _name(frame.f_code.co_filename)
        frame = frame.f_back
    return nearest


def _record(value: Any) -> str | None:
    kind = type(value)
    ours = kind.__module__.split(".")[0] in ("nasa_video", "causvid_adapter")
    if not ours or not (dataclasses.is_dataclass(kind) or hasattr(kind, "model_fields")):
        return None
    count = len(dataclasses.fields(kind)) if dataclasses.is_dataclass(kind) else len(kind.model_fields)
    return f"{kind.__name__} ({count} fields)"


def trace(arguments: list[str]) -> Tracer:
    """Run the command with these arguments under the hook.

    Raises:
        RuntimeError: it failed.
    """
    from nasa_video.cli import main as command

    tracer, before = Tracer(), sys.argv
    sys.argv = ["nasa-video", *arguments]
    threading.setprofile(tracer)
    sys.setprofile(tracer)
    try:
        status = command()
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        sys.argv = before
    if status not in (None, 0):
        raise RuntimeError(f"nasa-video {' '.join(arguments)} ended with status {status}")
    return tracer


def main(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")] = "a red star on a dark background",
    negative: Annotated[str, typer.Option(help="Empty for none.")] = "snow",
    arrows: Annotated[bool, typer.Option("--arrows", help="List every arrow, too.")] = False,
) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as folder:
        unwanted = ["--neg", negative] if negative else []
        tracer = trace(["generate", prompt, *unwanted, "--frames", "9", "-o", str(Path(folder) / "traced.mp4")])
    console = Console(width=120)
    table = Table("what", "number", title=f'generate "{prompt}"')
    for what, number in (
        ("files", len(tracer.files)), ("arrows between files", len(tracer.arrows)),
        ("kinds of record", len(tracer.records)),
    ):  # fmt: skip
        table.add_row(what, str(number))
    console.print(table)
    handed = Table("record", "handed to files of ours")
    for kind, files in sorted(tracer.records.items(), key=lambda item: -len(item[1])):
        handed.add_row(kind, str(len(files)))
    console.print(handed)
    for (caller, callee), calls in sorted(tracer.arrows.items()) if arrows else ():
        console.print(f"{caller} -> {callee}  {calls}")


if __name__ == "__main__":
    typer.run(main)
