"""The report of the NASA-T experiment: tables 5 and 3 of arXiv 2412.02687 in small, what agrees with it, and a plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Row = dict[str, Any]
Verdict = Literal["agrees", "disagrees", "open"]
# Quantiles of Student's t at 97.5 % for 1 to 9 degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
SHIPPED, STUDENT, BEST = "shipped", "nowhere", "student+teacher"
PLACEMENTS = ("nowhere", "teacher", "teacher+fake", "student+teacher", "all")
PAPER_5 = {"nowhere": 30.34, "teacher": 29.84, "teacher+fake": 29.80, "student+teacher": 30.61, "all": 29.89}
NAMES_5 = {
    "nowhere": "nowhere",
    "teacher": "teacher",
    "teacher+fake": "teacher + fake score",
    "student+teacher": "NASA in student + teacher",
    "all": "all three",
}
COLUMNS = ("accuracy", "distance", "removed", "held", "both", "out_of_range", "sharpness", "flicker")
MEASURES = {"accuracy": 1, "distance": -1, "both": 1}
"""What claims are judged by, and whether more of it is better."""
OPENING, CLOSING = "<!-- judgement, written by a person and kept by the script -->", "<!-- end of the judgement -->"
NOT_JUDGED = "Not judged yet: the figures below stand alone."


@dataclass(frozen=True)
class Claim:
    """That one model and inference is better (+1) or worse (-1) than another in the paper, and its HPSv2 of both."""

    text: str
    first: tuple[str, str]
    second: tuple[str, str]
    direction: int
    paper: tuple[float, float]


def claims_5() -> list[Claim]:
    """Of table 5, whose models are asked without NASA."""
    rows = (("teacher", STUDENT, -1), ("teacher+fake", STUDENT, -1), (BEST, STUDENT, 1), ("all", BEST, -1))
    return [
        Claim(
            f"{NAMES_5[first]} is {'better' if sign > 0 else 'worse'} than {NAMES_5[second]}",
            (first, "none"), (second, "none"), sign, (PAPER_5[first], PAPER_5[second]),
        )
        for first, second, sign in rows
    ]  # fmt: skip


def claims_3(cfg: str) -> list[Claim]:
    """Of table 3 (PixArt-alpha), where "student" is the one trained without negatives."""
    return [
        Claim("NASA-I is better than the student", (STUDENT, "nasa"), (STUDENT, "none"), 1, (30.98, 30.34)),
        Claim("NASA-T is better than the student", (BEST, "none"), (STUDENT, "none"), 1, (30.61, 30.34)),
        Claim("NASA-T + NASA-I is better than NASA-I", (BEST, "nasa"), (STUDENT, "nasa"), 1, (31.09, 30.98)),
        Claim("NASA-T + NASA-I is better than NASA-T", (BEST, "nasa"), (BEST, "none"), 1, (31.09, 30.61)),
        Claim("NASA-T + CFG is worse than NASA-T", (BEST, cfg), (BEST, "none"), -1, (27.97, 30.61)),
    ]


def rows_3(cfg: str) -> list[tuple[str, str, str]]:
    """Name, arm and inference of table 3's rows."""
    return [
        ("shipped student", SHIPPED, "none"),
        ("shipped student + NASA-I", SHIPPED, "nasa"),
        ("student", STUDENT, "none"),
        ("student + NASA-I", STUDENT, "nasa"),
        ("student + CFG", STUDENT, cfg),
        ("NASA-T", BEST, "none"),
        ("NASA-T + NASA-I", BEST, "nasa"),
        ("NASA-T + CFG", BEST, cfg),
    ]


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of a mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    quantile = T_QUANTILES[len(values) - 2] if len(values) <= len(T_QUANTILES) + 1 else 1.96
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def with_interval(values: Sequence[float]) -> str:
    """Mean and its interval, for a table."""
    if not values:
        return "–"
    half = half_width(values)
    mean = statistics.fmean(values)
    return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


