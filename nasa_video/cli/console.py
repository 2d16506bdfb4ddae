"""What the command line says: people read standard error, machines read the last line of standard output."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


def fail(message: str) -> None:
    """One error message; in JSON mode also an object with the error, so that a machine sees it too."""
    console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    if "--json" in sys.argv:
        emit_json({"error": message})


def say(message: str) -> None:
    """A line for people."""
    console.print(escape(message), soft_wrap=True)


def emit_json(data: Mapping[str, Any] | Sequence[Any]) -> None:
    """One JSON value as one line on standard output."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def is_user_error(error: BaseException) -> bool:
    """Whether an error is one that a person caused and can mend, so that its message is enough."""
    from causvid_adapter.errors import CausvidAdapterError
    from nasa_video.errors import NasaVideoError

    return isinstance(error, NasaVideoError | CausvidAdapterError)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Show our own warnings as lines, each once, and keep libraries' ones away from people."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield_error: BaseException | None = None
        try:
            yield
        except BaseException as error:
            yield_error = error
        shown: set[str] = set()
        for warning in caught:
            text = str(warning.message)
            if warning.category.__module__.startswith("nasa_video") and text not in shown:
                shown.add(text)
                console.print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True)
    if yield_error is not None:
        raise yield_error


def chunk_progress() -> Progress:
    """Progress over chunks, with frames a second and time left."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("chunks"),
        TextColumn("{task.fields[fps]:.1f} FPS"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
