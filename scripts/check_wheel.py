"""Build the wheel, install it in an environment of its own, and run the main job from there."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import environment


def main() -> None:
    """Fails when the wheel lacks configs, weights or code."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        pip: list[str | Path] = [environment.python(), "-m", "pip", "--disable-pip-version-check"]
        environment.run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", out, "."])
        (wheel,) = out.glob("*.whl")
        # The dependencies of the project's environment serve here too; only the project itself comes from the wheel.
        venv.create(out / "venv", with_pip=True)
        python = out / "venv" / environment.python().relative_to(environment.VENV)
        site = subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True)
        ours = subprocess.check_output(
            [environment.python(), "-c", "import site; print(site.getsitepackages()[0])"], text=True
        )
        environment.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel])
        # Behind the wheel's own folder on the path, so that the wheel's copy wins over the checkout's.
        Path(site.strip(), "dependencies.pth").write_text(ours)
        command: list[str | Path] = [python, "-P", "-m", "nasa_video", "generate", "a red ball bouncing"]
        options = ["--neg", "red", "--json", "-o", "ball.mp4"]
        done = subprocess.run([*command, *options], cwd=out, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"the installed wheel cannot run the main job:\n{done.stdout}{done.stderr}")
        result = json.loads(done.stdout.splitlines()[-1])
        where = subprocess.check_output(
            [python, "-P", "-c", "import nasa_video; print(nasa_video.__file__)"], text=True, cwd=out
        )
        if str(out) not in where:
            sys.exit(f"the run used {where.strip()}, not the wheel")
        print(f"the wheel ({wheel.stat().st_size / 1e6:.1f} MB) made {result['frames']} frames")


if __name__ == "__main__":
    main()
