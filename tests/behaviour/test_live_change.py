"""What a negative that comes in the middle of a video does on the shipped model, by what becomes of the window."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))
from measure_live_change import chunks_of, measure

from nasa_video import Nasa, VideoPipeline
from nasa_video.evaluation.benchmarks.removal import SpritesJudge
from nasa_video.evaluation.samples import Method
from nasa_video.models.presets import OnChange

SEEDS = 4
"""Of each of three shapes."""


def share_gone(
    pipeline: VideoPipeline, judge: SpritesJudge, scale: float | None, window: OnChange, before: int
) -> float:
    """Share of the videos in which the colour that the prompt names is gone in the second chunk."""
    method = Method("none", None) if scale is None else Method("nasa", Nasa(scale))
    figures = measure(*chunks_of(pipeline, "named", SEEDS, method, window, before), judge)
    assert figures["shown"] >= 0.75 * 3 * SEEDS, "what the prompt names is shown"
    return float(figures["gone"] / figures["shown"])


@pytest.mark.parametrize("before", [2, 4])
def test_a_remade_window_lets_the_named_colour_go(pipeline: VideoPipeline, judge: SpritesJudge, before: int) -> None:
    """After four chunks the window has lost frames that it once held."""
    assert share_gone(pipeline, judge, 1.5, pipeline.preset.sampler.on_change, before) >= 0.75
    assert share_gone(pipeline, judge, None, "keep", before) <= 0.25, "it does not go by itself"
