"""Set up and run the main job: python3 scripts/run_demo.py [options of nasa-video generate]."""

from __future__ import annotations

import sys

import environment

EXAMPLE = ["a red ball bouncing on a checkered background", "--neg", "red", "--compare", "-o", "demo.mp4"]


def main() -> None:
    """Make a video with a negative prompt beside the same one without."""
    environment.ensure()
    options = sys.argv[1:] or EXAMPLE
    environment.run([environment.python(), "-m", "nasa_video", "generate", *options])


if __name__ == "__main__":
    main()
