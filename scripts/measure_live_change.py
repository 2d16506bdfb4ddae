"""How often a colour goes after its name is typed as a negative while the shipped model's video plays.

    python scripts/measure_live_change.py [--seeds 6] [--scales 1 2] [--output FILE.json]

Two chunks without a negative, then two with it, as a viewer of the live page who types sees them; counted is in how
many videos the colour's share of the picture falls below half within those two, among the videos that showed it. In
"free" the prompt names no colour (the world's squares are mostly red, balls blue, triangles green), in "named" it asks
for the very colour; "plain" is the control, without a negative. No video is chosen. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from nasa_video import Negative, VideoPipeline
from nasa_video.timeline import Cue
from nasa_video.video.frames import Frames

SHAPES = (("square", 0, "red"), ("ball", 2, "blue"), ("triangle", 1, "green"))
"""Shape, channel of its colour, and its name."""
SHOWN = 0.04
CHUNKS_BEFORE = 2


def share(frames: Frames, channel: int) -> float:
    """Share of (F, H, W, 3) that is clearly of a channel's colour."""
    own, others = frames[..., channel].astype(int), [frames[..., c].astype(int) for c in range(3) if c != channel]
    return float(((own > others[0] + 60) & (own > others[1] + 60)).mean())


def goes(pipeline: VideoPipeline, prompt: str, seed: int, channel: int, typed: Cue) -> bool | None:
    """Whether the colour goes; None where it was not shown."""
    before = Cue.of(prompt, [], typed.guidance)
    chunks = pipeline.stream(prompt, cues=lambda i: before if i < CHUNKS_BEFORE else typed, seed=seed, endless=True)
    shares = [share(chunk.frames[-1:], channel) for chunk in itertools.islice(chunks, CHUNKS_BEFORE + 2)]
    shown = shares[CHUNKS_BEFORE - 1]
    return None if shown < SHOWN else min(shares[CHUNKS_BEFORE:]) < 0.5 * shown


def main() -> None:
    """One cell a prompt, method scale and window."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    pipeline = VideoPipeline.from_pretrained("sprites")
    rows: list[dict[str, Any]] = []
    cells: list[tuple[str, float, bool]] = [("plain", 0.0, False)]
    cells += itertools.product(("free", "named"), options.scales, (False, True))
    for kind, scale, recompute in cells:
        outcomes = []
        for (shape, channel, colour), seed in itertools.product(SHAPES, range(options.seeds)):
            prompt = f"a big {colour + ' ' if kind == 'named' else ''}{shape} on a dark background"
            negatives = [] if kind == "plain" else [Negative(colour)]
            typed = Cue.of(prompt, negatives, pipeline.guidance("nasa", scale), recompute)
            outcomes.append(goes(pipeline, prompt, seed, channel, typed))
        shown = [gone for gone in outcomes if gone is not None]
        window = "recomputed" if recompute else "kept"
        rows.append({"prompt": kind, "scale": scale, "window": window, "shown": len(shown), "gone": sum(shown)})
        print(rows[-1], flush=True)
    text = json.dumps({"seeds": options.seeds, "steps": pipeline.preset.sampler.default_steps, "rows": rows})
    if options.output:
        options.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
