"""The report of the NASA-T experiment: intervals over seeds, verdicts, both tables, and a judgement that stays."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "research"))

import nasa_t_report as report

CFG = "cfg:1.5"
FACTS: dict[str, Any] = {
    "iterations": 3, "batch": 2, "n": 5, "captions": 7, "attributes": "blurry", "weights": "abc", "commit": "def",
    "command": "python research/measure_nasa_t.py", "steps": (1, 4), "cfg": CFG, "jobs": (2, 16), "minutes": (1.0, 2.0),
    "world": {"sharpness": 0.5, "flicker": 1.5},
}  # fmt: skip


def row(arm: str, seed: int | None, label: str, steps: int, **values: float) -> dict[str, Any]:
    return {"arm": arm, "seed": seed, "label": label, "steps": steps, **dict.fromkeys(report.COLUMNS, 0.0), **values}


def test_intervals_are_students() -> None:
    # mean 2, deviation 1, n 3: 4.303 / sqrt(3)
    assert report.half_width([1.0, 2.0, 3.0]) == pytest.approx(2.4843, abs=1e-3)
    assert report.with_interval([1.0, 2.0, 3.0]) == "2.000 ± 2.484"
    assert report.with_interval([2.0]) == "2.000"
    assert report.with_interval([]) == "–"


def test_a_verdict_needs_an_interval_without_zero() -> None:
    up, down, mixed = [0.10, 0.11, 0.12], [-0.10, -0.11, -0.12], [0.10, -0.08, 0.04]
    assert report.verdict(up, 1) == report.verdict(down, -1) == "agrees"
    assert report.verdict(down, 1) == report.verdict(up, -1) == "disagrees"
    assert report.verdict(mixed, 1) == report.verdict([0.5], 1) == report.verdict([], 1) == "open"


def test_differences_are_paired_by_seed() -> None:
    claim = report.Claim("", ("all", "none"), ("nowhere", "none"), 1, (0, 0))
    rows = [row("all", seed, "none", 4, accuracy=0.5 + seed) for seed in (0, 1, 2)]
    rows += [row("nowhere", seed, "none", 4, accuracy=value) for seed, value in ((1, 0.25), (0, 0.125), (5, 9.0))]
    rows += [row("nowhere", 0, "none", 1, accuracy=7.0), row("nowhere", 0, "nasa", 4, accuracy=7.0)]
    assert report.differences(rows, claim, 4, "accuracy") == [0.375, 1.25]


def test_less_distance_is_better() -> None:
    """The paper: NASA in student and teacher is better than nowhere. Here it has more accuracy, and more distance."""
    rows = [row("nowhere", seed, "none", 4) for seed in range(3)]
    rows += [
        row("student+teacher", seed, "none", 4, accuracy=0.2 + seed / 100, distance=0.2 + seed / 100)
        for seed in range(3)
    ]
    line = next(
        text for text in report.table_of_claims(rows, report.claims_5(), [4]).splitlines()
        if text.startswith("| NASA in student + teacher is better")
    )  # fmt: skip
    assert [cell.strip() for cell in line.split("|")[4:10]] == [
        "0.210 ± 0.025", "agrees", "0.210 ± 0.025", "disagrees", "0.000 ± 0.000", "open",
    ]  # fmt: skip


def test_the_papers_numbers() -> None:
    best = max(report.PAPER_5, key=lambda arm: report.PAPER_5[arm])
    assert best == report.BEST
    for claim in (*report.claims_5(), *report.claims_3(CFG)):
        assert (claim.paper[0] - claim.paper[1]) * claim.direction > 0, claim.text


def test_the_report_has_both_tables_and_keeps_the_judgement(tmp_path: Path) -> None:
    rows = [
        row(arm, seed, label, steps, accuracy=0.25, both=0.75)
        for arm in report.PLACEMENTS for seed in (0, 1, 2) for label in ("none", "nasa", CFG) for steps in (1, 4)
    ]  # fmt: skip
    rows += [row(report.SHIPPED, None, "none", 4, accuracy=0.625)]
    path = tmp_path / "nasa_t_results.md"
    path.write_text(report.document(rows, FACTS, report.kept_judgement(path)), encoding="utf-8")
    text = path.read_text(encoding="utf-8")
    assert report.NOT_JUDGED in text
    assert "Unfinished: 2 of 16" in text
    assert all(f"| {name} | none | 3 | 0.250 ± 0.000 |" in text for name in report.NAMES_5.values())
    assert all(f"| {name} | 4 |" in text for name, _, _ in report.rows_3(CFG))
    assert "| shipped student | 4 | 1 | 0.625 |" in text
    path.write_text(text.replace(report.NOT_JUDGED, "It holds.\n\nIn two lines."), encoding="utf-8")
    again = report.document(rows, {**FACTS, "jobs": (16, 16)}, report.kept_judgement(path))
    assert "It holds.\n\nIn two lines." in again
    assert "Unfinished" not in again
    report.plot(rows, (1, 4), CFG, tmp_path / "images" / "nasa_t.png")
    assert (tmp_path / "images" / "nasa_t.png").read_bytes().startswith(b"\x89PNG")
    report.plot([], (1, 4), CFG, tmp_path / "empty.png")
