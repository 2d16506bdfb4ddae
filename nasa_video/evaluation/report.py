"""The report of an evaluation: Markdown, and one HTML file that needs nothing else (no network, no scripts)."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nasa_video.errors import InputError
from nasa_video.evaluation.metrics import read_stills
from nasa_video.evaluation.results import Arm, Difference, Item, Metric, Results, plain
from nasa_video.evaluation.statistics import Interval
from nasa_video.files.atomic import write_text

INTERVALS = (
    "Intervals are 95 %: Wilson for shares (differences: Newcombe's paired form), bootstrap over prompts for means."
)
PROMPTS_SHOWN = 400
"""Rows of the table by prompt; the rest is in results.json."""
SHOWN = 4
"""Best samples of an arm, and as many worst."""
_FRAMES, _MAX_SIDE = 4, 256
_MAIN_METRICS = 3


def write_report(results: Results, folder: Path, media: Path | None = None, stem: str = "report") -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` into a folder.

    Args:
        media: where the stills and videos that the results name lie; None: in the same folder.

    Returns:
        The two files.
    """
    page, text = folder / f"{stem}.html", folder / f"{stem}.md"
    write_text(page, html(results, media or folder))
    write_text(text, markdown(results))
    return page, text


# --- tables


@dataclass(frozen=True)
class Cell:
    """One cell: its text, what stands small beside it, and how it is shown ("bold", "text", "sure better" ...)."""

    text: str
    small: str = ""
    look: str = ""