def differences(rows: Sequence[Row], claim: Claim, steps: int, measure: str) -> list[float]:
    """First minus second by training seed, over the seeds that both have."""
    first, second = (
        {row["seed"]: row[measure] for row in rows if (row["arm"], row["label"], row["steps"]) == (*key, steps)}
        for key in (claim.first, claim.second)
    )
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys(), key=str)]


def verdict(values: Sequence[float], direction: int) -> Verdict:
    """Whether differences, "more" being better, go the paper's way: "open" where the interval holds 0."""
    half = half_width(values)
    mean = statistics.fmean(values) * direction if values else 0.0
    if half is None or abs(mean) <= half:
        return "open"
    return "agrees" if mean > 0 else "disagrees"


def _pick(rows: Sequence[Row], arm: str, label: str, steps: int) -> list[Row]:
    return [row for row in rows if (row["arm"], row["label"], row["steps"]) == (arm, label, steps)]


def _cells(found: Sequence[Row]) -> str:
    return " | ".join(with_interval([row[column] for row in found]) for column in COLUMNS)


def table_5(rows: Sequence[Row], steps: int) -> str:
    """Where the negative goes while training, asked without and with NASA."""
    lines = ["| negative in | asked with | seeds | " + " | ".join(COLUMNS) + " | HPSv2 in the paper |"]
    lines.append("|---" * (4 + len(COLUMNS)) + "|")
    for label in ("none", "nasa"):
        for arm in PLACEMENTS:
            found = _pick(rows, arm, label, steps)
            paper = f"{PAPER_5[arm]:.2f}" if label == "none" else ""
            lines.append(f"| {NAMES_5[arm]} | {label} | {len(found)} | {_cells(found)} | {paper} |")
    return "\n".join(lines) + "\n"


