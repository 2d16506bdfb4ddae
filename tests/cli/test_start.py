"""Starting from a picture, going on from a clip, redrawing a clip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nasa_video.files.source import read_frames

Run = Callable[..., Any]
MODEL = ("--model", "{model}")


def _frames(folder: str) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*.png"))])


def test_a_clip_goes_on_with_its_own_frames_first(nasa_video: Run) -> None:
    nasa_video("generate", "a star", *MODEL, "-o", "a.mp4")
    done = nasa_video("extend", "a.mp4", "a star", "--neg", "red", "--frames", "24", *MODEL, "-o", "b.mp4", "--json")
    assert done.status == 0
    assert done.json["frames"] == 21 + 24
    assert done.json["effect"] is not None
    given, longer = read_frames("a.mp4"), read_frames("b.mp4")
    # Two lossy encodings lie between them; frames out of order would differ far more.
    change = np.abs(longer[:21].astype(int) - given).mean()
    assert change < 10
    assert change < 0.7 * np.abs(longer[:21][::-1].astype(int) - given).mean()
    assert nasa_video("generate", "--from", "b.mp4", "-o", "c.mp4").status == 0
    assert Path("b.mp4").read_bytes() == Path("c.mp4").read_bytes()


def test_a_clip_of_any_length_goes_on_from_its_last_frames(nasa_video: Run) -> None:
    nasa_video("generate", "a star", "--frames", "21", *MODEL, "-o", "a/")
    for number in range(5):  # 16 frames: no length that the chunking allows
        Path(f"a/{number:06}.png").unlink()
    import subprocess

    import imageio_ffmpeg

    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    command = [ffmpeg, "-v", "error", "-start_number", "5", "-i", "a/%06d.png", "-pix_fmt", "yuv420p", "cut.mp4"]
    subprocess.run(command, check=True)
    done = nasa_video("extend", "cut.mp4", "a star", "--frames", "12", *MODEL, "-o", "b.mp4", "--json")
    assert done.json["frames"] == 16 + 12


def test_a_picture_is_the_first_frame(nasa_video: Run) -> None:
    picture = np.zeros((100, 180, 3), np.uint8)
    picture[:, :90] = (200, 40, 40)
    Image.fromarray(picture).save("p.png")
    done = nasa_video("generate", "a star", "--image", "p.png", "--frames", "12", *MODEL, "-o", "v/", "--json")
    assert done.json["frames"] == 13
    first = _frames("v")[0]
    assert first[:, :20, 0].mean() > 150
    assert first[:, -20:, 0].mean() < 50


def test_a_redrawn_clip_keeps_its_length_and_strength_counts(nasa_video: Run) -> None:
    nasa_video("generate", "a star", "--seed", "3", *MODEL, "-o", "a.mp4")
    made = {}
    for strength in ("0.5", "1.0"):
        words = ["--video", "a.mp4", "--strength", strength, *MODEL, "-o", f"s{strength}/", "--json"]
        assert nasa_video("generate", "a heart", *words).json["frames"] == 21
        made[strength] = _frames(f"s{strength}")
    nasa_video("generate", "a heart", *MODEL, "-o", "free/")
    assert np.array_equal(made["1.0"], _frames("free")), "full strength starts from pure noise"
    assert not np.array_equal(made["0.5"], made["1.0"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "x", "--image", "none.png"], "none.png cannot be read"),
        (["generate", "x", "--image", "text.png"], "no readable image"),
        (["generate", "x", "--video", "text.png"], "no readable video"),
        (["generate", "x", "--image", "p.png", "--frames", "5"], "new frames must be a multiple of 12"),
        (["generate", "x", "--image", "p.png", "--video", "p.png"], "starts from one of them"),
        (["extend", "none.mp4", "x"], "none.mp4 cannot be read"),
    ],
)
def test_a_start_that_cannot_be_read_is_refused(nasa_video: Run, words: list[str], message: str) -> None:
    Path("text.png").write_text("no picture")
    Image.new("RGB", (20, 20)).save("p.png")
    done = nasa_video(*words, *MODEL, "-o", "a.mp4")
    assert done.status != 0
    assert message in " ".join(done.stderr.split())
    assert not Path("a.mp4").exists()


def test_a_changed_start_is_noticed_when_a_file_is_made_again(nasa_video: Run) -> None:
    Image.new("RGB", (20, 20), "red").save("p.png")
    nasa_video("generate", "x", "--image", "p.png", *MODEL, "-o", "a.mp4")
    Image.new("RGB", (20, 20), "blue").save("p.png")
    done = nasa_video("generate", "--from", "a.mp4", "-o", "b.mp4")
    assert done.status == 1
    assert "its content has changed" in " ".join(done.stderr.split())


def test_a_clip_too_short_to_go_on_from_is_refused(nasa_video: Run) -> None:
    nasa_video("generate", "x", *MODEL, "--frames", "9", "-o", "a/")
    import subprocess

    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", "a/%06d.png", "-frames:v", "4", "short.mp4"]
    subprocess.run(command, check=True)
    done = nasa_video("extend", "short.mp4", "x", *MODEL, "-o", "b.mp4")
    assert done.status == 1
    assert "at least 9 frames, the clip has 4" in " ".join(done.stderr.split())