@dataclass(frozen=True)
class Table:
    """Headings and rows, for a page and for Markdown."""

    head: list[str]
    rows: list[list[Cell]]

    def markdown(self) -> str:
        """As a Markdown table."""
        shown = [self.head, ["---"] * len(self.head), *([_text(cell) for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(' '.join(text.replace('|', chr(92) + '|').split()) for text in row)} |"
                         for row in shown)  # fmt: skip


def _text(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.look == "bold" else cell.text
    return f"{text} ({cell.small})" if cell.small else text


def score_table(results: Results, group: str = "") -> Table:
    """A row an arm, a column a metric, over one group or everything."""
    scores = {(one.arm, one.metric): one for one in results.scores([group])}
    metrics = [metric for metric in results.metrics if any(key[1] == metric.name for key in scores)]
    rows = []
    for arm in results.arms:
        own = [scores.get((arm.label, metric.name)) for metric in metrics]
        values = [
            Cell("–") if score is None else Cell(metric.show(score.value), between(metric, score.interval))
            for metric, score in zip(metrics, own, strict=True)
        ]
        count = max((score.n for score in own if score is not None), default=0)
        rows.append([Cell(arm.label, look="bold"), Cell(str(count)), *values])
    return Table(["", "n", *(metric.heading for metric in metrics)], rows)


def difference_table(results: Results, changes: Sequence[Difference]) -> Table:
    """A row an arm and metric: the mean of the paired differences, and how many pairs went which way."""
    rows = []
    for one in changes:
        metric = results.metric(one.metric)
        verdict = ""
        if one.sure and metric.better != "neither":
            verdict = " better" if (one.value > 0) == (metric.better == "higher") else " worse"
        change = Cell(
            metric.show(one.value, sign=True), between(metric, one.interval, True), "sure" * one.sure + verdict
        )
        counts = Cell(str(one.raised)), Cell(str(one.lowered))
        rows.append([Cell(one.arm), Cell(one.against), Cell(metric.heading), Cell(str(one.n)), change, *counts])
    return Table(["", "against", "metric", "pairs", "difference", "raised", "lowered"], rows)


def settings_table(results: Results) -> Table:
    """Every setting, then every arm with its own."""
    rows = [(name, plain(value)) for name, value in results.settings.items()]
    rows += [(f"arm {a.label}", plain({"method": a.method, "steps": a.steps, **a.settings})) for a in results.arms]
    return Table(["setting", "value"], [[Cell(name), Cell(value, look="text")] for name, value in rows])


def between(metric: Metric, interval: Interval | None, sign: bool = False) -> str:
    """``low to high``; nothing where there is no interval."""
    return "" if interval is None else f"{metric.show(interval[0], sign)} to {metric.show(interval[1], sign)}"


def markdown(results: Results) -> str:
    """The whole report as text."""
    parts = [f"# {results.title}", "\n".join(f"- {note}" for note in (*results.notes, INTERVALS))]
    parts += ["## Scores", score_table(results).markdown()]
    for title, groups in (("###", results.groups), ("####", results.parts)):
        if len(groups) > 1:
            parts += [text for group in groups for text in (f"{title} {group}", score_table(results, group).markdown())]
    if changes := list(results.differences()):
        parts += ["## Differences, pair by pair", difference_table(results, changes).markdown()]
    return "\n\n".join([*parts, "## Settings", settings_table(results).markdown()]) + "\n"


# --- page


def html(results: Results, folder: Path) -> str:
    """The page; stills and videos are read from ``folder``."""
    from jinja2 import Environment

    from nasa_video.evaluation import plots

    here = files("nasa_video.evaluation")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (here / "report.html.jinja").read_text(encoding="utf-8")
    )
    changes = list(results.differences())
    main = {metric.name for metric in results.metrics[:_MAIN_METRICS]}
    return template.render(
        results=results,
        style=(here / "page.css").read_text(encoding="utf-8"),
        facts=_facts(results),
        notes=(*results.notes, INTERVALS),
        scores=score_table(results),
        groups=[(group, score_table(results, group)) for group in results.groups if len(results.groups) > 1],
        parts=[(part, score_table(results, part)) for part in results.parts],
        plots=plots.overview(results, results.metrics[:_MAIN_METRICS]),
        differences=difference_table(results, changes) if changes else None,
        changes=[plots.changes(results, one) for one in changes if one.metric in main],
        by_prompt=_by_prompt(results, changes),
        metric=sheet_metric(results),
        sheets=list(_sheets(results, folder)),
        settings=settings_table(results),
    )


def _facts(results: Results) -> str:
    facts = [f"model {results.settings['model']}"] if "model" in results.settings else []
    facts += [f"{len(results.arms)} arms", f"{len(results.items)} samples"]
    checkpoint = results.settings.get("checkpoint_sha256")
    return " · ".join([*facts, f"checkpoint {checkpoint[:16]}…"] if isinstance(checkpoint, str) else facts)


def _by_prompt(results: Results, changes: Sequence[Difference]) -> dict[str, Any] | None:
    """One row a sample: its differences in the main metric under every arm, the largest first."""
    metric = sheet_metric(results)
    columns = [one for one in changes if one.metric == metric.name]
    found: dict[str, dict[str, float]] = {}
    items: dict[str, Item] = {}
    for column in columns:
        for item, change in column.pairs:
            found.setdefault(item.id, {})[column.arm] = change
            items.setdefault(item.id, item)
    if not found:
        return None
    ranked = sorted(found, key=lambda name: -sum(abs(change) for change in found[name].values()))
    rows = [
        (items[name], [metric.show(found[name][one.arm], sign=True) if one.arm in found[name] else "–"
                       for one in columns])
        for name in ranked[:PROMPTS_SHOWN]
    ]  # fmt: skip
    return {"arms": [one.arm for one in columns], "rows": rows, "number": len(ranked)}


# --- samples that an arm did best and worst, beside the same samples of what it is held against


@dataclass(frozen=True)
class Pick:
    """A sample with the value that it was picked for, and its counterpart where that has a picture."""

    item: Item
    value: float
    other: Item | None
    change: float | None


def picks(results: Results, arm: Arm, metric: Metric) -> tuple[list[Pick], list[Pick]]:
    """The best and the worst samples of an arm that have pictures.

    They are ranked by their difference to what the arm is held against; the arm that all are held against by its value.
    """
    base = results.baseline_of(arm)
    others = {} if base == arm.label else {item.id: item for item in results.of(base)}
    found = []
    for item in results.of(arm.label):
        value = item.values.get(metric.name)
        if item.media is None or value is None:
            continue
        other = others.get(item.id)
        before = other.values.get(metric.name) if other is not None else None
        found.append(Pick(item, value, other, None if before is None else value - before))
    sign = -1 if metric.better == "lower" else 1
    found.sort(key=lambda pick: (sign * (pick.change or 0), sign * pick.value, pick.item.id), reverse=True)
    count = min(SHOWN, len(found) // 2) or len(found)
    return found[:count], found[-count:][::-1] if len(found) > count else []


def sheet_metric(results: Results) -> Metric:
    """What samples are ranked by: everything right where that is measured, else the first metric."""
    return next((metric for metric in results.metrics if metric.name == "both"), results.metrics[0])


def _sheets(results: Results, folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """For every arm its best and its worst, as titles with figures."""
    metric = sheet_metric(results)
    for arm in results.arms:
        against = results.baseline_of(arm)
        for name, chosen in zip(("best", "worst"), picks(results, arm, metric), strict=True):
            figures = []
            for pick in chosen:
                own = thumbnail(pick.item, folder)
                other = thumbnail(pick.other, folder) if pick.other is not None else None
                if own is not None:
                    shown = [(other, against), (own, arm.label)] if other is not None else [(own, "")]
                    figures.append({"pick": pick, "stills": shown})
            if figures:
                by = "" if against == arm.label else f", by the difference to {against}"
                yield f"{arm.label}: {name}{by}", figures


def thumbnail(item: Item, folder: Path) -> str | None:
    """A sample's still (a video: frames side by side) as a data URL; None where its file is not there any more."""
    if item.media is None:
        return None
    try:
        frames = read_stills(folder / item.media, _FRAMES)
    except InputError:
        return None
    image = Image.fromarray(np.concatenate(list(frames), axis=1))
    if item.crop is not None:
        image = image.crop(item.crop)
    side = _MAX_SIDE * (len(frames) if len(frames) > 1 else max(1, round(image.width / image.height)))
    image.thumbnail((side, _MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
