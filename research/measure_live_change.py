"""How often a colour goes after its name is typed as a negative while the shipped model's video plays.

    python research/measure_live_change.py [--seeds 16] [--methods nasa:0.5,nasa:1,nasa:1.5,nag,nag+nopad:1.5]
                                          [--windows keep,recache,regenerate] [--before 2] [--output FILE.json]

Chunks without a negative, then two with it, as a viewer of the live page sees them; no video is chosen. In "free" the
prompt names no colour (the world's squares are mostly red, balls blue, triangles green), in "named" it asks for that
very colour. ``none`` is the control, in which nothing is typed. Of the videos that showed the colour:

    gone      its share of the pictures of the second of the two chunks is below half of what it was in the chunk before
    at once   the same of the first of the two
    shape     the detector sees the prompt's shape in the second of the two
    jump      mean difference of the pictures before and after the change, in those before

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nasa_video import Negative, VideoPipeline
from nasa_video.cli.console import say
from nasa_video.evaluation.benchmarks.removal import SpritesJudge
from nasa_video.evaluation.samples import Method, methods_of
from nasa_video.files.frames import Frames
from nasa_video.models.presets import OnChange
from nasa_video.video.request import PromptState

SHAPES = (("square", "square", 0, "red"), ("ball", "circle", 2, "blue"), ("triangle", "triangle", 1, "green"))
"""A shape in the prompt, the detector's name for it, the channel of its colour, and the colour's name."""
SHOWN = 0.04
METHODS = (
    "none,nasa:1,nasa:1.5,nasa-centred+conflict0:1.25,nasa-centred+conflict1:0.75,nasa-centred+conflict2:0.5,"
    "nag+nopad:1.5,vsf:1"
)


def share(frames: Frames, channel: int) -> float:
    """Share of (F, H, W, 3) that is clearly of a channel's colour."""
    own, others = frames[..., channel].astype(int), [frames[..., c].astype(int) for c in range(3) if c != channel]
    return float(((own > others[0] + 60) & (own > others[1] + 60)).mean())


def chunks_of(
    pipeline: VideoPipeline, kind: str, seeds: int, method: Method, window: OnChange, before: int
) -> tuple[list[tuple[str, int]], list[Frames]]:
    """The cases (detector's shape, channel), and of each chunk the pictures (B, F, H, W, 3)."""
    cases = [(*shape, seed) for shape in SHAPES for seed in range(seeds)]
    prompts = tuple(
        f"a big {f'{colour} ' if kind == 'named' else ''}{shape} on a dark background"
        for shape, _, _, colour, _ in cases
    )
    typed = tuple((Negative(colour),) if method.guidance else () for _, _, _, colour, _ in cases)
    quiet, loud = (
        PromptState(prompts, negatives, method.guidance, window) for negatives in (((),) * len(cases), typed)
    )
    chunks = pipeline.stream_batch(
        prompts,
        seeds=[seed for *_, seed in cases],
        states=lambda chunk: quiet if chunk < before else loud,
        frames=pipeline.frames_until(before + 2),
    )
    return [(shape, channel) for _, shape, channel, _, _ in cases], [chunk.frames for chunk in chunks]


def measure(cases: list[tuple[str, int]], chunks: list[Frames], judge: SpritesJudge) -> dict[str, Any]:
    """The figures of the videos that showed their colour; the last two chunks are those with the negative."""
    shares = np.array([[share(frames[row], c) for frames in chunks] for row, (_, c) in enumerate(cases)])
    shown = shares[:, -3] >= SHOWN
    left = shares[shown, -2:] / shares[shown, -3:-2]
    labels = judge(list(chunks[-1]))
    held = [label["shape"].split("+") for label in labels]
    video = np.concatenate(chunks, axis=1).astype(np.int16)
    steps = np.abs(np.diff(video, axis=1)).mean(axis=(2, 3, 4))[shown]
    change = sum(frames.shape[1] for frames in chunks[:-2]) - 1
    return {
        "shown": int(shown.sum()),
        "at once": int((left[:, 0] < 0.5).sum()),
        "gone": int((left[:, 1] < 0.5).sum()),
        "shape": sum(shape in seen for (shape, _), seen, of in zip(cases, held, shown, strict=True) if of),
        "jump": round(float(steps[:, change].mean() / steps[:, :change].mean()), 2),
    }


def main() -> None:
    """One row a prompt, method and window."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16, help="videos of each of the three shapes")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--windows", default="keep,recache,regenerate")
    parser.add_argument("--before", type=int, default=2, help="chunks that are shown before the change")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    pipeline, judge = VideoPipeline.from_pretrained("sprites"), SpritesJudge()
    rows: list[dict[str, Any]] = []
    for kind in ("free", "named"):
        for method in methods_of(options.methods, pipeline.preset):
            windows: list[Any] = options.windows.split(",") if method.guidance else ["keep"]
            for window in windows:
                figures = measure(*chunks_of(pipeline, kind, options.seeds, method, window, options.before), judge)
                rows.append({"prompt": kind, "method": method.label, "window": window, **figures})
                say(", ".join(f"{name} {value}" for name, value in rows[-1].items()))
    settings = {"seeds": options.seeds, "before": options.before, "steps": pipeline.preset.sampler.default_steps}
    text = json.dumps({**settings, "rows": rows})
    if options.output:
        options.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
