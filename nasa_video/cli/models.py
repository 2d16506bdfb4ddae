"""``nasa-video models``: what there is, what it needs, whether it is here."""

from __future__ import annotations

from typing import Annotated

import typer

from nasa_video.cli.console import emit_json


def models(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list on the last line.")] = False,
) -> None:
    """List the presets: what each needs, its licence, whether it is on this machine."""
    from rich.console import Console
    from rich.table import Table

    from nasa_video.models import video_presets

    rows = [
        {
            "name": preset.name,
            "kind": preset.kind,
            "present": preset.present,
            "licence": preset.licence,
            "needs": preset.needs,
            "title": preset.title,
        }
        for preset in video_presets().values()
    ]
    if as_json:
        emit_json(rows)
        return
    table = Table(
        "model", "kind", "here", "licence", "needs", title="Presets (--model also takes a folder or a hub id)"
    )
    for row in rows:
        needs = "\n".join(str(need) for need in row["needs"])  # type: ignore[attr-defined]
        here = "[green]yes[/]" if row["present"] else "no"
        table.add_row(f"[bold]{row['name']}[/]\n{row['title']}", str(row["kind"]), here, str(row["licence"]), needs)
    Console().print(table)
