"""``eval quality``: every measure in the output, pictures beside videos, and likeness to a reference by ffmpeg."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from nasa_video.cli import eval_report
from nasa_video.cli.evaluate import evaluate
from nasa_video.errors import InputError
from nasa_video.evaluation import metrics
from nasa_video.evaluation.metrics import PSNR_OF_EQUALS, has_vmaf, likeness
from nasa_video.files.ffmpeg_sink import FfmpegSink


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A moving pattern, a noisy copy at another frame rate, a shorter and a smaller one."""
    folder = tmp_path_factory.mktemp("clips' : [x],y")  # what a filter's description must escape
    y, x = np.mgrid[0:96, 0:128]
    clean = np.stack([128 + 90 * np.sin((x + 3 * i) / 7) * np.cos(y / 9) for i in range(8)])
    clean = np.repeat(clean[..., None], 3, axis=-1)
    noisy = clean + np.random.default_rng(0).normal(0, 25, clean.shape)
    videos = {"clean": clean, "noisy": noisy, "short": clean[:5], "small": clean[:, :48, :64]}
    for name, video in videos.items():
        with FfmpegSink(folder / f"{name}.mp4", 30 if name == "noisy" else 12, {}, crf=4) as sink:
            sink.write(video.clip(0, 255).round().astype(np.uint8))
    return {name: folder / f"{name}.mp4" for name in videos}


def run(*words: str) -> Any:
    outcome = CliRunner().invoke(evaluate, ["quality", *words, "--json"])
    if outcome.exception is not None:
        raise outcome.exception
    return json.loads(outcome.stdout.splitlines()[-1])


def test_a_copy_is_like_itself_and_unlike_a_noisy_one(clips: dict[str, Path]) -> None:
    same, noisy = likeness(clips["clean"], clips["clean"]), likeness(clips["noisy"], clips["clean"])
    assert (same.ssim, same.psnr) == (pytest.approx(1), PSNR_OF_EQUALS)
    assert noisy.ssim < 0.8
    # Noise of 25 levels in each colour is 25 * sqrt(.299^2 + .587^2 + .114^2) = 16.7 in luma, 23.7 dB; the chroma
    # planes, of half the size, have less.
    assert 23.7 < noisy.psnr < 27
    if has_vmaf():
        assert same.vmaf is not None
        assert noisy.vmaf is not None
        assert same.vmaf > 95
        assert noisy.vmaf < same.vmaf - 5
    else:
        assert same.vmaf is None


def test_a_reference_must_fit(clips: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must have one number of frames, got 5 and 8"):
        likeness(clips["short"], clips["clean"])
    with pytest.raises(InputError, match="must have one size, got 64 x 48 and 128 x 96"):
        likeness(clips["small"], clips["clean"])
    with pytest.raises(InputError, match="does not exist"):
        likeness(clips["clean"], tmp_path / "none.mp4")


def test_the_command_prints_every_measure(clips: dict[str, Path], tmp_path: Path) -> None:
    said = run(str(clips["clean"]), str(clips["noisy"]), "--reference", str(clips["clean"]))
    clean, noisy = said["rows"]
    assert set(clean) == {
        "file", "luma", "sharpness", "noise", "colourfulness", "flicker", "motion", "ssim", "psnr", "vmaf",
    }  # fmt: skip
    assert noisy["noise"] > 10 > clean["noise"]
    assert noisy["ssim"] < clean["ssim"]
    Image.new("RGB", (20, 10), (200, 0, 0)).save(tmp_path / "a.png")
    picture = run(str(tmp_path / "a.png"))["rows"][0]
    assert set(picture) == {"file", "luma", "sharpness", "noise", "colourfulness", "flicker", "motion"}
    assert picture["luma"] == pytest.approx(0.299 * 200, abs=0.1)
    (tmp_path / "b.png").write_bytes(b"none")
    with pytest.raises(InputError, match="is no readable image"):
        run(str(tmp_path / "b.png"))


def test_without_libvmaf_it_says_so_and_gives_the_rest(
    clips: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "has_vmaf", lambda: False)
    told: list[str] = []
    monkeypatch.setattr(eval_report, "say", told.append)
    row = run(str(clips["noisy"]), "--reference", str(clips["clean"]))["rows"][0]
    assert row["vmaf"] is None
    assert 0 < row["ssim"] < 0.8
    assert "no libvmaf" in told[0]
    assert "IMAGEIO_FFMPEG_EXE" in told[0]
