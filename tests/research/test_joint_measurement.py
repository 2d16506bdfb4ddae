"""What docs/method/joint_attention.md measures: what counts as clean, and that no scale is chosen where it counts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))
import joint_tables as tables


def cell(gone: list[int], held: list[int], whole: list[int]) -> dict[str, Any]:
    return {"gone": gone, "held": held, "whole": whole, "question": list(range(len(gone)))}


def made_up() -> dict[str, Any]:
    """The second scale of each method is best on the choosing half, every other one on the reporting half."""
    good, bad = cell([1, 1, 1], [1, 1, 0], [1, 1, 1]), cell([0, 1, 0], [1, 0, 1], [1, 1, 1])
    cells: dict[str, Any] = {"0 4 model": {"right": 0.9, "limit": 0.2}}
    for method in tables.METHODS:
        for index, scale in enumerate(method.scales):
            for kind in ("open", "conflict"):
                cells[f"0 4 choose {kind} {method.name} {scale:g}"] = good if index == 1 else bad
            for kind in ("open", "conflict", "other", "empty"):
                cells[f"0 4 report {kind} {method.name} {scale:g}"] = bad if index == 1 else good
    return cells


def test_clean_needs_all_three() -> None:
    assert tables.clean(cell([1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 1]), "open") == [1, 0, 0, 0]
    # A negative that names nothing in the picture should change nothing.
    assert tables.clean(cell([1, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 0]), "other") == [0, 1, 0, 0]


def test_scales_are_chosen_on_the_choosing_half_alone() -> None:
    cells = made_up()
    for method in tables.METHODS:
        assert tables.choose(cells, [0], 4, method) == method.scales[1]


def test_section_reports_the_chosen_scales_on_the_other_half(tmp_path: Path) -> None:
    text = tables.section(made_up(), [0], [4], 1000)
    (row,) = [line for line in text.splitlines() if line.startswith("| 4 | NASA, F3")]
    assert "| 0.5 |" in row
    assert row.count("| 0 (0 to 0)") == 2  # removals: the reporting half has none at this scale
    assert "90%" in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.MARKS[0]}\nold\n{tables.MARKS[1]}\nafter\n")
    tables.write_page(page, text)
    written = page.read_text()
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert text in written
    assert "old" not in written
    with pytest.raises(KeyError):
        tables.section(made_up(), [0, 1], [4], 1000)  # a seed that has not been measured
