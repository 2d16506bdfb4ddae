"""The true VBench, where it is installed (nasa-video eval setup vbench): its flicker is what its paper says it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nasa_video.evaluation.benchmarks.vbench.environment import Environment, default_venv, python_of
from nasa_video.evaluation.benchmarks.vbench.scoring import Scoring, score_videos
from nasa_video.files.atomic import file_sha256
from nasa_video.files.ffmpeg_sink import FfmpegSink
from nasa_video.files.source import read_frames
from nasa_video.jobs.store import GenerationJob, Record, Store
from nasa_video.video.request import VideoRequest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not python_of(default_venv()).exists(), reason="VBench's environment is not installed"),
]
FPS = 8
# ffmpeg's two builds turn YUV into RGB with different rounding; a grey level is 1 / 255.
TOLERANCE = 0.5 / 255


def _video(path: Path, seed: int, frames: int) -> Record:
    rng = np.random.default_rng(seed)
    small = rng.integers(40, 200, (frames, 4, 4, 3), dtype=np.uint8)
    pictures = small.repeat(16, axis=1).repeat(16, axis=2)
    with FfmpegSink(path, FPS, crf=5) as sink:
        sink.write(pictures)
    job = GenerationJob(
        request=VideoRequest(prompt="a toilet, frozen in time", seed=seed), checkpoint="",
        tags={"dimensions": ["temporal_flickering"], "auxiliary": {}},
    )  # fmt: skip
    return Record(job, {}, path, file_sha256(path))


def _steadiness(frames: np.ndarray[Any, Any]) -> float:
    """Section 4.1.1 of arXiv 2311.17982: one minus the mean absolute change between frames, over 255."""
    return float(1 - np.abs(np.diff(frames.astype(np.float32), axis=0)).mean() / 255)


def test_flicker_of_whole_videos_and_of_clips(tmp_path: Path) -> None:
    environment = Environment(default_venv())
    assert len(environment.prompts()) == 946
    records = [_video(tmp_path / f"{seed}.mp4", seed, frames) for seed, frames in ((0, 12), (1, 40))]
    for mode in ("standard", "long"):
        scoring = Scoring(environment, mode, ("temporal_flickering",), "cpu", tmp_path)  # type: ignore[arg-type]
        scores = score_videos(records, scoring, Store(tmp_path / mode))
        assert not scores.failed
        for record in records:
            assert record.output is not None
            frames = read_frames(record.output)
            # Two seconds a clip; the last one is filled up from behind, and a short video is one clip.
            clips = (
                [frames] if mode == "standard" or len(frames) < 2 * FPS else [frames[:16], frames[16:32], frames[24:]]
            )
            expected = float(np.mean([_steadiness(clip) for clip in clips]))
            found = scores.values[str(record.sha256), "a toilet, frozen in time"]["temporal_flickering"]
            # Clips are encoded anew, at a low bit rate: flicker of noise is lost there.
            assert found == pytest.approx(expected, abs=TOLERANCE if mode == "standard" else 20 * TOLERANCE)
