"""VBench's own environment: its pins (numpy below 2, transformers 4.33) cannot share ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from nasa_video.errors import InputError, NasaVideoError
from nasa_video.text.embedding_cache import FOLDER_VARIABLE

VENV_VARIABLE = "NASA_VIDEO_VBENCH"
"""Environment variable: the folder of VBench's environment."""

VBENCH = "vbench==0.1.5"
TORCH = ("torch", "torchvision")
# setuptools: openai-clip is built by, and imports, its pkg_resources. The others are what VBench-Long imports and
# VBench does not ask for; moviepy 2 has no moviepy.editor.
BESIDE = ("setuptools<81", "moviepy<2", "scenedetect[opencv]", "av", "numpy<2")
SIZE = "2.5 GB with a CPU build of torch, 7 GB with a CUDA build"


def default_venv() -> Path:
    """``$NASA_VIDEO_VBENCH``, or a folder in the user's cache."""
    cache = Path(os.environ.get(FOLDER_VARIABLE) or user_cache_path("nasa-video"))
    return Path(os.environ.get(VENV_VARIABLE) or cache / "vbench-venv")


def python_of(venv: Path) -> Path:
    """An environment's interpreter."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install_steps(
    venv: Path, python: str | None = None, torch: Sequence[str] = TORCH, constraint: Path | None = None
) -> list[list[str]]:
    """The commands that make the environment, in order.

    Args:
        python: the interpreter to make it from; this one by default.
        torch: what pip is asked for, such as ("torch==2.13.0+cpu", "torchvision==0.28.0").
        constraint: a pip constraints file for every step.
    """
    pip = [str(python_of(venv)), "-m", "pip", "install", "--disable-pip-version-check"]
    held = ["--constraint", str(constraint.absolute())] if constraint else []
    # One step for torch and what depends on it: then pip cannot exchange it in a later one unasked. The requirements
    # are repeated in the last step for the same reason.
    return [
        [python or sys.executable, "-m", "venv", str(venv)],
        [*pip, *held, "setuptools<81", "wheel", "numpy<2"],
        [*pip, *held, *torch],
        [*pip, *held, VBENCH, *BESIDE, *torch],
    ]


def install(steps: Sequence[Sequence[str]], tell: Callable[[str], None]) -> None:
    """Run the steps, each announced before it runs; their output goes to the terminal.

    Raises:
        NasaVideoError: one failed.
    """
    for step in steps:
        tell(f"+ {' '.join(step)}")
        try:
            status = subprocess.run(list(step), check=False, stdout=sys.stderr).returncode
        except OSError as error:
            raise NasaVideoError(f"{step[0]} cannot be run: {error.strerror}; name another with --python") from error
        if status:
            raise NasaVideoError(
                f"the step above ended with exit status {status}; mend what it says and run the command again: what "
                "is installed already stays"
            )


_PROBE = """
import importlib.metadata, importlib.util, json
found = {"package": None, "version": None}
spec = importlib.util.find_spec("vbench")
if spec is not None and spec.submodule_search_locations:
    found["package"] = list(spec.submodule_search_locations)[0]
    try:
        found["version"] = importlib.metadata.version("vbench")
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


class Environment:
    """VBench's environment, found and asked.

    Raises:
        InputError: it is not there, or has no VBench.
    """

    def __init__(self, venv: Path) -> None:
        self.python = python_of(venv)
        remedy = "make it with: nasa-video eval setup vbench"
        if not self.python.exists():
            raise InputError(f"there is no VBench environment in {venv}; {remedy}")
        asked = subprocess.run([str(self.python), "-c", _PROBE], capture_output=True, text=True, check=False)
        try:
            found = json.loads(asked.stdout)
        except ValueError:
            raise InputError(f"the VBench environment in {venv} is broken ({asked.stderr[-300:]}); {remedy}") from None
        if found["package"] is None:
            raise InputError(f"the environment in {venv} has no vbench; {remedy}")
        self.package = Path(found["package"])
        self.version = str(found["version"] or "unknown")

    def prompts(self) -> list[dict[str, Any]]:
        """VBench's own list of prompts, from the installed package.

        Raises:
            InputError: the package has no list that can be read.
        """
        return read_prompt_list(self.package / "VBench_full_info.json")


def read_prompt_list(path: Path) -> list[dict[str, Any]]:
    """A list of prompts in VBench's format: ``[{"prompt_en": …, "dimension": […], "auxiliary_info": {…}?}, …]``.

    Raises:
        InputError: it is something else.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if entries and all(isinstance(e["prompt_en"], str) and isinstance(e["dimension"], list) for e in entries):
            return list(entries)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a list of prompts in VBench's format: {error}") from error
    raise InputError(f"{path} is not a list of prompts in VBench's format: prompt_en and dimension in every entry")
