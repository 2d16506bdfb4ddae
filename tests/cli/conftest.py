"""A small complete model on disk, in the form in which a user has one, and the command line run on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_wan import write_parts

from nasa_video.cli import main
from nasa_video.video.pipeline import VideoPipeline


@pytest.fixture(scope="session")
def pipeline(model_folder: Path) -> VideoPipeline:
    """The same model in memory."""
    return VideoPipeline.from_pretrained(str(model_folder), device="cpu")


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a VAE, a text encoder and a tokenizer, in diffusers' layout and as Wan's original files."""
    folder = tmp_path_factory.mktemp("wan")
    write_parts(folder)
    return folder


@dataclass(frozen=True)
class Outcome:
    """How a run of the command line ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """The last line of standard output."""
        return json.loads(self.stdout.splitlines()[-1])


@pytest.fixture
def nasa_video(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Runs the command line in this process, in an empty folder; "{model}" stands for the tiny model's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NASA_VIDEO_CACHE", str(tmp_path.parent / "cache"))

    def run(*words: str) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["nasa-video", *(word.format(model=model_folder) for word in words)])
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        out = capsys.readouterr()
        return Outcome(status, out.out, out.err)

    return run
