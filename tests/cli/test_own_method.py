"""A method of one's own is registered in a line, and then works at every door like those that are shipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from torch import Tensor

from nasa_video import AttentionGuidance, Nasa, VideoPipeline, register
from nasa_video.files.source import read_frames
from nasa_video.guidance.attention import Attend, TextKeys, WeightedKeys
from nasa_video.guidance.methods import METHODS, GuidedAttention

PROMPT, SEED = "a ball", "3"


@pytest.fixture(autouse=True)
def _half() -> Iterator[None]:
    """``half:1.6`` is ``nasa:0.8`` by another name."""

    @register
    @dataclass(frozen=True)
    class Half(AttentionGuidance):
        name: ClassVar[str] = "half"
        label: ClassVar[str] = "half NASA"

        def __call__(
            self, q: Tensor, positive: TextKeys, negatives: Sequence[WeightedKeys], attend: Attend
        ) -> GuidedAttention:
            return Nasa(self.scale / 2)(q, positive, negatives, attend)

    yield
    del METHODS["half"]


def same(one: str, other: str) -> bool:
    return np.array_equal(read_frames(Path(one)), read_frames(Path(other)))


def test_the_command_line_timelines_batches_and_recipes(nasa_video: Any, tmp_path: Path) -> None:
    base = ["generate", PROMPT, "--neg", "blurry", "--model", "{model}", "--seed", SEED, "--guidance"]
    assert nasa_video(*base, "nasa:0.8", "-o", "nasa.mp4").status == 0
    done = nasa_video(*base, "half:1.6", "-o", "half.mp4", "--json")
    assert done.status == 0, done.stderr
    assert done.json["guidance"] == "half"
    assert same("half.mp4", "nasa.mp4")
    assert nasa_video("generate", "--from", "half.mp4", "-o", "again.mp4").status == 0
    assert same("again.mp4", "nasa.mp4")
    timeline = {"timeline": [{"at": 0, "prompt": PROMPT, "negatives": ["blurry"], "guidance": "half:1.6"}]}
    Path("changes.yaml").write_text(yaml.safe_dump(timeline))
    words = ["generate", "--timeline", "changes.yaml", "--model", "{model}", "--seed", SEED, "-o", "timeline.mp4"]
    assert nasa_video(*words).status == 0
    assert same("timeline.mp4", "nasa.mp4")
    job = {"prompt": PROMPT, "negatives": "blurry", "guidance": "half:1.6", "seed": int(SEED), "name": "job"}
    Path("jobs.yaml").write_text(yaml.safe_dump([job]))
    assert nasa_video("batch", "jobs.yaml", "-o", "made", "--model", "{model}").status == 0
    assert same("made/job.mp4", "nasa.mp4")
    unknown = nasa_video(*base, "hlaf:1.6", "-o", "x.mp4")
    assert unknown.status != 0
    assert "did you mean 'half'" in unknown.stderr


def test_a_preset_and_python(model_folder: Path, tmp_path: Path) -> None:
    pipe = VideoPipeline.from_pretrained(str(model_folder), device="cpu")
    settings = {"guidance": {"half": {"scale": 1.6}}, "default_guidance": "half"}
    pipe.preset = type(pipe.preset).model_validate({**pipe.preset.model_dump(), **settings})
    frames = {
        "own, by the preset": pipe(PROMPT, negative="blurry", seed=3).frames,
        "own, spelled": pipe(PROMPT, negative="blurry", guidance="half:1.6", seed=3).frames,
        "nasa": pipe(PROMPT, negative="blurry", guidance=Nasa(0.8), seed=3).frames,
    }
    assert all(np.array_equal(video, frames["nasa"]) for video in frames.values())
    assert not np.array_equal(frames["nasa"], pipe(PROMPT, seed=3).frames)
