"""Whatever a person can type has a defined answer: one clear message, a status that is not 0, nothing lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nasa_video.files.source import read_frames
from nasa_video.models.presets import video_presets

Run = Callable[..., Any]
MODEL = ("--model", "{model}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["", *MODEL], "prompt must not be empty"),
        (["  \n ", *MODEL], "prompt must not be empty"),
        ([*MODEL], "say what the video should show"),
        (["x", "--neg", "", *MODEL], "must not be empty"),
        (["x", "--neg", "y", "--scale", "-1", *MODEL], "scale must be a number from 0 to 100, got -1"),
        (["x", "--neg", "y", "--scale", "nan", *MODEL], "got nan"),
        (["x", "--neg", "y", "--scale", "1e9", *MODEL], "from 0 to 100"),
        (["x", "--neg", "y:0", *MODEL], "weight of 'y' must be above 0"),
        (["x", "--neg", "y:inf", *MODEL], "weight in 'y:inf' must be a number"),
        (["x", "--neg", ":0.5", *MODEL], "a weight but no text"),
        (["x", "--neg", "X", *MODEL], "is the prompt itself"),
        (["x", "--neg", "y", "--guidance", "none", *MODEL], "leave out one of the two"),
        (["x", "--guidance", "apg", *MODEL], "guidance must be one of nasa, nasa-centred, nag, vsf, cfg or none"),
        (["x", "--neg", "y:0.5", "--guidance", "cfg", *MODEL], "takes no weights"),
        (
            ["x", "--neg", "y", "--guidance", "cfg", "--guide-layers", "0:0.5", *MODEL],
            "cfg has no setting 'first_layer'",
        ),
        (["x", "--neg", "y", "--guide-steps", "0.6:0.7", "--no-guide-clean", *MODEL], "changed nothing"),
        (["x", "--guide-steps", "1:0", "--neg", "y", *MODEL], "first <= last"),
        (["x", "--guide-steps", "half", *MODEL], "FIRST:LAST"),
        (["x", "--neg", "y", "--scale-steps", "1,half", *MODEL], "numbers with commas such as 1,0.5,0"),
        (["x", "--neg", "y", "--scale-layers", "1,2", *MODEL], "must be from 0 to 1, got 2"),
        (["x", "--neg", "y", "--scale-steps", "0", *MODEL], "changed nothing"),
        (["x", "-o", "-", "--json", *MODEL], "both want standard output"),
        (["x", "--frames", "10", *MODEL], "frames must be 9 + 12k for this model, got 10; use 9 or 21"),
        (["x", "--frames", "0", *MODEL], "use 9 or 21"),
        (["x", "--frames", "-5", *MODEL], "use 9 or 21"),
        (["x", "--width", "40", *MODEL], "width must be a multiple of 16 for this model, got 40; use 32 or 48"),
        (["x", "--height", "0", *MODEL], "height must be a multiple of 16"),
        (["x", "--fps", "0", *MODEL], "fps must be above 0"),
        (["x", "--steps", "7", *MODEL], "this model runs in 1, 2 steps, got 7"),
        (["x", "--device", "cuda:99", *MODEL], "cannot be used"),
        (["x", "--device", "teapot", *MODEL], "cannot be used"),
        (["x", "--attention", "xformers", *MODEL], "xformers"),
        (["x", "--attention", "magic", *MODEL], "attention backend must be"),
        (["x", "--model", "nope"], "unknown model 'nope'; use a preset"),
        (["x", "-o", "a.avi", *MODEL], ".mp4, .webm, .gif"),
        (["x", "-o", "missing/a.mp4", *MODEL], "missing does not exist"),
        (["x", "--timeline", "none.yaml", *MODEL], "none.yaml"),
        (["--from", "none.mp4"], "none.mp4"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_written(
    nasa_video: Run, words: list[str], message: str
) -> None:
    done = nasa_video("generate", *words)
    assert done.status != 0
    assert message in " ".join(done.stderr.split())
    assert list(Path().iterdir()) == []


def test_machines_get_the_error_as_an_object(nasa_video: Run) -> None:
    done = nasa_video("generate", "x", "--frames", "10", *MODEL, "--json")
    assert done.status == 1
    assert "use 9 or 21" in done.json["error"]


def test_machines_are_told_of_options_that_do_not_exist(nasa_video: Run) -> None:
    done = nasa_video("generate", "x", "--frames", "many", "--json")
    assert done.status == 2
    assert "standard error" in done.json["error"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n", "must hold a mapping"),
        ("timeline: []\n", "at least 1"),
        ("timeline:\n- {at: 1}\n- {at: 0}\n", "times must rise"),
        ("timeline:\n- {at: 0, promt: x}\n", "promt"),
        ("timeline:\n- {at: -1, prompt: x}\n", "greater than or equal to 0"),
        ("timeline: [", "cannot be read as YAML"),
        ("timeline:\n- {at: 0, prompt: x, scale: -3, negatives: [y]}\n", "scale must be"),
    ],
)
def test_a_wrong_timeline_is_named(nasa_video: Run, text: str, message: str) -> None:
    Path("t.yaml").write_text(text)
    done = nasa_video("generate", "--timeline", "t.yaml", *MODEL, "-o", "a.mp4")
    assert done.status != 0
    assert message in " ".join(done.stderr.split())
    assert not Path("a.mp4").exists()


def test_a_prompt_beyond_the_encoder_is_cut_with_a_note(nasa_video: Run) -> None:
    done = nasa_video("generate", "a red star " * 20, *MODEL, "--frames", "9", "-o", "a.mp4")
    assert done.status == 0
    note = " ".join(done.stderr.split())
    assert "longer than the 24 tokens" in note
    assert "characters were cut" in note


@pytest.mark.parametrize(
    "prompt", ["🙂🙃", "红色的球", "مرحبا ‮abc", "a\u0000b", "a\udcff b", "e\u0301" * 30, "x" * 1_000_000]
)
def test_strange_and_huge_prompts_give_a_video(nasa_video: Run, prompt: str) -> None:
    done = nasa_video("generate", prompt, *MODEL, "--frames", "9", "-o", "a.mp4")
    assert done.status == 0
    assert len(read_frames("a.mp4")) == 9
    assert nasa_video("generate", "--from", "a.mp4", "-o", "b.mp4").status == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


@pytest.mark.parametrize("damage", ["cut", "foreign", "code", "shape", "missing", "text"])
def test_a_bad_checkpoint_is_refused_and_named(
    nasa_video: Run, model_folder: Path, tmp_path: Path, damage: str
) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "bad")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    preset = folder / "preset.yaml"
    expected = "safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "text":
        weights.write_text("<html>404</html>")
    elif damage == "missing":
        weights.unlink()
        expected = "transformer"
    else:
        file = folder / "model.pt"
        preset.write_text(preset.read_text().replace("path: transformer", "path: model.pt"))
        if damage == "code":
            torch.save({"generator": os.system}, file)
            expected = "could run code"
        elif damage == "foreign":
            torch.save({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(3)}, file)
            expected = "Stable Diffusion UNet"
        else:
            torch.save({"generator": {"model.blocks.0.self_attn.q.weight": torch.zeros(3, 3)}}, file)
            expected = "patch_embedding"
    done = nasa_video("generate", "x", "--model", str(folder), "-o", "a.mp4")
    assert done.status == 1
    assert expected in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not Path("a.mp4").exists()


def test_an_unknown_preset_key_is_an_error(nasa_video: Run, model_folder: Path, tmp_path: Path) -> None:
    text = (model_folder / "preset.yaml").read_text()
    (tmp_path / "p.yaml").write_text(text + "colour: red\n")
    done = nasa_video("generate", "x", "--model", "p.yaml")
    assert done.status == 1
    assert "colour" in done.stderr


def test_missing_weights_of_the_shipped_model_say_how_to_train_them(
    nasa_video: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert video_presets()["sprites"].present
    monkeypatch.setattr("nasa_video.models.sources.package_root", lambda: Path("/nonexistent"))
    done = nasa_video("generate", "a red ball", "-o", "a.mp4")
    assert done.status == 1
    assert "is missing; train it with: python research/train_sprites.py" in " ".join(done.stderr.split())
    assert (Path(__file__).parents[2] / "research" / "train_sprites.py").is_file()


def _start(model_folder: Path, folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nasa_video", "generate", "a star", "--model", str(model_folder), "--neg", "red"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *options], cwd=folder, stderr=subprocess.PIPE, text=True, env=env)


def _wait_for(folder: Path, size: int) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):  # a part may go between being listed and being looked at
            if any(path.stat().st_size > size for path in folder.glob("*.part*")):
                return
        time.sleep(0.05)
    raise AssertionError("the run wrote nothing")


def test_ctrl_c_keeps_what_was_made(model_folder: Path, tmp_path: Path) -> None:
    process = _start(model_folder, tmp_path, "--frames", str(9 + 12 * 2000), "-o", "a.mp4")
    _wait_for(tmp_path, 20_000)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.partial.mp4"]
    kept = len(read_frames(tmp_path / "a.partial.mp4"))
    assert kept > 9
    assert f"interrupted; {kept} frames made so far are kept in a.partial.mp4" in " ".join(stderr.split())


def test_a_killed_ffmpeg_ends_the_run_and_keeps_what_was_made(model_folder: Path, tmp_path: Path) -> None:
    process = _start(model_folder, tmp_path, "--frames", str(9 + 12 * 2000), "-o", "a.mp4")
    _wait_for(tmp_path, 20_000)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    for pid in children.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ffmpeg" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "a.mp4").exists()
    assert len(read_frames(tmp_path / "a.partial.mp4")) > 9


def test_what_fails_in_the_middle_says_what_is_kept(nasa_video: Run) -> None:
    Path("t.yaml").write_text("timeline:\n- {at: 0, prompt: a star}\n- {at: 0.7, negatives: [A  star]}\n")
    done = nasa_video("generate", "--timeline", "t.yaml", *MODEL, "-o", "a.mp4", "--json")
    assert done.status == 1
    assert "is the prompt itself" in done.json["error"]
    assert "9 frames made so far are kept in a.partial.mp4" in done.json["error"]
    assert len(read_frames("a.partial.mp4")) == 9
    assert not Path("a.mp4").exists()


def test_a_read_only_folder_is_named(nasa_video: Run, tmp_path: Path) -> None:
    """A read-only mount, since permission bits do not stop root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        for output in ("disk/a.mp4", "disk/frames/"):
            done = nasa_video("generate", "a star", *MODEL, "-o", output)
            assert done.status == 1
            assert "Read-only file system; choose another -o" in " ".join(done.stderr.split())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_midway_keeps_what_was_made(model_folder: Path, small_disk: Path, tmp_path: Path) -> None:
    command = ("--frames", str(9 + 12 * 4000), "-o", str(small_disk / "a.mp4"))
    _, stderr = _start(model_folder, tmp_path, *command).communicate(timeout=240)
    assert "disk is full" in stderr
    assert "Traceback" not in stderr
    assert os.listdir(small_disk) == ["a.partial.mp4"]
    kept = len(read_frames(small_disk / "a.partial.mp4"))
    assert f"{kept} frames are kept" in stderr.replace("\n", " ")
    assert kept > 9
