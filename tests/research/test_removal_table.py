"""The removal table of the measurements: its rows, its journal, its means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nasa_video.evaluation.benchmarks.removal import Cell, Verdict, cells
from nasa_video.evaluation.samples import Method
from nasa_video.evaluation.statistics import wilson
from nasa_video.guidance.methods import Nasa
from research import removal_table
from research.removal_table import row_of, summary

ANY = {"out_of_range": 0.0, "sharpness": 1.0, "flicker": 0.0, "luma": 100.0}


def test_a_row_counts_removed_held_and_both() -> None:
    verdicts = [Verdict(True, True, ANY), Verdict(True, False, ANY | {"out_of_range": 0.2}), Verdict(False, True, ANY)]
    row = row_of(Cell(Method("nasa:1", Nasa(1.0)), 4, "colour", "conflict"), verdicts)
    assert (row["n"], row["removed"], row["held"], row["both"]) == (3, 2 / 3, 2 / 3, 1 / 3)
    assert row["both_interval"] == wilson(1, 3)
    assert row["out_of_range"] == pytest.approx(0.2 / 3)
    assert {"method", "scale", "steps", "attribute", "case"} <= row.keys()


def test_a_killed_table_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = list(cells([Method("none", None)], [4], ["conflict"], ["colour", "shape", "size"]))
    made: list[str] = []

    def run_cases(pipeline: Any, method: Method, steps: int, cases: Any, *rest: Any) -> list[Verdict]:
        made.append(cases[0].attribute)
        if len(made) == 3:
            raise KeyboardInterrupt
        return [Verdict(True, True, ANY)] * len(cases)

    class Model:
        class preset:
            name = "m"

            class sampler:
                def with_first_chunk_steps(first_steps: None) -> None:
                    pass

        def with_sampler(self, sampler: None) -> Model:
            return self

    monkeypatch.setattr(removal_table, "run_cases", run_cases)
    journal = tmp_path / "journal.jsonl"

    def run(n: int) -> list[dict[str, Any]]:
        return removal_table.removal_table(Model(), plan, None, n=n, split="report", frames=9, batch=4, journal=journal)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        run(2)
    with journal.open("a") as file:
        file.write('{"key": "none/4/conflict/si')  # what a kill in the middle of a write leaves
    rows = run(2)
    assert made == ["shape", "colour", "size", "size"]
    assert [row["attribute"] for row in rows] == ["shape", "colour", "size"]
    run(5)
    assert made[4:] == ["shape", "colour", "size"], "another n is another table"


def test_means_are_over_the_attributes() -> None:
    plan = [Cell(Method("nasa:1", Nasa(1.0)), 4, attribute, "conflict") for attribute in ("colour", "shape")]
    rows = [row_of(cell, [Verdict(True, held, ANY)] * 8) for cell, held in zip(plan, (True, False), strict=True)]
    (mean,) = summary(rows)
    assert (mean["held"], mean["n"]) == (0.5, 16)
