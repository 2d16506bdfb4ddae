"""A live stream whose negative changes while it plays: frames are written as they are made.

python examples/live_change.py [OUTPUT.mp4]

The timeline is what the live page saves and `nasa-video generate --timeline FILE` reads. A program that only knows
the next change when it comes gives `pipe.stream(states=...)` a function of the chunk instead.
"""

from __future__ import annotations

import sys

from nasa_video import VideoPipeline
from nasa_video.files.sinks import open_sink
from nasa_video.video.request import VideoRequest

REQUEST = VideoRequest.read(
    {
        "prompt": "a big blue ball bouncing on a dark background",
        "seed": 1,
        "frames": 57,
        "timeline": [
            {"at": 0, "negatives": "blurry"},
            {"at": 1.5, "negatives": "blurry, blue"},
            {"at": 3, "prompt": "a big red ball bouncing on a dark background, rain", "negatives": "blurry"},
        ],
    }
)


def main(output: str) -> None:
    """Stream, tell what each chunk is made for, and write."""
    pipe = VideoPipeline.from_pretrained("sprites")
    with open_sink(output, fps=pipe.preset.video.fps) as sink:
        for chunk in pipe.stream(REQUEST):
            sink.write(chunk.frames)
            terms = ", ".join(term.text for term in chunk.state.negatives[0])
            print(f"chunk {chunk.index}: {chunk.state.prompts[0]!r} without {terms}, {len(chunk.frames)} frames")
    print(output)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "live_change.mp4")
