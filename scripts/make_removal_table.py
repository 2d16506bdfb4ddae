"""Chooses every method's settings on one set of prompts, reports them on another: docs/removal.md, its JSON and plot.

    python scripts/make_removal_table.py --n 200 --choose-n 48

Every candidate of every method is tried on the same choosing prompts and seeds, and the one with the most videos that
lost the unwanted feature and held everything else (mean over the kinds of case) is reported. Finished cells are kept
under the run's folder; a rerun goes on there.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections import defaultdict
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import MofNCompleteColumn, Progress

from nasa_video.evaluation.cases import CaseKind, Split, attributes_of
from nasa_video.evaluation.removal import SpritesJudge, cells, parse_methods, removal_table
from nasa_video.evaluation.report import markdown, plot, summary

if TYPE_CHECKING:
    from nasa_video.pipeline import VideoPipeline

ROOT = Path(__file__).resolve().parent.parent
CANDIDATES = {
    "none": ("none",),
    "cfg": ("cfg:1.5", "cfg:2", "cfg:3", "cfg:4", "cfg:6"),
    "nasa": ("nasa:0.5", "nasa:0.75", "nasa:1", "nasa:1.25", "nasa+nopad:0.05", "nasa+nopad:0.1", "nasa+nopad:0.2"),
    "nasa-centred+even": tuple(f"nasa-centred+even:{scale}" for scale in (0.5, 0.75, 1, 1.25, 1.5)),
    "nasa-centred": tuple(f"nasa-centred:{scale}" for scale in (0.4, 0.5, 0.6, 0.75, 0.9)),
    "nag": ("nag:2", "nag:3", "nag:5", "nag:9", "nag+nopad:1.5", "nag+nopad:2", "nag+nopad:3"),
    "vsf": ("vsf:0.7", "vsf:1", "vsf:1.4", "vsf:2", "vsf+pad:1", "vsf+pad:1.4"),
}
KINDS: tuple[CaseKind, ...] = ("unmentioned", "stated", "conflict")
Row = dict[str, Any]


@dataclass(frozen=True)
class _Plan:
    """What all cells of one table have in common; `until` is when the last may begin, on time.monotonic's clock."""

    folder: Path
    device: str
    batch: int
    until: float
    model: str
    split: Split
    n: int


def _table(
    workers: Executor, plan: _Plan, labels: list[str], steps: list[int], attributes: list[str] | None
) -> tuple[list[Row], bool]:
    """The rows of all cells, those of the first number of steps made first, and whether none is missing."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    futures = [
        workers.submit(_cell, plan, label, count, kind, attribute)
        for count in steps
        for kind in KINDS
        for attribute in attributes_of(kind)
        if attributes is None or attribute in attributes
        for label in labels
    ]
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
        found = [future.result() for future in progress.track(futures, description=f"{plan.model}, {plan.split}")]
    rows = [row for row in found if row is not None]
    return rows, len(rows) == len(found)


def main(
    n: Annotated[int, typer.Option("--n", help="Videos a reported cell.")] = 200,
    choose_n: Annotated[int, typer.Option(help="Videos a choosing cell.")] = 48,
    choose_attributes: Annotated[str, typer.Option(help="Attributes that settings are chosen on.")] = (
        "colour,background,shape,weather,blurry,border"
    ),
    attributes: Annotated[str, typer.Option(help="Attributes that are reported; empty: all.")] = "",
    steps: Annotated[str, typer.Option(help="Step counts that are reported, the first made first.")] = "4,2,1",
    teacher_steps: Annotated[int, typer.Option(help="Steps of the multi-step teacher; 0: it is not reported.")] = 20,
    also: Annotated[str, typer.Option(help="Reported beside the best of every method.")] = "cfg:1.5,cfg:3,cfg:6",
    processes: Annotated[int, typer.Option(help="Processes side by side.")] = os.cpu_count() or 1,
    device: Annotated[str, typer.Option(help="cpu or cuda; all processes share one GPU.")] = "cpu",
    batch: Annotated[int, typer.Option(help="Videos made at once.")] = 24,
    folder: Annotated[Path, typer.Option(help="Where finished cells are kept.")] = ROOT / "runs" / "removal",
    docs: Annotated[Path, typer.Option(help="Where the report is written.")] = ROOT / "docs",
    seconds: Annotated[
        float, typer.Option(help="Begin no cell after so many seconds, and report what there is.")
    ] = float("inf"),
) -> None:
    """Chooses, reports, writes."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    until = time.monotonic() + seconds
    kept = folder / f"{_everything_hash()[:12]}-{device}"
    with ProcessPoolExecutor(processes, get_context("spawn"), _set_threads, (threads,)) as workers:

        def plan(model: str, split: Split, count: int) -> _Plan:
            return _Plan(kept / f"{model}-{split}", device, batch, until, model, split, count)

        every = [label for labels in CANDIDATES.values() for label in labels]
        choosing = plan("sprites", "choose", choose_n)
        chosen_on, all_there = _table(workers, choosing, every, [4], choose_attributes.split(","))
        if not all_there:
            print("not all choosing cells are there; run again to go on")
            raise typer.Exit(1)
        best = {family: _best(chosen_on, labels) for family, labels in CANDIDATES.items()}
        reported = list(dict.fromkeys([*best.values(), *(label for label in also.split(",") if label)]))
        counts = [int(count) for count in steps.split(",")]
        those = attributes.split(",") if attributes else None
        rows, all_there = _table(workers, plan("sprites", "report", n), reported, counts, those)
        of_teacher: list[Row] = []
        if teacher_steps:
            teacher = plan("sprites-teacher", "report", n)
            of_teacher, there_too = _table(workers, teacher, reported, [teacher_steps], those)
            all_there = all_there and there_too
    plot(chosen_on, docs / "images" / "removal-choosing.png")
    plot(rows, docs / "images" / "removal.png")
    facts = {"weights": _weights_hash(), "commit": _commit(), "device": device, "n": n, "choose_n": choose_n}
    facts |= {"best": best, "complete": all_there}
    everything = {**facts, "rows": rows, "teacher_rows": of_teacher, "chosen_on": chosen_on}
    (docs / "removal.json").write_text(json.dumps(everything, indent=1) + "\n")
    (docs / "removal-table.md").write_text(_document(facts, chosen_on, rows, of_teacher), encoding="utf-8")


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True


