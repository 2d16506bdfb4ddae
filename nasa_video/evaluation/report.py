"""The removal table for people: Markdown, and curves of removed against held."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def summary(rows: Sequence[Row]) -> list[Row]:
    """Rows of one (method label, steps, first steps, case), averaged over the attributes; n is summed."""
    groups: dict[tuple[str, int, int | None, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["label"], row["steps"], row.get("first_steps"), row["case"]].append(row)
    columns = ("removed", "held", "both", "out_of_range", "sharpness", "flicker", "luma")
    return [
        {
            "label": label,
            "method": group[0]["method"],
            "scale": group[0]["scale"],
            "steps": steps,
            "first_steps": first_steps,
            "case": case,
            "n": sum(row["n"] for row in group),
            **{column: sum(row[column] for row in group) / len(group) for column in columns},
        }
        for (label, steps, first_steps, case), group in groups.items()
    ]


def steps_text(row: Row) -> str:
    """A row's steps, such as "1", or "1, first 4" where a scene opens with another number."""
    first = row.get("first_steps")
    return f"{row['steps']}" if first is None else f"{row['steps']}, first {first}"


def markdown(rows: Sequence[Row]) -> str:
    """Means over the attributes, then every cell with its intervals."""
    lines = [
        "| method | steps | case | n | removed | held | both | out of range | sharpness | flicker |",
        "|---" * 10 + "|",
    ]
    for row in summary(rows):
        lines.append(
            f"| {row['label']} | {steps_text(row)} | {row['case']} | {row['n']} | {_percent(row['removed'])} | "
            f"{_percent(row['held'])} | {_percent(row['both'])} | {row['out_of_range']:.2%} | {row['sharpness']:.2f} | "
            f"{row['flicker']:.2f} |"
        )
    lines += ["", "Each cell, with 95 % Wilson intervals:", ""]
    lines += ["| method | steps | case | attribute | n | removed | held | both |", "|---" * 8 + "|"]
    for row in rows:
        shares = " | ".join(_with_interval(row, name) for name in ("removed", "held", "both"))
        lines.append(
            f"| {row['label']} | {steps_text(row)} | {row['case']} | {row['attribute']} | {row['n']} | {shares} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Removed against held, one curve a method and variant over its scales, one panel a case and step count."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    means = summary(rows)
    cases = sorted({row["case"] for row in means})
    # most steps first, and of as many those that open with more
    found = {(row["steps"], row["first_steps"] or 0): steps_text(row) for row in means}
    steps = [text for _, text in sorted(found.items(), reverse=True)]
    families: dict[str, list[str]] = defaultdict(list)
    for row in means:
        if _family(row) not in families[row["method"]]:
            families[row["method"]].append(_family(row))
    tab10 = cycle(colormaps["tab10"].colors)  # type: ignore[attr-defined]
    # a colour for each method and a marker for each variant of it: colours alone run out
    looks = {
        family: {"color": colour, "marker": marker}
        for colour, variants in zip(tab10, families.values(), strict=False)
        for family, marker in zip(variants, cycle("os^Dv*Ph<X>p"), strict=False)
    }
    lines: dict[str, Any] = {}
    held = _range(row["held"] for row in means)
    removed = {case: _range(row["removed"] for row in means if row["case"] == case) for case in cases}
    figure = Figure(figsize=(5 * len(cases), 4.4 * len(steps)), layout="constrained")
    panels = figure.subplots(len(steps), len(cases), squeeze=False, sharex="col", sharey=True)
    for row_of_panels, count in zip(panels, steps, strict=True):
        for panel, case in zip(row_of_panels, cases, strict=True):
            here = [row for row in means if (steps_text(row), row["case"]) == (count, case)]
            for method in dict.fromkeys(_family(row) for row in here):
                points = sorted((r for r in here if _family(r) == method), key=lambda r: r["scale"] or 0)
                shares = [p["removed"] for p in points], [p["held"] for p in points]
                (lines[method],) = panel.plot(*shares, **looks[method], label=method, ms=4)
                for point in points:
                    if point["scale"] is not None:
                        panel.annotate(f"{point['scale']:g}", (point["removed"], point["held"]), fontsize=7)
            panel.set(title=f"{case}, steps: {count}", xlim=removed[case], ylim=held)
            panel.set(xlabel="unwanted feature removed", ylabel="what was asked for held")
            panel.grid(alpha=0.3)
    figure.legend(handles=[lines[family] for family in looks], loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=130)


def _range(shares: Iterable[float]) -> tuple[float, float]:
    """An axis from a round number to 1, because good methods differ by little."""
    lowest = max(0.0, math.floor(10 * min(shares) - 0.2) / 10)
    margin = 0.02 * (1 - lowest)
    return lowest - margin, 1 + margin


def _family(row: Row) -> str:
    return str(row["label"]).partition(":")[0]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _with_interval(row: Row, name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{_percent(row[name])} ({_percent(low)} to {_percent(high)})"
