"""What research/measure_joint_attention.py compares, how a scale is chosen, and its tables for the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nasa_video.backbones.joint import JoinedKeys, JointFormula, NegativeMass, PositiveMass, WholeOutput
from nasa_video.evaluation.statistics import bootstrap_mean
from nasa_video.guidance.methods import Guidance, Nag, Nasa, Vsf

MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")
Cells = Mapping[str, Any]
"""Per cell, named "seed steps half kind method scale", what became of each sample."""


@dataclass(frozen=True)
class Method:
    """One way to guide joint attention, and the scales that are tried."""

    name: str
    title: str
    joint: JointFormula
    scales: tuple[float, ...]

    def guidance(self, scale: float) -> Guidance:
        """Its settings at a scale; NAG's tau is its paper's, its scale is tried at its own alpha of 0.25."""
        if self.name == "NAG":
            return Nag(scale)
        return Vsf(scale, negative_padding=True) if self.name == "VSF" else Nasa(scale)


METHODS = (
    Method("F1", "NASA, F1, whole output", WholeOutput(), (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)),
    Method("F2", "NASA, F2, negative's own mass", NegativeMass(), (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.5)),
    Method("F3", "NASA, F3, positive's mass", PositiveMass(), (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.5)),
    Method("NAG", "NAG, whole output as published", WholeOutput(), (2.0, 3.0, 5.0, 8.0, 12.0)),
    Method("VSF", "VSF, joined keys as published", JoinedKeys(), (0.5, 1.0, 2.0, 3.0, 5.0, 8.0)),
)


def clean(cell: Any, kind: str) -> list[float]:
    """Per sample: for a removal, gone and all else held in a whole picture; otherwise nothing changed at all."""
    wanted = 1 if kind in ("open", "conflict") else 0
    rows = zip(cell["gone"], cell["held"], cell["whole"], strict=True)
    return [float(gone == wanted and held and whole) for gone, held, whole in rows]


def choose(cells: Cells, seeds: Sequence[int], steps: int, method: Method) -> float:
    """The scale with most clean removals on the choosing half, the mean of both kinds over all seeds."""

    def score(scale: float) -> float:
        shares = []
        for seed in seeds:
            for kind in ("open", "conflict"):
                samples = clean(cells[f"{seed} {steps} choose {kind} {method.name} {scale:g}"], kind)
                shares.append(sum(samples) / max(1, len(samples)))
        return sum(shares) / len(shares)

    return max(method.scales, key=score)


def share(samples: Sequence[float], clusters: Sequence[str]) -> str:
    """A mean with its interval, in per cent."""
    if not samples:
        return "none"
    low, high = bootstrap_mean(samples, clusters) or (0.0, 1.0)
    return f"{100 * sum(samples) / len(samples):.0f} ({100 * low:.0f} to {100 * high:.0f})"


def report_rows(cells: Cells, seeds: Sequence[int], steps: int) -> list[str]:
    """Markdown rows of one step count."""
    lines = []
    for method in METHODS:
        scale = choose(cells, seeds, steps, method)
        edge = ", the end of its grid" if scale in (method.scales[0], method.scales[-1]) else ""
        cell = [f"{steps}", method.title, f"{scale:g}{edge}"]
        for kind in ("open", "conflict", "other", "empty"):
            samples, clusters = collect(cells, seeds, steps, method, scale, kind)
            cell.append(share(samples, clusters))
        lines.append(f"| {' | '.join(cell)} |")
    return lines


def collect(
    cells: Cells, seeds: Sequence[int], steps: int, method: Method, scale: float, kind: str
) -> tuple[list[float], list[str]]:
    """Clean samples of the reporting half over all seeds, and the question of each."""
    samples: list[float] = []
    clusters: list[str] = []
    for seed in seeds:
        own = cells[f"{seed} {steps} report {kind} {method.name} {scale:g}"]
        samples += clean(own, kind)
        clusters += [f"{seed} {question}" for question in own["question"]]
    return samples, clusters


def difference_rows(cells: Cells, seeds: Sequence[int], steps: int) -> list[str]:
    """F3 less each other method on the same samples, both kinds of removal together."""
    lines = []
    for other in METHODS:
        if other.name == "F3":
            continue
        means, clusters = [], []
        for kind in ("open", "conflict"):
            pair = [
                collect(cells, seeds, steps, method, choose(cells, seeds, steps, method), kind)
                for method in (METHODS[2], other)
            ]
            means += [a - b for a, b in zip(pair[0][0], pair[1][0], strict=True)]
            clusters += pair[0][1]
        low, high = bootstrap_mean(means, clusters) or (-1.0, 1.0)
        mean = 100 * sum(means) / len(means)
        lines.append(f"| {steps} | F3 less {other.name} | {mean:+.0f} ({100 * low:+.0f} to {100 * high:+.0f}) |")
    return lines


def sweep_rows(cells: Cells, seeds: Sequence[int], steps: int) -> list[str]:
    """The choosing half at every scale: clean removals, open and conflict."""
    lines = []
    for method in METHODS:
        parts = []
        for scale in method.scales:
            means = []
            for kind in ("open", "conflict"):
                every = [
                    value
                    for seed in seeds
                    for value in clean(cells[f"{seed} {steps} choose {kind} {method.name} {scale:g}"], kind)
                ]
                means.append(f"{100 * sum(every) / len(every):.0f}")
            parts.append(f"{scale:g}: {'/'.join(means)}")
        lines.append(f"| {steps} | {method.name} | {', '.join(parts)} |")
    return lines


def section(cells: Cells, seeds: Sequence[int], step_counts: Sequence[int], train_steps: int) -> str:
    """The measured part of docs/method/joint_attention.md."""
    right = "; ".join(
        f"{steps} steps: " + ", ".join(f"{cells[f'{seed} {steps} model']['right']:.0%}" for seed in seeds)
        for steps in step_counts
    )
    lines = [
        f"Students: {len(seeds)}, of {train_steps} training steps. Prompts that they show unguided, {right}.",
        "",
        "| steps | method | scale | open | conflict | another value | nothing |",
        "|---|---|---|---|---|---|---|",
        *(line for steps in step_counts for line in report_rows(cells, seeds, steps)),
        "",
        "| steps | clean removals on the same samples | points |",
        "|---|---|---|",
        *(line for steps in step_counts for line in difference_rows(cells, seeds, steps)),
        "",
        "| steps | method | clean removals by scale on the choosing half, %: open/conflict |",
        "|---|---|---|",
        *(line for steps in step_counts for line in sweep_rows(cells, seeds, steps)),
    ]
    return "\n".join(lines)


def write_page(page: Path, text: str) -> None:
    """Put the section between its marks."""
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
