"""The shipped model and what judges its videos."""

from __future__ import annotations

import pytest

from nasa_video import VideoPipeline
from nasa_video.evaluation.benchmarks.removal import SpritesJudge


@pytest.fixture(scope="session")
def pipeline() -> VideoPipeline:
    return VideoPipeline.from_pretrained("sprites", device="cpu")


@pytest.fixture(scope="session")
def judge() -> SpritesJudge:
    return SpritesJudge()
