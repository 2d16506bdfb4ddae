"""Chooses every method's settings on one set of prompts, reports them on another: Markdown, JSON, plots.

    python research/make_removal_table.py --n 200 --choose-n 48

Every candidate of every method is tried on the same choosing prompts and seeds, and the one with the most videos that
lost the unwanted feature and held everything else (mean over the kinds of case) is reported. Each finished cell is
written into the JSON at once, and what is there of the same weights is not made again: a table may be made in parts
(``--cases``, ``--methods``, ``--steps``, ``--attributes``, ``--seconds``), on several machines one after the other.
Choosing takes hours; ``--settings`` reports those that it names without.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import MofNCompleteColumn, Progress

from nasa_video.evaluation.cases import CaseKind, Split, attributes_of
from nasa_video.evaluation.removal import SpritesJudge, cells, parse_methods, removal_table
from nasa_video.evaluation.report import markdown, plot, summary
from nasa_video.files.atomic import write_text

if TYPE_CHECKING:
    from nasa_video.video.pipeline import VideoPipeline

ROOT = Path(__file__).resolve().parent.parent


def _at(name: str, *scales: float) -> tuple[str, ...]:
    return tuple(f"{name}:{scale:g}" for scale in scales)


CANDIDATES = {
    "none": ("none",),
    "cfg": _at("cfg", 1.5, 2, 3, 4),
    "nasa": _at("nasa", 0.75, 1, 1.25, 1.5) + _at("nasa+nopad", 0.1),
    "nasa-centred": _at("nasa-centred+conflict0+nolimit", 1, 1.5, 2),
    "nasa-centred+conflict": _at("nasa-centred+conflict1+nolimit", 0.75)
    + _at("nasa-centred+conflict2+nolimit", 0.5)
    + _at("nasa-centred+conflict4+nolimit", 0.3)
    + _at("nasa-centred+conflict6.5+nolimit", 0.2),
    "nasa-centred+conflict+limit": _at("nasa-centred+conflict1+limit0.3", 0.75)
    + _at("nasa-centred+conflict2+limit0.2", 0.5)
    + _at("nasa-centred+conflict2+limit0.3", 0.4, 0.5, 0.6)
    + _at("nasa-centred+conflict2+limit0.4", 0.5),
    "nag": _at("nag+pad", 2, 3, 9)
    + _at("nag+nopad", 1.5, 2, 3, 4, 6)
    + _at("nag+nopad+tau1.5", 3)
    + _at("nag+nopad+tau4", 4)
    + _at("nag+nopad+alpha0.25", 4, 8)
    + _at("nag+nopad+alpha0.75", 4)
    + _at("nag+nopad+alpha1", 2),
    "vsf": _at("vsf", 0.7, 1, 1.4, 2) + _at("vsf+pad", 1) + _at("vsf+bias-1", 2) + _at("vsf+bias1", 1),
}
CANDIDATES_OF_TEACHER = {
    "none": ("none",),
    "cfg": _at("cfg", 1.5, 2, 3, 5),
    "nasa": _at("nasa", 0.75, 1.25, 1.5),
    "nasa-centred+conflict+limit": _at("nasa-centred+conflict2+limit0.3", 0.3, 0.5, 0.6),
    "nag": _at("nag+nopad", 1.5, 2, 4),
    "vsf": _at("vsf", 1, 1.4, 2),
}
"""Fewer, because its videos take four times as long: around what was best on the student."""
KINDS: tuple[CaseKind, ...] = ("conflict", "stated", "unmentioned")
OPENING = 4
"""Steps of a first chunk where the others have fewer (``--opened``)."""
Row = dict[str, Any]


@dataclass(frozen=True)
class _Asked:
    """One cell of the tables; its row carries all of these."""

    model: str
    split: Split
    label: str
    steps: int
    first_steps: int | None
    case: CaseKind
    attribute: str
    n: int

    @classmethod
    def of(cls, row: Row) -> _Asked:
        """That of a row."""
        return cls(*(row[name] for name in cls.__dataclass_fields__))


class _Kept:
    """The rows of the JSON file; those of other weights are left behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {"weights": _weights_hash(), "everything": _everything_hash()}
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        rows: list[Row] = []
        if found.get("everything") == self.facts["everything"]:
            rows = found.pop("rows")
            self.facts = found
        self._rows = {_Asked.of(row): row for row in rows}

    def __contains__(self, asked: _Asked) -> bool:
        return asked in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, asked: _Asked, row: Row) -> None:
        """Keep a finished cell."""
        self._rows[asked] = row
        self.write()

    def write(self) -> None:
        """Write everything."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = sorted(self._rows.values(), key=_place)
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        facts = "".join(f" {json.dumps(name)}: {json.dumps(value)},\n" for name, value in self.facts.items())
        write_text(self.path, f'{{\n{facts} "rows": [\n{lines}\n ]\n}}\n')

    def rows(self, model: str, split: Split, n: int) -> list[Row]:
        """The rows of one table, those of a kind of case together."""
        return sorted(
            (row for a, row in self._rows.items() if (a.model, a.split, a.n) == (model, split, n)), key=_place
        )


def _place(row: Row) -> tuple[Any, ...]:
    """Where a row stands in its table."""
    kinds = ("unmentioned", "stated", "conflict")
    # its own label last, which may be of an earlier list
    labels = list(chain(*CANDIDATES.values(), *CANDIDATES_OF_TEACHER.values(), [row["label"]]))
    return (
        row["model"], row["split"], -row["steps"], row["first_steps"] or 0, kinds.index(row["case"]),
        attributes_of(row["case"]).index(row["attribute"]), labels.index(row["label"]), row["n"],
    )  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """One model's part of the table: what is tried on it and how, at which numbers of steps it is reported."""

    model: str
    candidates: dict[str, tuple[str, ...]]
    choose_steps: int
    choose_attributes: str
    choose_n: int
    counts: list[tuple[int, int | None]]
    best: str

    def to_choose(self) -> list[_Asked]:
        """The cells that settings are chosen on."""
        return [
            _Asked(self.model, "choose", label, self.choose_steps, None, kind, attribute, self.choose_n)
            for kind, attribute in _cases(self.choose_attributes)
            for labels in self.candidates.values()
            for label in labels
        ]

    def choose(self, kept: _Kept) -> dict[str, str]:
        """The best setting of each family; none where not all have been tried."""
        if not all(asked in kept for asked in self.to_choose()):
            return {}
        rows = kept.rows(self.model, "choose", self.choose_n)
        return {family: _best(rows, labels) for family, labels in self.candidates.items()}

    def to_report(self, n: int, labels: list[str], cases: list[tuple[CaseKind, str]]) -> list[_Asked]:
        """The reported cells, at numbers of steps, each with that of the first chunk."""
        return [
            _Asked(self.model, "report", label, count, first, kind, attribute, n)
            for count, first in self.counts
            for kind, attribute in cases
            for label in labels
        ]


