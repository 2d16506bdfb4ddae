"""What the command line says: people read standard error, machines read the last line of standard output."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from nasa_video.guidance.state import Effect

console = Console(stderr=True, highlight=False)


def message_of(error: BaseException) -> str:
    """What an error says, and what was added to it on its way (which frames are kept)."""
    return "; ".join([str(error), *getattr(error, "__notes__", ())])


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
    from nasa_video.errors import NasaVideoError

    if isinstance(error, NasaVideoError):
        return True
    from causvid_adapter.errors import CausvidAdapterError

    return isinstance(error, CausvidAdapterError)


def effect_text(effect: Effect) -> str:
    """What the negative did, for people."""
    return (
        f"effect of the negative: attention changed by {effect.relative_change:.0%}, "
        f"negative share {effect.negative_share:.1%}"
    )


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Show our own warnings as lines, each once and at once, and keep libraries' ones away from people.

    After Ctrl-C, which says nothing by itself, it says what was kept.
    """
    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        text = str(message)
        if category.__module__.startswith("nasa_video") and text not in shown:
            shown.add(text)
            console.print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show  # put back by catch_warnings
        try:
            yield
        except KeyboardInterrupt as error:
            fail("; ".join(["interrupted", *getattr(error, "__notes__", ())]))
            raise


_loading: list[Any] = []


@contextmanager
def loading_line(model: str | None) -> Iterator[None]:
    """Say at once which model is being loaded, with a spinner where somebody looks; a progress bar takes its place."""
    from nasa_video.models.presets import DEFAULT_MODEL

    text = f"loading {model or DEFAULT_MODEL} ..."
    if not console.is_terminal:
        say(text)
        yield
        return
    status = console.status(escape(text))
    _loading.append(status)
    status.start()
    try:
        yield
    finally:
        _end_loading()


def _end_loading() -> None:
    while _loading:
        _loading.pop().stop()


def chunk_progress() -> Progress:
    """Progress over chunks, with frames a second and time left."""
    _end_loading()
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
