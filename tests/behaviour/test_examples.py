"""The examples run as they are, with what they write in a temporary folder."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from nasa_video.files.source import probe
from nasa_video.guidance.methods import METHODS

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _registered_for_one_test() -> Iterator[None]:
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.mark.parametrize(("name", "frames"), [("text_to_video", 33), ("live_change", 57), ("own_method", 33)])
def test_a_script_writes_its_video(name: str, frames: int, tmp_path: Path) -> None:
    output = tmp_path / f"{name}.mp4"
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](str(output))
    assert probe(output).frames == frames


def test_the_notebook_runs_and_its_outputs_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "negatives.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    namespace: dict[str, object] = {}
    for cell in code:
        assert cell["outputs"] or "".join(cell["source"]).startswith(("from ", "import "))
        exec(compile("".join(cell["source"]), "negatives.ipynb", "exec"), namespace)
