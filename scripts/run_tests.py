"""Set up and run the checks: python3 scripts/run_tests.py [options of pytest]."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import environment

MOST_WORKERS = 4
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def ensure_browser() -> None:
    """Install Chromium for the tests of the live page, where this is Debian or Ubuntu and we are root."""
    if any(map(shutil.which, BROWSERS)):
        return
    if shutil.which("apt-get") is None or getattr(os, "geteuid", lambda: 1)() != 0:
        print("no Chromium here: the tests of the live page are skipped (to run them: apt-get install chromium)")
        return
    environment.run(["apt-get", "update", "-qq"])
    environment.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "chromium"])


def ensure_evaluation() -> None:
    """Install what the tests of CLIP scores and of Ray need, where there are wheels of it; else they are skipped.

    open_clip comes without its dependencies: they bring torchvision, whose usual build is for CUDA and cannot be
    imported beside the CPU build of torch; transformers would fail at it. open_clip works without it here.
    """
    pip = [str(environment.python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for step in (["--no-deps", "open-clip-torch>=3.3", "timm>=1.0"], ["pyarrow>=15"], ["ray>=2.40"]):
        print("+", " ".join([*pip, *step]), flush=True)
        if subprocess.run([*pip, *step], check=False).returncode:
            print(f"no {' '.join(step)} here: the tests that need it are skipped", flush=True)


def main() -> None:
    """Format and lint, types, documentation, tests; with options, only pytest with them."""
    environment.ensure("[dev,train]")
    ensure_evaluation()
    ensure_browser()
    module: list[str | Path] = [environment.python(), "-m"]
    if len(sys.argv) == 1:
        environment.run([*module, "ruff", "check", "."])
        environment.run([*module, "ruff", "format", "--check", "."])
        environment.run([*module, "mypy"])
        quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        environment.run([*module, "mkdocs", "build", "--strict", "--quiet"], env=quiet)
        # not too many: each holds torch and models; what is played and watched needs the machine for itself
        workers = ["-n", str(min(os.cpu_count() or 1, MOST_WORKERS)), "--dist", "worksteal"]
        environment.run([*module, "pytest", *workers, "--ignore", "tests/web"])
        environment.run([*module, "pytest", "tests/web"])
    else:
        environment.run([*module, "pytest", *sys.argv[1:]])


if __name__ == "__main__":
    main()