def table_3(rows: Sequence[Row], steps: Sequence[int], cfg: str) -> str:
    """Student, NASA-I, NASA-T, both, and classifier-free guidance, by step count."""
    lines = ["| model and inference | steps | seeds | " + " | ".join(COLUMNS) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for name, arm, label in rows_3(cfg):
        for count in steps:
            found = _pick(rows, arm, label, count)
            lines.append(f"| {name} | {count} | {len(found)} | {_cells(found)} |")
    return "\n".join(lines) + "\n"


def table_of_claims(rows: Sequence[Row], claims: Sequence[Claim], steps: Sequence[int]) -> str:
    """Every claim of the paper, the paired differences here, and whether they go its way."""
    heads = " | ".join(f"{name}, difference | verdict" for name in MEASURES)
    lines = [f"| the paper says | HPSv2 there | steps | {heads} |", "|---" * (3 + 2 * len(MEASURES)) + "|"]
    for claim in claims:
        for count in steps:
            cells = []
            for measure, sign in MEASURES.items():
                values = differences(rows, claim, count, measure)
                cells += [with_interval(values), verdict(values, claim.direction * sign)]
            paper = f"{claim.paper[0]:.2f} against {claim.paper[1]:.2f}"
            lines.append(f"| {claim.text} | {paper} | {count} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def kept_judgement(path: Path) -> str:
    """What a person wrote between the markers of an earlier report."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if OPENING not in text or CLOSING not in text:
        return NOT_JUDGED
    return text.split(OPENING, 1)[1].split(CLOSING, 1)[0].strip()


def document(rows: Sequence[Row], facts: dict[str, Any], judgement: str) -> str:
    """The whole report.

    Args:
        facts: iterations, batch, n (of a removal cell), captions, attributes, weights, commit, command, steps, cfg,
            jobs (finished, all), minutes (of processor time, training and measuring), world (rendered clips' measures).
    """
    steps, cfg, most = facts["steps"], facts["cfg"], max(facts["steps"])
    finished, jobs = facts["jobs"]
    world = facts["world"]
    state = "" if finished == jobs else f"\n**Unfinished: {finished} of {jobs} models are measured.**\n"
    return f"""# NASA-T on the sprites model

{OPENING}
{judgement}
{CLOSING}
{state}
## What was done

    {facts["command"]}

Every arm trains the same student on from the same weights (student and teacher SHA-256 {facts["weights"]}, commit
{facts["commit"]}) for {facts["iterations"]} iterations of {facts["batch"]} rollouts, on the draws of its seed; the arms
of a seed differ in where the negative goes and in nothing else. {facts["minutes"][0]:.0f} minutes of processor time for
training and {facts["minutes"][1]:.0f} for measuring. ± is the 95 % interval of Student's t over training seeds; all
models answer the same prompts and seeds, so that what is common to them is not in it. A figure without ± is of one
model.

- *accuracy*: share of what {facts["captions"]} held-out captions state that the detector finds; *distance*: kernel
  distance of their videos to rendered clips in the detector's features, lower is better (the place of HPSv2 here).
  Where NASA or CFG acts, it has a negative that names nothing of the caption.
- *removed*, *held*, *both*: the removal table's shares, {facts["n"]} videos a cell, mean over the kinds of case and
  {facts["attributes"]}. Without guidance *removed* is what goes unasked.
- *out_of_range*, *sharpness*, *flicker*: of the held-out captions' videos. Rendered clips have sharpness
  {world["sharpness"]:.3f} and flicker {world["flicker"]:.3f}.

## Where the negative goes while training (table 5), {most} steps

{table_5(rows, most)}
### Against the paper

Differences are paired by seed. "agrees" and "disagrees": the interval does not hold 0; else "open".

{table_of_claims(rows, claims_5(), [most])}
## Student, NASA-I, NASA-T, both, CFG (table 3)

The paper's student is the one trained without negatives ("nowhere" above); the shipped one is where all arms begin.
NASA at the preset's scale, CFG at {cfg.partition(":")[2]} (the paper: 1.5).

{table_3(rows, steps, cfg)}
### Against the paper

{table_of_claims(rows, claims_3(cfg), steps)}
![Table 5 and table 3](images/nasa_t.png)
"""


def plot(rows: Sequence[Row], steps: Sequence[int], cfg: str, path: Path) -> None:
    """Both tables as pictures: accuracy against removal of every arm, and every row of table 3 over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    for arm in PLACEMENTS:
        for label, marker in (("none", "o"), ("nasa", "s")):
            found = _pick(rows, arm, label, max(steps))
            if found:
                name = NAMES_5[arm] if label == "none" else None
                _point(panels[0], found, marker, f"C{PLACEMENTS.index(arm)}", name)
    panels[0].set(
        xlabel="accuracy", ylabel="removed and held", title=f"negative in … ({max(steps)} steps; □ with NASA)"
    )
    for panel, measure in zip(panels[1:], ("both", "accuracy"), strict=True):
        for name, arm, label in rows_3(cfg):
            _line(panel, steps, lambda n, a=arm, b=label: [r[measure] for r in _pick(rows, a, b, n)], name)  # noqa: B023
        panel.set(xlabel="steps", ylabel="removed and held" if measure == "both" else measure, title="table 3")
        panel.set_xticks(sorted(steps))
    for panel in panels:
        panel.grid(alpha=0.3)
        if panel is not panels[1] and panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _point(panel: Any, found: Sequence[Row], marker: str, colour: str, name: str | None) -> None:
    accuracy, both = ([row[measure] for row in found] for measure in ("accuracy", "both"))
    panel.errorbar(
        statistics.fmean(accuracy), statistics.fmean(both), xerr=half_width(accuracy) or 0, yerr=half_width(both) or 0,
        fmt=marker, color=colour, label=name, capsize=2, elinewidth=0.8,
    )  # fmt: skip


def _line(panel: Any, steps: Sequence[int], values_of: Callable[[int], list[float]], name: str) -> None:
    points = [(count, values_of(count)) for count in sorted(steps)]
    points = [(count, values) for count, values in points if values]
    if points:
        panel.errorbar(
            [count for count, _ in points], [statistics.fmean(values) for _, values in points],
            yerr=[half_width(values) or 0 for _, values in points], fmt="o-", ms=3, label=name, capsize=2, lw=1,
        )  # fmt: skip
