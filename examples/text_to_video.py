"""Text to video with a negative prompt: the unguided and the guided video of one seed, side by side in one file.

python examples/text_to_video.py [OUTPUT.mp4]
"""

from __future__ import annotations

import sys

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
        videos.append(pipe(PROMPT, negative=negative, seed=0))
        print(f"negative {negative!r}: {len(videos[-1])} frames, effect {videos[-1].effect}")
    with open_sink(output, fps=videos[0].fps) as sink:
        sink.write(side_by_side([video.frames for video in videos], ["without", f"without {NEGATIVE}"], scale=4))
    print(output)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "text_to_video.mp4")
