"""Measure whether a continued clip, or a video from a picture, jumps where the new frames begin.

    python research/measure_join.py --model sprites --clips 12

Every clip goes through the command line's own path: a file is written, read by decord, encoded, continued and written.
A jump is the mean absolute difference (of 255) of neighbouring frames. Set beside the jump at the join: the median one
inside the given clip and inside the new frames, and the jump to the first frame of an unrelated video, which is what a
join without memory would show. Prints a table, and last one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import warnings
from typing import Any

import numpy as np
from PIL import Image

from nasa_video.cli.console import chunk_progress
from nasa_video.cli.generation import RunOptions, run
from nasa_video.evaluation.benchmarks.removal_cases import build_cases
from nasa_video.files.source import read_frames
from nasa_video.video.pipeline import VideoPipeline
from nasa_video.video.request import StartFile, VideoRequest

COLUMNS = ("join", "given", "new", "unrelated")


def jump(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> float:
    """Mean absolute difference of two pictures."""
    return float(np.abs(before.astype(int) - after).mean())


def jumps(frames: np.ndarray[Any, Any]) -> list[float]:
    """Of all neighbours."""
    return [jump(a, b) for a, b in itertools.pairwise(frames)]


def row(frames: np.ndarray[Any, Any], given: int, unrelated: np.ndarray[Any, Any]) -> dict[str, float]:
    """What is measured of one continued video, whose first ``given`` frames are not new."""
    inside = jumps(frames[:given])
    return {
        "join": jump(frames[given - 1], frames[given]),
        "given": float(np.median(inside)) if inside else 0.0,
        "new": float(np.median(jumps(frames[given:]))),
        "unrelated": jump(frames[given - 1], unrelated),
    }


def measure(model: str, clips: int, frames: int, new: int) -> dict[str, list[dict[str, float]]]:
    """Continue clips of the model's own making, and their last pictures."""
    pipeline = VideoPipeline.from_pretrained(model)
    prompts = [case.prompt for case in build_cases("colour", "conflict", clips + 1, "report")]
    rows: dict[str, list[dict[str, float]]] = {"extend": [], "image": []}

    def make(output: str, **settings: Any) -> np.ndarray[Any, Any]:
        request = VideoRequest(model=model, **settings)
        run(request, output, RunOptions(), chunk_progress, lambda text: None, load=lambda *a, **k: pipeline)
        return read_frames(output)

    with tempfile.TemporaryDirectory() as folder:
        for number in range(clips):
            clip, picture = f"{folder}/{number}.mp4", f"{folder}/{number}.png"
            made = make(clip, prompt=prompts[number], seed=number, frames=frames)
            Image.fromarray(made[-1]).save(picture)
            other = make(f"{folder}/other.mp4", prompt=prompts[number + 1], seed=1000 + number, frames=frames)
            for kind, path, given in (("extend", clip, frames), ("image", picture, 1)):
                start = StartFile.of_file(kind, path)  # type: ignore[arg-type]
                said = {"prompt": prompts[number], "seed": 500 + number, "start": start, "frames": new}
                long = make(f"{folder}/long.mp4", **said)
                assert len(long) == given + new
                rows[kind].append(row(long, given, other[0]))
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sprites")
    parser.add_argument("--clips", type=int, default=12)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--new", type=int, default=24)
    options = parser.parse_args()
    with warnings.catch_warnings(action="ignore"):
        rows = measure(options.model, options.clips, options.frames, options.new)
    print("| start | at the join: mean, largest | median inside the given | median inside the new | unrelated |")
    print("| --- | --- | --- | --- | --- |")
    for kind, measured in rows.items():
        mean = {name: np.mean([r[name] for r in measured]) for name in COLUMNS}
        largest = max(r["join"] for r in measured)
        print(
            f"| {kind} | {mean['join']:.2f}, {largest:.2f} | "
            + " | ".join(f"{mean[n]:.2f}" for n in COLUMNS[1:])
            + " |"
        )
    print(json.dumps({"model": options.model, "frames": options.frames, "new": options.new, **rows}))


if __name__ == "__main__":
    main()
