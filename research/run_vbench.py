"""The true VBench, installed by the command, on videos of the shipped model: python3 research/run_vbench.py FOLDER.

Needs a package index and 3 GB (CPU) to 8 GB (CUDA) in FOLDER, and no weights: temporal_flickering has none. Scores in
short and Long form, then the default dimensions with random judges (see random_judges.py) to show that their path is
whole. FOLDER/figures.md has both tables with checkpoint, versions and settings, for docs/guides/evaluation.md. Further
arguments go to `nasa-video eval setup vbench`, such as --torch torch==2.13.0+cpu --torch torchvision==0.28.0 on
a machine without a GPU. What is there already is used again, videos only of the same checkpoint and settings.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import environment

COMMON = ("--methods", "none,nasa", "--neg", "blurry", "--limit", "2", "--samples", "2", "--device", "cpu")


def main() -> None:
    """Set up, and run three times over the same videos."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    given, for_setup = parser.parse_known_args()
    folder = given.folder.absolute()
    environment.ensure()
    venv = folder / "venv"
    nasa_video("eval", "setup", "vbench", "--venv", venv, *for_setup)
    places = ("--venv", venv, "--cache", folder / "weights")
    nasa_video("eval", "vbench", "-o", folder / "short", "--dimensions", "temporal_flickering", *COMMON, *places)
    copy_videos(folder / "short", folder / "long")
    nasa_video(
        "eval", "vbench", "-o", folder / "long", "--long", "--dimensions", "temporal_flickering", *COMMON, *places
    )

    write_figures(folder)

    judges = folder / "random-weights"
    if not judges.exists():
        environment.run([venv / "bin" / "python", Path(__file__).with_name("random_judges.py"), judges])
    places = ("--venv", venv, "--cache", judges)
    nasa_video("eval", "vbench", "-o", folder / "random", *COMMON, "--limit", "1", "--samples", "1", *places)


def nasa_video(*arguments: str | Path) -> None:
    """Run the command line."""
    environment.run([environment.python(), "-m", "nasa_video", *arguments])


def copy_videos(source: Path, target: Path) -> None:
    """The finished videos of one run for another: it finds them by their jobs and makes none."""
    shutil.copytree(source / "videos", target / "videos", dirs_exist_ok=True)


def write_figures(folder: Path) -> None:
    """The reports of the two true runs as one document."""
    reports = [(folder / name / "report.md").read_text(encoding="utf-8") for name in ("short", "long")]
    (folder / "figures.md").write_text("\n".join(reports), encoding="utf-8")
    print(f"the tables are in {folder / 'figures.md'}", flush=True)


if __name__ == "__main__":
    main()
