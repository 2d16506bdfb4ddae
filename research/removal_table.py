"""The removal table in one process, with a journal: what the measurements here share."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nasa_video.evaluation.benchmarks.removal import Cell, SpritesJudge, Verdict, run_cases
from nasa_video.evaluation.benchmarks.removal_cases import Split, build_cases
from nasa_video.evaluation.statistics import wilson
from nasa_video.video.pipeline import VideoPipeline

Row = dict[str, Any]
_MEANS = ("out_of_range", "sharpness", "flicker", "luma")


def row_of(cell: Cell, verdicts: Sequence[Verdict]) -> Row:
    """A row of the table: shares from 0 to 1, each with its 95 % Wilson interval."""
    n = len(verdicts)
    counts = {name: int(sum(v.values[name] for v in verdicts)) for name in ("removed", "held", "both")}
    return {
        "method": cell.method.name,
        "label": cell.method.label,
        "scale": cell.method.scale,
        "steps": cell.steps,
        "first_steps": cell.first_steps,
        "attribute": cell.attribute,
        "case": cell.kind,
        "n": n,
        **{name: count / n for name, count in counts.items()},
        **{f"{name}_interval": wilson(count, n) for name, count in counts.items()},
        **{name: float(np.mean([v.values[name] for v in verdicts])) for name in _MEANS},
    }


def removal_table(
    pipeline: VideoPipeline,
    plan: Iterable[Cell],
    judge: SpritesJudge,
    *,
    n: int,
    split: Split,
    frames: int,
    batch: int,
    journal: Path | None = None,
    seed: int = 0,
    tell: Callable[[Cell, Row], None] | None = None,
) -> list[Row]:
    """Fill the cells.

    Args:
        journal: a JSON-lines file; cells that it holds are not run again, each finished cell is appended at once.
        tell: called with every row as it is ready.
    """
    settings = {"n": n, "split": split, "seed": seed, "frames": frames, "model": pipeline.preset.name}
    done = _read_journal(journal, settings)
    rows = []
    for cell in plan:
        first = "" if cell.first_steps is None else f" first {cell.first_steps}"
        key = f"{cell.method.label}/{cell.steps}{first}/{cell.kind}/{cell.attribute}"
        row = done.get(key)
        if row is None:
            cases = build_cases(cell.attribute, cell.kind, n, split, seed)
            made_by = pipeline.with_sampler(pipeline.preset.sampler.with_first_chunk_steps(cell.first_steps))
            row = row_of(cell, run_cases(made_by, cell.method, cell.steps, cases, judge, frames, batch))
            if journal is not None:
                with journal.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "settings": settings, "row": row}) + "\n")
        rows.append(row)
        if tell is not None:
            tell(cell, row)
    return rows


def _read_journal(journal: Path | None, settings: dict[str, Any]) -> dict[str, Row]:
    if journal is None or not journal.exists():
        return {}
    done = {}
    for line in journal.read_text(encoding="utf-8").split("\n"):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a killed run was writing: its cell is made again
        if entry["settings"] == settings:
            done[entry["key"]] = entry["row"]
    return done


def summary(rows: Sequence[Row]) -> list[Row]:
    """Rows of one (method label, steps, first steps, case), averaged over the attributes; n is summed."""
    groups: dict[tuple[str, int, int | None, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["label"], row["steps"], row.get("first_steps"), row["case"]].append(row)
    return [
        {
            **{name: group[0].get(name) for name in ("label", "method", "scale", "steps", "first_steps", "case")},
            "n": sum(row["n"] for row in group),
            **{name: sum(row[name] for row in group) / len(group) for name in ("removed", "held", "both", *_MEANS)},
        }
        for group in groups.values()
    ]
