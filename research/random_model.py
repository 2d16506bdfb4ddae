"""Writes a folder with a tiny video model of random weights: random_model.py FOLDER, then serve --model FOLDER.

What its pictures cost is next to nothing, so what is measured with it is the server.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nasa_video.bench.random_model import write_tiny_model

if __name__ == "__main__":
    print(write_tiny_model(Path(sys.argv[1]), default_steps=1))
