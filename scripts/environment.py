"""Makes and fills ``.venv`` in the project's root; used by the two set-up commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
TORCH = "2.13.0"


def python() -> Path:
    """The environment's interpreter."""
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(command: Sequence[str | Path], env: dict[str, str] | None = None) -> None:
    """Print a command and run it; stop with its exit status when it fails."""
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    status = subprocess.run(words, cwd=ROOT, env=env, check=False).returncode
    if status:
        print(f"this step failed with exit status {status}; see its messages above", file=sys.stderr)
        sys.exit(status)


def ensure(extras: str = "") -> None:
    """Create the environment when it is missing and install the project in it (nothing to do: a few seconds)."""
    if sys.version_info < (3, 11):  # noqa: UP036 - whoever has an older one must be told
        sys.exit(f"nasa-video needs Python 3.11 or newer, this is {sys.version.split()[0]}")
    if not python().exists():
        print(f"+ python -m venv {VENV}", flush=True)
        venv.create(VENV, with_pip=True)
    pip: list[str | Path] = [python(), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    constraints = VENV / "constraints.txt"
    constraints.write_text("")
    if shutil.which("nvidia-smi") is None:
        _ensure_cpu_torch(pip)
        # A later dependency must not exchange it for a CUDA build of several gigabytes.
        constraints.write_text(f"torch=={TORCH}\n")
    run([*pip, "--constraint", constraints, "--editable", f".{extras}"])


def _ensure_cpu_torch(pip: Sequence[str | Path]) -> None:
    probe = f"import torch, sys; sys.exit(not torch.__version__.startswith('{TORCH}'))"
    if subprocess.run([str(python()), "-c", probe], capture_output=True, check=False).returncode == 0:
        return
    cpu_build = [*pip, f"torch=={TORCH}+cpu"]
    print("+", " ".join(str(word) for word in cpu_build), flush=True)
    if subprocess.run([str(word) for word in cpu_build], capture_output=True, check=False).returncode:
        print(
            "  pip finds no CPU build of torch where it looks, so the standard one (larger) is installed. For the CPU\n"
            "  build, set PIP_EXTRA_INDEX_URL to the CPU index that pytorch.org names under 'Get started'.",
            flush=True,
        )
        run([*pip, f"torch=={TORCH}"])