@dataclass(frozen=True)
class _Making:
    """How cells are made; `until` is when the last may begin, on time.monotonic's clock."""

    device: str
    batch: int
    until: float
    compiled: bool

    @property
    def place(self) -> str:
        """What a row says of where it was made."""
        return f"{self.device}, bfloat16" if self.compiled and self.device == "cpu" else self.device


def main(
    n: Annotated[int, typer.Option("--n", help="Videos a reported cell.")] = 200,
    choose_n: Annotated[int, typer.Option(help="Videos a choosing cell.")] = 48,
    choose_attributes: Annotated[str, typer.Option(help="Attributes that settings are chosen on.")] = (
        "colour,background,shape,weather,blurry,border,dim,size"
    ),
    attributes: Annotated[str, typer.Option(help="Attributes that are reported; empty: all.")] = "",
    cases: Annotated[str, typer.Option(help="Kinds of case that are reported, the first made first.")] = ",".join(
        KINDS
    ),
    methods: Annotated[str, typer.Option(help="Methods that are reported, in this order; empty: all.")] = "",
    settings: Annotated[str, typer.Option(help="Report these, such as none,nasa-centred:0.5, and choose none.")] = "",
    steps: Annotated[str, typer.Option(help="Step counts that are reported, the first made first.")] = "4,2,1",
    opened: Annotated[str, typer.Option(help=f"And with a first chunk in {OPENING} steps; empty: none.")] = "2,1",
    teacher_steps: Annotated[int, typer.Option(help="Steps of the multi-step teacher; 0: it is left out.")] = 20,
    teacher_choose_attributes: Annotated[
        str, typer.Option(help="Attributes that settings of the teacher are chosen on.")
    ] = "colour,dim",
    also: Annotated[
        str, typer.Option(help="Reported beside the best of every method on the student.")
    ] = "cfg:1.5,cfg:3",
    processes: Annotated[int, typer.Option(help="Processes side by side.")] = os.cpu_count() or 1,
    device: Annotated[str, typer.Option(help="cpu or cuda; all processes share one GPU.")] = "cpu",
    batch: Annotated[int, typer.Option(help="Videos made at once.")] = 24,
    compiled: Annotated[
        bool,
        typer.Option("--compiled", help="In bfloat16 through torch.compile: faster on a CPU with AMX."),
    ] = False,
    docs: Annotated[Path, typer.Option(help="Folder of removal.json and the report.")] = ROOT / "runs" / "removal",
    seconds: Annotated[
        float, typer.Option(help="Begin no cell after so many seconds, and report what there is.")
    ] = float("inf"),
) -> None:
    """Chooses, reports, writes."""
    if settings and methods:
        raise typer.BadParameter("--settings names what is reported, --methods picks from the chosen: give one of them")
    if unknown := [name for name in _words(methods) if name not in CANDIDATES]:
        raise typer.BadParameter(f"--methods takes some of {', '.join(CANDIDATES)}, got {unknown[0]}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    making = _Making(device, batch, time.monotonic() + seconds, compiled)
    kept = _Kept(docs / "removal.json")
    threads = max(1, (os.cpu_count() or 1) // processes)
    counts = [(int(count), None) for count in _words(steps)] + [(int(count), OPENING) for count in _words(opened)]
    student = _Part("sprites", CANDIDATES, 4, choose_attributes, choose_n, counts, "best")
    teacher = _Part(
        "sprites-teacher", CANDIDATES_OF_TEACHER, teacher_steps, teacher_choose_attributes, choose_n,
        [(teacher_steps, None)], "best_of_teacher",
    )  # fmt: skip
    parts = [student, teacher] if teacher_steps else [student]
    those = list(_cases(attributes, _words(cases)))
    unchosen, complete = [], True
    with ProcessPoolExecutor(processes, get_context("spawn"), _set_threads, (threads,)) as workers:
        for part in parts:
            if not settings and not _make(workers, making, kept, part.to_choose()):
                unchosen.append(part.model)
                continue
            best = part.choose(kept)
            if settings:
                labels = _words(settings)
            elif methods:  # the teacher has fewer
                labels = [best[name] for name in _words(methods) if name in best]
            else:
                labels = list(dict.fromkeys([*best.values(), *(_words(also) if part is student else [])]))
            complete &= _make(workers, making, kept, part.to_report(n, labels, those))
    if len(kept):
        # what was chosen for a part that is left out now still is
        kept.facts = {part.best: {} for part in (student, teacher)} | kept.facts
        kept.facts |= {"commit": _commit(), "choose_n": choose_n, "n": n}
        kept.facts |= {part.best: part.choose(kept) for part in parts}
        kept.write()
        _write_report(docs, kept)
    if unchosen:
        print(f"not all choosing cells of {', '.join(unchosen)} are there; run again to go on")
        raise typer.Exit(1)
    if not complete:
        print("not all cells are there: the time was up; run again to go on")


def _write_report(docs: Path, kept: _Kept) -> None:
    """The plots and the table of what is kept."""
    facts = kept.facts
    n, choose_n = facts["n"], facts["choose_n"]
    chosen_on, rows = kept.rows("sprites", "choose", choose_n), kept.rows("sprites", "report", n)
    of_teacher = kept.rows("sprites-teacher", "choose", choose_n), kept.rows("sprites-teacher", "report", n)
    (docs / "images").mkdir(parents=True, exist_ok=True)
    if facts["best"]:
        plot(chosen_on, docs / "images" / "removal-choosing.png")
    if rows:
        plot(rows, docs / "images" / "removal.png")
    document = _document(facts, chosen_on, rows, *of_teacher)
    (docs / "removal-table.md").write_text(document, encoding="utf-8")


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _cases(attributes: str, kinds: Sequence[str] = KINDS) -> Iterator[tuple[CaseKind, str]]:
    """Kinds of case with their attributes, all or the given ones."""
    for kind in sorted(set(KINDS) & set(kinds), key=list(kinds).index):
        for attribute in attributes_of(kind):
            if not attributes or attribute in _words(attributes):
                yield kind, attribute


def _make(workers: Executor, making: _Making, kept: _Kept, wanted: list[_Asked]) -> bool:
    """Make what is not kept, in order; whether everything is there."""
    futures = {workers.submit(_cell, making, asked): asked for asked in wanted if asked not in kept}
    try:
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
            for future in progress.track(as_completed(futures), total=len(futures), description="cells"):
                if (row := future.result()) is not None:
                    kept.add(futures[future], row)
    except BaseException:
        workers.shutdown(wait=False, cancel_futures=True)  # or they would go on with all that is waiting
        raise
    return all(asked in kept for asked in wanted)


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True


@cache
def _pipeline(model: str, device: str, compiled: bool) -> VideoPipeline:
    import torch

    from nasa_video.models.placement import Placement
    from nasa_video.video.pipeline import VideoPipeline

    # the detectors say the same of what a bfloat16 decoder makes (docs/method/removal.md)
    placement = Placement(half_decoder=compiled or device != "cpu")
    dtype = torch.bfloat16 if compiled else None
    pipeline = VideoPipeline.from_pretrained(
        model, device, dtype, placement=placement, compiled="on" if compiled else "off"
    )
    if compiled:
        # all videos are short and of one length: a graph for every chunk attends to what is there, one for all of them
        # to a full window each time
        pipeline.model.static_cache = False
        torch._dynamo.config.automatic_dynamic_shapes = False
    return pipeline


@cache
def _judge(device: str) -> SpritesJudge:
    return SpritesJudge(device=device)


def _cell(making: _Making, asked: _Asked) -> Row | None:
    """One cell's row; None where the time is up."""
    if time.monotonic() > making.until:
        return None
    pipeline, judge = _pipeline(asked.model, making.device, making.compiled), _judge(making.device)
    methods = parse_methods(asked.label, pipeline)
    cell = cells(methods, [asked.steps], [asked.case], [asked.attribute], asked.first_steps)
    row = removal_table(pipeline, cell, judge, n=asked.n, split=asked.split, frames=33, batch=making.batch)[0]
    return {"model": asked.model, "split": asked.split, **row, "device": making.place}


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


def _document(
    facts: dict[str, Any], chosen_on: list[Row], rows: list[Row], teacher_chosen_on: list[Row], of_teacher: list[Row]
) -> str:
    lines = [
        "# The removal table",
        "",
        f"Written by `research/make_removal_table.py` at commit {facts['commit']}; student's weights SHA-256 "
        f"{facts['weights'][:16]}…; {facts['n']} videos a reported cell, {facts['choose_n']} a choosing cell; each row "
        "of [removal.json](removal.json) says what made it, a GPU (bfloat16) or a CPU (float32, if nothing else is "
        f"said). Means are over the attributes that are there: n / {facts['n']} of them. Read [removal.md](removal.md) "
        "for what it says. Shares in %.",
        "",
        "## Reported: prompts and seeds that nothing was chosen on",
        "",
        "![Removed against held](images/removal.png)",
        "",
        markdown(rows),
    ]
    if of_teacher:
        lines += ["## The multi-step teacher, same prompts and seeds", "", markdown(of_teacher)]
    if chosen_on:
        lines += _choosing("settings", facts["best"], chosen_on)
        if facts["best"]:
            lines += ["![Choosing: removed against held](images/removal-choosing.png)", ""]
    if teacher_chosen_on:
        lines += _choosing("the teacher's settings", facts["best_of_teacher"], teacher_chosen_on)
    return "\n".join(lines)


def _choosing(what: str, best: dict[str, str], chosen_on: list[Row]) -> list[str]:
    title = f"How {what} were chosen" if best else f"Cells to choose {what} from, not all of them yet"
    lines = [
        f"## {title} ({chosen_on[0]['steps']} steps, other prompts and seeds)",
        "",
        "Most videos with both, removed and held, mean over the kinds of case.",
        "",
        "| method | unmentioned, both | stated, both | conflict, both | mean | chosen |",
        "|---|---|---|---|---|---|",
    ]
    both: dict[str, dict[str, float]] = defaultdict(dict)
    for row in summary(chosen_on):
        both[row["label"]][row["case"]] = row["both"]
    for label in dict.fromkeys(row["label"] for row in chosen_on):
        shares = " | ".join(f"{100 * both[label].get(kind, 0):.1f}" for kind in ("unmentioned", "stated", "conflict"))
        chosen = "yes" if label in best.values() else ""
        lines.append(f"| {label} | {shares} | {100 * _mean_both(chosen_on, label):.1f} | {chosen} |")
    return [*lines, ""]


if __name__ == "__main__":
    typer.run(main)
