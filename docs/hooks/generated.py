"""MkDocs hook: two generated pages, the commands (from their own help, by Typer) and the packaged model card."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

CARD = Path("nasa_video/sprites/MODEL_CARD.md")
INTRODUCTION = """# Commands

For everyone who types `nasa-video`. This page is made from the program's own help; `nasa-video COMMAND --help` prints
the same for your version.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add both pages."""
    typer = [sys.executable, "-m", "typer", "nasa_video.cli.app", "utils", "docs", "--name", "nasa-video"]
    done = subprocess.run(typer, capture_output=True, text=True, check=False)
    if done.returncode or "## `nasa-video generate`" not in done.stdout:
        raise PluginError(f"typer did not print the commands' help:\n{done.stderr}")
    _, _, commands = done.stdout.partition("\n")
    files.append(File.generated(config, "reference/commands.md", content=INTRODUCTION + commands))
    card = (Path(config.config_file_path).parent / CARD).read_text(encoding="utf-8")
    files.append(File.generated(config, "reference/model_card.md", content=card))
    return files
