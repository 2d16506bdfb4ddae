"""Where given frames end and new ones begin there is no jump: measured on the shipped model, with wide margins."""

from __future__ import annotations

import itertools

import numpy as np

from nasa_video import VideoPipeline
from nasa_video.video.engine import InitialLatents

NUM = 4
PROMPT = "a red circle moving right on a white background"


def jump(before: np.ndarray, after: np.ndarray) -> float:
    """Mean absolute difference of two pictures, of 255."""
    return float(np.abs(before.astype(int) - after).mean())


def measured(pipeline: VideoPipeline) -> dict[str, list[float]]:
    """Jumps at the join, inside the given clip (median), and to an unrelated video, one a seed."""
    rows: dict[str, list[float]] = {"join": [], "given": [], "unrelated": []}
    for seed in range(NUM):
        given = np.concatenate([c.frames for c in pipeline.stream(PROMPT, frames=33, seed=seed)])
        # The pictures alone are given, as from a file: encoded, run at t = 0, then continued under another seed.
        prefix = pipeline.encode_frames(given)
        new = next(pipeline.stream(PROMPT, frames=45, seed=100 + seed, start=InitialLatents(prefix))).frames
        assert len(new) == 12
        other = next(pipeline.stream(PROMPT, frames=9, seed=200 + seed)).frames[0]
        rows["join"].append(jump(given[-1], new[0]))
        rows["given"].append(float(np.median([jump(a, b) for a, b in itertools.pairwise(given)])))
        rows["unrelated"].append(jump(given[-1], other))
    return rows


def test_the_first_new_frame_goes_on_from_the_last_given_one(pipeline: VideoPipeline) -> None:
    rows = measured(pipeline)
    join, given, unrelated = (np.mean(rows[name]) for name in ("join", "given", "unrelated"))
    # Within a small multiple of the motion that the clip has anyway, and far from what a fresh start shows.
    assert join < 3 * given + 2, rows
    assert join < 0.5 * unrelated, rows
