"""``nasa-video models``: what there is, what it needs, whether it is here; and bringing it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nasa_video.cli.console import console, emit_json, say
from nasa_video.cli.options import AsJsonOption, MemoryOption, default_command
from nasa_video.errors import format_bytes

models = typer.Typer(
    name="models",
    cls=default_command("show"),  # models NAME is models show NAME
    help="List the presets; show one; bring its weights; check what it needs.",
)


@models.callback(invoke_without_command=True)
def list_models(context: typer.Context, as_json: AsJsonOption = False) -> None:
    """List the presets: what each needs, its licence, whether it is on this machine."""
    from rich.table import Table

    from nasa_video.images.presets import ImagePreset, image_presets
    from nasa_video.models.presets import VideoPreset, video_presets

    if context.invoked_subcommand is not None:
        return
    presets: list[VideoPreset | ImagePreset] = [*video_presets().values(), *image_presets().values()]
    rows: list[dict[str, Any]] = [
        {
            "name": preset.name,
            "kind": preset.kind,
            "present": preset.present,
            "licence": preset.licence,
            "needs": preset.needs,
            "title": preset.title,
        }
        for preset in presets
    ]
    if as_json:
        emit_json(rows)
        return
    table = Table(title="Presets; --model also takes a folder or a hub id", show_lines=True)
    for column in ("model", "kind", "here"):
        table.add_column(column, no_wrap=True)
    table.add_column("what it is, its licence, what it needs")
    for row in rows:
        needs = "\n".join(f"[dim]{need}[/]" for need in row["needs"])
        here = "[green]yes[/]" if row["present"] else "no"
        table.add_row(f"[bold]{row['name']}[/]", row["kind"], here, f"{row['title']}\n{row['licence']}\n{needs}")
    _out().print(table)


@models.command()
def show(
    name: Annotated[str, typer.Argument(help="A preset, a preset file or a folder.")], as_json: AsJsonOption = False
) -> None:
    """Show what a model is and needs, and the words of one that knows few: models NAME."""
    from rich.table import Table

    from nasa_video.images.presets import image_presets
    from nasa_video.models.presets import find_preset
    from nasa_video.text.vocabulary import find_vocabulary

    preset = image_presets().get(name) or find_preset(name)
    vocabulary = find_vocabulary(getattr(preset, "vocabulary", None))
    words = {} if vocabulary is None else {a: dict(values) for a, values in vocabulary.words().items()}
    about = {"name": preset.name, "title": preset.title, "licence": preset.licence, "needs": preset.needs}
    if as_json:
        emit_json({**about, "present": preset.present, "words": words})
        return
    out = _out()
    out.print(f"[bold]{preset.name}[/]: {preset.title}\n{preset.licence}")
    for need in preset.needs:
        out.print(f"  [dim]{need}[/]")
    if vocabulary is None:
        return
    table = Table("attribute", "words", title=f"It knows {vocabulary.about}; try: {vocabulary.example}")
    for attribute, values in words.items():
        table.add_row(attribute, "; ".join(", ".join(phrases) for phrases in values.values()))
    out.print(table)


@models.command()
def pull(
    name: Annotated[str, typer.Argument(help="A preset, a preset file or a hub id.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    mirror: Annotated[str | None, typer.Option(help="URL of a mirror of the hub.", show_default=False)] = None,
    to: Annotated[
        Path | None, typer.Option(help="Folder for owner/name/file, to be brought elsewhere.", show_default="hub cache")
    ] = None,
) -> None:
    """Show size and licence, then download what is missing; resumes, verifies, and needs the network only once."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from nasa_video.errors import InputError
    from nasa_video.models import download as downloads

    preset = _preset(name)
    absent = downloads.missing(preset.components.sources)
    files = downloads.list_files(absent, mirror)
    try:
        files += downloads.list_files(downloads.missing(preset.components.extras), mirror)
    except InputError as error:
        say(f"without --decoder tiny: {error}")
    if not files:
        say(f"{name} is complete on this machine")
        return
    total = sum(file.size for file in files)
    for file in files:
        say(f"  {format_bytes(file.size):>10}  {file.repo}/{file.name}")
    say(f"{name}: {len(files)} files, {format_bytes(total)}. Licence: {preset.licence}")
    _check_space(to, total)
    if not yes and not typer.confirm("Download?"):
        raise typer.Exit(1)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=total)
        downloads.pull(files, endpoint=mirror, folder=to, tell=lambda file: progress.advance(task, file.size))
    say(f"{name} is complete" + (f" in {to}; use it with NASA_VIDEO_MODELS={to}" if to else ""))


@models.command()
def check(
    name: Annotated[str, typer.Argument(help="A preset, a preset file or a folder.")],
    width: Annotated[int | None, typer.Option(help="In pixels.", show_default="the model's")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels.", show_default="the model's")] = None,
    frames: Annotated[int | None, typer.Option(help="Length.", show_default="the model's")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...", show_default="cuda if there is one")] = None,
    memory: MemoryOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Say what is missing, and whether this machine can run it. Exit status 1 when something is missing."""
    from nasa_video.images.presets import image_presets
    from nasa_video.models.presets import find_preset
    from nasa_video.models.readiness import readiness

    if name in image_presets():
        _check_image(name, (width, height, frames, device, memory), as_json)
        return
    report = readiness(find_preset(name), width, height, frames, device, memory)
    if as_json:
        emit_json(report.to_json())
    else:
        for line in report.lines():
            typer.echo(line)
    if report.missing:
        raise typer.Exit(1)


def _check_image(name: str, options: tuple[Any, ...], as_json: bool) -> None:
    """What an image model lacks; its memory is not estimated."""
    from nasa_video.errors import InputError
    from nasa_video.images.presets import image_presets

    if any(option is not None for option in options):
        raise InputError(f"{name} is an image model, for which only missing files are checked: leave out the options")
    preset = image_presets()[name]
    if as_json:
        emit_json(
            {
                "model": name,
                "licence": preset.licence,
                "source": preset.source,
                "note": preset.note,
                "missing": preset.missing,
            }
        )
    else:
        typer.echo(f"{name}: {preset.title}. Licence: {preset.licence}")
        typer.echo(f"read from: {preset.source}")
        if preset.note:
            typer.echo(f"note: {preset.note}")
        for part in preset.missing:
            typer.echo(f"missing: {part}")
        typer.echo(
            f"its first picture brings what the hub has: nasa-video image PROMPT --neg … --model {name}"
            if preset.missing
            else "complete on this machine"
        )
    if preset.missing:
        raise typer.Exit(1)


def _preset(name: str) -> Any:
    from nasa_video.errors import InputError
    from nasa_video.images.presets import image_presets
    from nasa_video.models.presets import find_preset

    if name in image_presets():
        raise InputError(f"{name} is an image model; it is brought by the first: nasa-video image … --model {name}")
    return find_preset(name)


def _check_space(folder: Path | None, needed: int) -> None:
    import shutil

    from huggingface_hub.constants import HF_HUB_CACHE

    from nasa_video.errors import InputError

    place = (folder or Path(HF_HUB_CACHE)).absolute()
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{needed / 1e9:.1f} GB do not fit into {place}: {free / 1e9:.1f} GB are free; choose another --to"
        )


def _out() -> Any:
    from rich.console import Console

    return Console()