@cache
def _pipeline(model: str, device: str) -> VideoPipeline:
    from nasa_video.memory.placement import Placement
    from nasa_video.pipeline import VideoPipeline

    # the detectors say the same of what a bfloat16 decoder makes (docs/removal.md)
    return VideoPipeline.from_pretrained(model, device, placement=Placement(half_decoder=device != "cpu"))


@cache
def _judge(device: str) -> SpritesJudge:
    return SpritesJudge(device=device)


def _cell(plan: _Plan, label: str, steps: int, kind: CaseKind, attribute: str) -> Row | None:
    """One cell's row, read where it is finished; None where it is not and the time is up."""
    journal = plan.folder / f"{label}-{steps}-{kind}-{attribute}.jsonl".replace(":", "_")
    if not journal.exists() and time.monotonic() > plan.until:
        return None
    device = "cpu" if journal.exists() else plan.device  # to read a row needs no GPU
    pipeline, judge = _pipeline(plan.model, device), _judge(device)
    cell = cells(parse_methods(label, pipeline), [steps], [kind], [attribute])
    settings: dict[str, Any] = {"n": plan.n, "split": plan.split, "frames": 33, "batch": plan.batch}
    return removal_table(pipeline, cell, judge, journal=journal, **settings)[0]


def _mean_both(rows: list[Row], label: str) -> float:
    by_kind = [float(row["both"]) for row in summary([row for row in rows if row["label"] == label])]
    return sum(by_kind) / len(by_kind)


def _best(rows: list[Row], labels: tuple[str, ...]) -> str:
    return max(labels, key=lambda label: _mean_both(rows, label))


def _weights_hash() -> str:
    path = files("nasa_video.sprites") / "weights" / "transformer" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _everything_hash() -> str:
    """Of all that a cell depends on: every part of both models, and the detectors that judge them."""
    from nasa_video.evaluation.identity import checkpoint_hash
    from nasa_video.evaluation.removal import detector_hash
    from nasa_video.models.presets import find_preset

    models = [checkpoint_hash(find_preset(name)) for name in ("sprites", "sprites-teacher")]
    return hashlib.sha256("".join((*models, detector_hash())).encode()).hexdigest()


def _commit() -> str:
    """The commit, or what to say where there is no repository: a copy on a rented machine has none."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown (no repository)"


def _document(facts: dict[str, Any], chosen_on: list[Row], rows: list[Row], of_teacher: list[Row]) -> str:
    missing = "" if facts["complete"] else " Not all cells are there: the time was up."
    teacher = ["## The multi-step teacher, same settings, prompts and seeds", "", markdown(of_teacher)]
    lines = [
        "# The removal table",
        "",
        f"Written by `scripts/make_removal_table.py` at commit {facts['commit']}; student's weights SHA-256 "
        f"{facts['weights'][:16]}…; {facts['n']} videos a reported cell, {facts['choose_n']} a choosing cell, made on "
        f"{facts['device']}. Read [removal.md](removal.md) for what it says. Shares in %.{missing}",
        "",
        "## Reported: prompts and seeds that nothing was chosen on",
        "",
        "![Removed against held](images/removal.png)",
        "",
        markdown(rows),
        *(teacher if of_teacher else []),
        "## How the settings were chosen (4 steps, other prompts and seeds)",
        "",
        "Most videos with both, removed and held, mean over the kinds of case.",
        "",
        "| method | unmentioned, both | stated, both | conflict, both | mean | chosen |",
        "|---|---|---|---|---|---|",
    ]
    both: dict[str, dict[str, float]] = defaultdict(dict)
    for row in summary(chosen_on):
        both[row["label"]][row["case"]] = row["both"]
    for labels in CANDIDATES.values():
        for label in labels:
            shares = " | ".join(f"{100 * both[label].get(kind, 0):.1f}" for kind in KINDS)
            chosen = "yes" if label in facts["best"].values() else ""
            lines.append(f"| {label} | {shares} | {100 * _mean_both(chosen_on, label):.1f} | {chosen} |")
    lines += ["", "![Choosing: removed against held](images/removal-choosing.png)", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
