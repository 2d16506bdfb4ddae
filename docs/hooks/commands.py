"""MkDocs hook: the page reference/commands.md, made from the command line's own help by Typer."""

from __future__ import annotations

import subprocess
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

PAGE = "reference/commands.md"
INTRODUCTION = """# Commands

For everyone who types `nasa-video`. This page is made from the program's own help; `nasa-video COMMAND --help` prints
the same for your version.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page."""
    typer = [sys.executable, "-m", "typer", "nasa_video.cli.app", "utils", "docs", "--name", "nasa-video"]
    done = subprocess.run(typer, capture_output=True, text=True, check=False)
    if done.returncode or "## `nasa-video generate`" not in done.stdout:
        raise PluginError(f"typer did not print the commands' help:\n{done.stderr}")
    _, _, commands = done.stdout.partition("\n")
    files.append(File.generated(config, PAGE, content=INTRODUCTION + commands))
    return files
