"""Text to video with a negative prompt: the unguided and the guided video of one seed, side by side in one file.

python examples/text_to_video.py [OUTPUT.mp4]
"""

from __future__ import annotations

import sys

import numpy as np

from nasa_video import VideoPipeline
from nasa_video.files.sheets import side_by_side
from nasa_video.files.sinks import open_sink

PROMPT = "a big green star bouncing on a striped background"
NEGATIVE = "striped background"


def main(output: str) -> None:
    """Make both videos and write them."""
    pipe = VideoPipeline.from_pretrained("sprites")
    videos = []
    for negative in (None, NEGATIVE):
        chunks = list(pipe.stream(PROMPT, negative=negative, seed=0))
        videos.append(np.concatenate([chunk.frames for chunk in chunks]))
        print(f"negative {negative!r}: {len(videos[-1])} frames, effect {chunks[-1].effect}")
    with open_sink(output, fps=pipe.preset.video.fps) as sink:
        sink.write(side_by_side(videos, ["without", f"without {NEGATIVE}"], scale=4))
    print(output)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "text_to_video.mp4")
