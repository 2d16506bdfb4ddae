"""A run that was killed goes on to the same frames."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

Run = Callable[..., Any]
OPTIONS = ["a red star", "--neg", "red", "--frames", "249"]


def _frames(folder: Path) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize("image", [False, True])
def test_a_killed_run_goes_on_to_the_frames_of_an_uninterrupted_one(
    nasa_video: Run, model_folder: Path, tmp_path: Path, image: bool
) -> None:
    options = list(OPTIONS)
    if image:
        Image.new("RGB", (32, 16), "teal").save("p.png")
        options = [*OPTIONS[:3], "--frames", "240", "--image", "p.png"]
    command = [sys.executable, "-m", "nasa_video", "generate", *options, "--model", str(model_folder), "--resume"]
    process = subprocess.Popen(
        [*command, "-o", "a.mp4"], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while len(list(Path("a.mp4.resume").glob("[0-9]*.safetensors"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = len(list(Path("a.mp4.resume").glob("[0-9]*.safetensors")))
    assert 4 <= made < 21
    assert not Path("a.mp4").exists()
    done = nasa_video("generate", *options, "--model", "{model}", "--resume", "-o", "a.mp4", "--json")
    assert done.status == 0, done.stderr
    assert not Path("a.mp4.resume").exists()
    nasa_video("generate", *options, "--model", "{model}", "-o", "b.mp4")
    from nasa_video.files.source import read_frames

    assert np.array_equal(read_frames("a.mp4"), read_frames("b.mp4"))


def test_another_recipe_does_not_go_on_from_the_log(nasa_video: Run) -> None:
    from nasa_video.cli import generation

    def stop(*words: Any) -> None:
        raise KeyboardInterrupt

    patch = pytest.MonkeyPatch()
    patch.setattr(generation._Writing, "write", stop)
    nasa_video("generate", "a star", "--model", "{model}", "--resume", "-o", "a.mp4")
    patch.undo()
    assert Path("a.mp4.resume/recipe.json").exists()
    done = nasa_video("generate", "a star", "--seed", "5", "--model", "{model}", "--resume", "-o", "a.mp4")
    assert done.status == 1
    assert "other settings" in done.stderr
    assert nasa_video("generate", "a star", "--model", "{model}", "--resume", "-o", "a.mp4").status == 0


def test_a_damaged_end_of_the_log_is_made_again(nasa_video: Run) -> None:
    import torch

    from nasa_video.video.request import VideoRequest
    from nasa_video.video.resume import ResumeLog

    recipe = VideoRequest(prompt="x", model="m", seed=0, steps=1, frames=9, width=1, height=1, fps=1)
    log = ResumeLog("a.mp4", recipe)
    assert log.open() is None
    chunks = [torch.randn(1, 3, 2, 2, 2) for _ in range(3)]
    for index, chunk in enumerate(chunks):
        log.add(index, chunk)
    kept = log.open()
    assert kept is not None
    assert torch.equal(kept, torch.cat(chunks, dim=1))
    Path("a.mp4.resume/.000003.safetensors.host-1-ab.part.safetensors").write_bytes(b"what a kill left half written")
    last = Path("a.mp4.resume/000002.safetensors")
    last.write_bytes(last.read_bytes()[:30])
    kept = log.open()
    assert kept is not None
    assert kept.shape[1] == 6


def test_resume_is_not_for_streams(nasa_video: Run) -> None:
    done = nasa_video("generate", "a star", "--model", "{model}", "--resume", "-o", "-")
    assert done.status == 1
    assert "--resume is for a file" in done.stderr
