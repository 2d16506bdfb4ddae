"""Chooses every method's settings on one set of prompts, reports them on another: docs/removal.md, its JSON and plot.

    python scripts/make_removal_table.py --n 200 --choose-n 48

Every candidate of every method is tried on the same choosing prompts and seeds, and the one with the most videos that
lost the unwanted feature and held everything else (mean over the kinds of case) is reported. Finished cells are kept
under the run's folder; a rerun goes on there.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from nasa_video.evaluation.report import markdown, plot, summary

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
KINDS = ("unmentioned", "stated", "conflict")
Row = dict[str, Any]


@dataclass(frozen=True)
class _How:
    """What the cells are made on; journals of one device and number of processes are not read by another."""

    processes: int
    device: str
    batch: int


def main(
    n: Annotated[int, typer.Option("--n", help="Videos a reported cell.")] = 200,
    choose_n: Annotated[int, typer.Option(help="Videos a choosing cell.")] = 48,
    choose_attributes: Annotated[str, typer.Option(help="Attributes that settings are chosen on.")] = (
        "colour,background,shape,weather,blurry,border"
    ),
    attributes: Annotated[str, typer.Option(help="Attributes that are reported; empty: all.")] = "",
    steps: Annotated[str, typer.Option(help="Step counts that are reported.")] = "4,2,1",
    also: Annotated[str, typer.Option(help="Reported beside the best of every method; every CFG by default.")] = (
        ",".join(CANDIDATES["cfg"])
    ),
    processes: Annotated[int, typer.Option(help="Processes side by side.")] = os.cpu_count() or 1,
    device: Annotated[str, typer.Option(help="cpu or cuda; all processes share one GPU.")] = "cpu",
    batch: Annotated[int, typer.Option(help="Videos made at once.")] = 24,
    folder: Annotated[Path, typer.Option(help="Where finished cells are kept.")] = ROOT / "runs" / "removal",
    docs: Annotated[Path, typer.Option(help="Where the report is written.")] = ROOT / "docs",
) -> None:
    """Chooses, reports, writes."""
    weights = _weights_hash()
    folder = folder / f"{_everything_hash()[:12]}-{device}-{processes}"
    every = [label for labels in CANDIDATES.values() for label in labels]
    how = _How(processes, device, batch)
    chosen_on = _table(folder / "choose", every, [4], choose_attributes.split(","), "choose", choose_n, how)
    best = {family: _best(chosen_on, labels) for family, labels in CANDIDATES.items()}
    # every scale of classifier-free guidance: the table must show that no other would have done better
    reported = list(dict.fromkeys([*best.values(), *(label for label in also.split(",") if label)]))
    rows = _table(
        folder / "report",
        reported,
        [int(count) for count in steps.split(",")],
        attributes.split(",") if attributes else None,
        "report",
        n,
        how,
    )
    plot(chosen_on, docs / "images" / "removal-choosing.png")
    plot(rows, docs / "images" / "removal.png")
    facts = {"weights": weights, "commit": _commit(), "n": n, "choose_n": choose_n, "best": best}
    (docs / "removal.json").write_text(json.dumps({**facts, "rows": rows, "chosen_on": chosen_on}, indent=1) + "\n")
    (docs / "removal-table.md").write_text(_document(facts, chosen_on, rows), encoding="utf-8")


def _table(
    folder: Path,
    labels: list[str],
    steps: list[int],
    attributes: list[str] | None,
    split: str,
    n: int,
    how: _How,
) -> list[Row]:
    """All cells, made by several processes with a journal each."""
    folder.mkdir(parents=True, exist_ok=True)
    shares = [(labels, steps, attributes, split, n, folder / f"{i}.jsonl", i, how) for i in range(how.processes)]
    if how.processes == 1:
        return _share(*shares[0])
    with multiprocessing.get_context("spawn").Pool(how.processes) as pool:
        return [row for part in pool.starmap(_share, shares, chunksize=1) for row in part]


def _share(
    labels: list[str],
    steps: list[int],
    attributes: list[str] | None,
    split: str,
    n: int,
    journal: Path,
    index: int,
    how: _How,
) -> list[Row]:
    """Every process's share of the cells: one in as many as there are processes."""
    import torch

    from nasa_video.evaluation.removal import SpritesJudge, cells, parse_methods, removal_table
    from nasa_video.pipeline import VideoPipeline

    if how.processes > 1:
        torch.set_num_threads(1)
    pipeline = VideoPipeline.from_pretrained("sprites", how.device)
    plan = []
    for kind in KINDS:
        from nasa_video.evaluation.cases import attributes_of

        here = [a for a in attributes_of(kind) if attributes is None or a in attributes]  # type: ignore[arg-type]
        plan += list(cells(parse_methods(",".join(labels), pipeline), steps, [kind], here))  # type: ignore[list-item]
    mine = plan[index :: how.processes]
    done = 0

    def tell(cell: object, row: Row) -> None:
        nonlocal done
        done += 1
        if index == 0:
            print(f"{split}: {done} of {len(mine)} cells in this process", end="\r", flush=True)

    return removal_table(
        pipeline,
        mine,
        SpritesJudge(),
        n=n,
        split=split,
        frames=33,
        batch=how.batch,
        journal=journal,
        tell=tell,  # type: ignore[arg-type]
    )


def _mean_both(rows: list[Row], label: str) -> float:
    by_kind = [row["both"] for row in summary([row for row in rows if row["label"] == label])]
    return sum(by_kind) / len(by_kind)


def _best(rows: list[Row], labels: tuple[str, ...]) -> str:
    return max(labels, key=lambda label: _mean_both(rows, label))


def _weights_hash() -> str:
    path = files("nasa_video.sprites") / "weights" / "transformer" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _everything_hash() -> str:
    """Of all that a cell depends on: every part of the model, and the detectors that judge it."""
    from nasa_video.evaluation.identity import checkpoint_hash
    from nasa_video.evaluation.removal import detector_hash
    from nasa_video.models.presets import find_preset

    return hashlib.sha256(f"{checkpoint_hash(find_preset('sprites'))}{detector_hash()}".encode()).hexdigest()


def _commit() -> str:
    """The commit, or what to say where there is no repository: a copy on a rented machine has none."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown (no repository)"


def _document(facts: dict[str, Any], chosen_on: list[Row], rows: list[Row]) -> str:
    lines = [
        "# The removal table",
        "",
        f"Written by `scripts/make_removal_table.py` at commit {facts['commit']}; student's weights SHA-256 "
        f"{facts['weights'][:16]}…; {facts['n']} videos a reported cell, {facts['choose_n']} a choosing cell. Read "
        "[removal.md](removal.md) for what it says. Shares in %.",
        "",
        "## Reported: 4, 2 and 1 steps, prompts and seeds that nothing was chosen on",
        "",
        "![Removed against held](images/removal.png)",
        "",
        markdown(rows),
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
