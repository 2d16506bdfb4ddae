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


ROOMS = {
    "guidance": {"errors"},
    "files": {"errors", "guidance"},
    "text": {"errors", "files"},
    "sprites": {"errors", "text"},
    "backbones": {"errors", "guidance", "text"},
    "models": {"errors", "files", "guidance", "text"},
    "integrations": {"errors", "backbones", "guidance", "text"},
    "images": {"errors", "files", "guidance", "integrations", "models"},
    "video": {"errors", "backbones", "files", "guidance", "models", "text"},
    "jobs": {"errors", "files", "models", "video"},
    "train": {"errors", "backbones", "files", "guidance", "jobs", "models", "sprites", "text", "video"},
    "evaluation": {"errors", "files", "guidance", "images", "jobs", "models", "sprites", "text", "video"},
    "bench": {"errors", "backbones", "files", "guidance", "models", "text", "video"},
    "serve": {"errors", "files", "guidance", "jobs", "models", "text", "video"},
}
"""Room of nasa_video -> rooms that it may know of; cli, which puts commands together, may know of all."""
ONLY_IN = {"serve": {"cli/serve.py", "cli/generate.py", "cli/stream.py"}, "bench": {"cli/bench.py"}}
"""Of the command line, the files that may know of a room."""


def modules(path: Path) -> set[str]:
    """Every module that a file imports, at its head or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found.add(node.module)
    return found


def rooms_known_to(path: Path) -> set[str]:
    return {name.split(".")[1] for name in modules(path) if name.startswith("nasa_video.")}


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
    packages = {path: {name.split(".")[0] for name in modules(path)} for path in files}
    assert {str(path.relative_to(ROOT)): bad for path in files if (bad := packages[path] & forbidden)} == {}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_only_the_rooms_on_the_whiteboard(room: str) -> None:
    files = sorted((ROOT / "nasa_video" / room).rglob("*.py"))
    assert files
    allowed = ROOMS[room] | {room}
    assert {str(path.relative_to(ROOT)): bad for path in files if (bad := rooms_known_to(path) - allowed)} == {}


def test_every_room_is_on_the_whiteboard() -> None:
    rooms = {path.parent.name for path in (ROOT / "nasa_video").glob("*/__init__.py")}
    assert rooms == {*ROOMS, "cli"}


@pytest.mark.parametrize(("room", "files"), ONLY_IN.items())
def test_few_commands_know_the_server_and_the_bench(room: str, files: set[str]) -> None:
    package = ROOT / "nasa_video"
    knowing = {str(p.relative_to(package)) for p in (package / "cli").rglob("*.py") if room in rooms_known_to(p)}
    assert knowing
    assert knowing <= files


def test_a_request_is_read_without_torch() -> None:
    probe = (
        "import sys; from nasa_video.video.request import VideoRequest; "
        "VideoRequest(prompt='a ball', negatives='blurry, rain:0.4', guidance='nasa:0.8').model_dump_json(); "
        "sys.exit(str({'torch', 'diffusers', 'transformers'} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_importing_the_package_and_its_command_line_loads_no_torch_and_says_nothing() -> None:
    probe = (
        "import os, sys, threading; before = dict(os.environ); import nasa_video, nasa_video.cli.app; "
        "heavy = {'torch', 'diffusers', 'transformers', 'imageio_ffmpeg', 'decord'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy or before != dict(os.environ) or threading.active_count() > 1 else 0)"
    )
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_pipeline_says_nothing() -> None:
    probe = "import logging; from nasa_video import VideoPipeline, guided; logging.getLogger('x').warning('heard')"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "heard\n")


def test_the_command_line_keeps_its_options() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert {"generate", "extend", "image", "models", "bench", "serve", "eval", "train"} <= commands.keys()
    options = {option for parameter in commands["generate"].params for option in parameter.opts}
    wanted = {
        "--neg", "--guidance", "--steps", "--frames", "--width", "--height", "--fps", "--seed", "--model",
        "--device", "--timeline", "--compare", "--from", "-o", "--json",
    }  # fmt: skip
    assert wanted <= options
    bench = {option for parameter in commands["bench"].params for option in parameter.opts}
    assert {"--model", "--random-weights", "--width", "--height", "--layers", "--json"} <= bench
