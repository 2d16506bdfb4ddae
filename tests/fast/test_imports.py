"""Which package may know of which, and that importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from nasa_video.cli.app import app

ROOT = Path(__file__).parents[2]


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, at its head or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("causvid_adapter", {"nasa_video", "tests", "scripts", "research", "typer", "rich", "fastapi"}),
        ("nasa_video", {"tests", "scripts", "research"}),
    ],
)
def test_imports_point_one_way(package: str, forbidden: set[str]) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 10
    assert {str(path.relative_to(ROOT)): bad for path in files if (bad := imported(path) & forbidden)} == {}


def test_importing_the_package_and_its_command_line_loads_no_torch_and_says_nothing() -> None:
    probe = (
        "import os, sys, threading; before = dict(os.environ); import nasa_video, nasa_video.cli.app; "
        "heavy = {'torch', 'diffusers', 'transformers', 'imageio_ffmpeg', 'decord'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy or before != dict(os.environ) or threading.active_count() > 1 else 0)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_command_line_keeps_its_options() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert {"generate", "extend", "image", "models", "bench", "serve", "eval", "train"} <= commands.keys()
    options = {option for parameter in commands["generate"].params for option in parameter.opts}
    wanted = {
        "--neg", "--scale", "--guidance", "--steps", "--frames", "--width", "--height", "--fps", "--seed", "--model",
        "--device", "--timeline", "--compare", "--from", "-o", "--json",
    }  # fmt: skip
    assert wanted <= options
    bench = {option for parameter in commands["bench"].params for option in parameter.opts}
    assert {"--model", "--random-weights", "--width", "--height", "--layers", "--json"} <= bench
