"""A torchvision that does not fit torch: defined answers instead of diffusers' own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nasa_video.import_errors import explain_import_error

ROOT = Path(__file__).parents[2]


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """An environment with a torchvision whose operators are missing."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n"
    )
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "nasa_video", "generate", "a ball", "--compile", "on", "-o", "a.mp4"],
        ["-c", "from nasa_video import VideoPipeline"],
    ],
)
def test_a_torchvision_that_does_not_fit_is_named(broken: dict[str, str], tmp_path: Path, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=broken, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "torchvision 0.1 does not fit torch" in last
    assert "operator torchvision::nms does not exist" in last
    assert "pip uninstall torchvision" in last
    if words[0] == "-m":
        assert "Traceback" not in done.stderr


def test_a_command_that_needs_no_torchvision_is_not_stopped_by_it(broken: dict[str, str], tmp_path: Path) -> None:
    words = ["-m", "nasa_video", "generate", "a ball", "--frames", "9", "-o", "a.mp4"]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=broken, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_other_errors_are_themselves() -> None:
    assert explain_import_error(ValueError("no")) is None
    assert explain_import_error(RuntimeError("no")) is None
