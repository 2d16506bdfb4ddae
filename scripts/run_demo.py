"""Set up and run the main job: python3 scripts/run_demo.py [options of nasa-video generate]."""

from __future__ import annotations

import sys

import environment

PROMPT = "a big green star bouncing on a striped background"
EXAMPLE = [PROMPT, "--neg", "striped background", "--compare", "-o", "demo.mp4"]


def main() -> None:
    """Make a video with a negative prompt beside the same one without."""
    environment.ensure()
    options = sys.argv[1:] or EXAMPLE
    environment.run([environment.python(), "-m", "nasa_video", "generate", *options])


if __name__ == "__main__":
    main()
