"""Plots by matplotlib as SVG inside a page, which gives them their colours (light or dark)."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from nasa_video.evaluation.results import Arm, Difference, Metric, Results, Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn in these, and exchanged for the page's variables in the SVG.
_INK, _SOFT, _LINE = "#000001", "#000002", "#000003"
_COLOURS = tuple(f"#00001{index}" for index in range(6))
_VARIABLES = {_INK: "ink", _SOFT: "soft", _LINE: "line", **{c: f"k{i}" for i, c in enumerate(_COLOURS)}}
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "nasa-video", "font.family": "sans-serif", "font.size": 8.5,
    "text.color": _INK, "axes.edgecolor": _SOFT, "axes.labelcolor": _SOFT, "xtick.color": _SOFT, "ytick.color": _SOFT,
    "axes.grid": True, "grid.color": _LINE, "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "lines.markersize": 5, "axes.titlesize": 9.5, "axes.titleweight": "semibold",
}  # fmt: skip
# What quality costs: pairs of (across, up) where both were measured.
TRADES = (
    ("removed", "held"), ("removed", "sharpness"), ("removed", "flicker"), ("removed", "out_of_range"),
    ("clip_minus", "clip_plus"), ("hpsv2", "luma"), ("aesthetic_quality", "luma"), ("imaging_quality", "luma"),
)  # fmt: skip


def overview(results: Results, metrics: Sequence[Metric]) -> list[str]:
    """SVGs: sweeps over the scale where there are several scales, else the arms below each other; then trade-offs."""
    groups = results.groups if 1 < len(results.groups) <= 4 else [""]
    drawn = [sweep(results, one, group) or forest(results, one, group) for one in metrics for group in groups]
    named = {metric.name: metric for metric in results.metrics}
    drawn += [trade(results, named[a], named[b]) for a, b in TRADES if a in named and b in named]
    return [svg(figure) for figure in drawn if figure is not None]


def sweep(results: Results, metric: Metric, group: str = "") -> Figure | None:
    """A metric over the scale, one curve a family; None where no family has two scales."""
    scores = _of_metric(results, metric, group)
    families = _families([a for a in results.arms if a.label in scores and a.scale is not None and a.method != "none"])
    if not any(len({arm.scale for arm in family}) > 1 for family in families.values()):
        return None
    with _axes(_title(metric.heading, group)) as (figure, axes):
        for arm in results.arms:
            if arm.method == "none" and arm.label in scores:
                axes.axhline(
                    _shown(metric)(scores[arm.label].value), color=_COLOURS[0], linestyle="--", label=arm.label
                )
        for family, arms in families.items():
            arms.sort(key=lambda arm: arm.scale or 0.0)
            _points(axes, "y", [arm.scale for arm in arms], [scores[a.label] for a in arms], metric,
                    color=_colour(results, family), label=family, linestyle="-", marker="o")  # fmt: skip
        axes.set_xlabel("scale")
        axes.legend(frameon=False, fontsize=7.5)
    return figure


def forest(results: Results, metric: Metric, group: str = "") -> Figure | None:
    """A metric of every arm with its interval, one below the other."""
    scores = _of_metric(results, metric, group)
    arms = [arm for arm in results.arms if arm.label in scores]
    if not arms:
        return None
    with _axes(_title(metric.heading, group), 1.0 + 0.24 * len(arms)) as (figure, axes):
        for row, arm in enumerate(arms):
            _points(axes, "x", [row], [scores[arm.label]], metric, color=_colour(results, arm.family), marker="o")
        axes.set_yticks(range(len(arms)), [arm.label for arm in arms])
        axes.invert_yaxis()
    return figure


def trade(results: Results, across: Metric, up: Metric, group: str = "") -> Figure | None:
    """One metric against another, one curve a family; each point is an arm."""
    xs, ys = _of_metric(results, across, group), _of_metric(results, up, group)
    arms = [arm for arm in results.arms if arm.label in xs and arm.label in ys]
    if len(arms) < 2:
        return None
    with _axes(_title(f"{up.title} against {across.title}", group)) as (figure, axes):
        for family, members in _families(arms).items():
            members.sort(key=lambda arm: arm.scale or 0.0)
            x = [_shown(across)(xs[arm.label].value) for arm in members]
            y = [_shown(up)(ys[arm.label].value) for arm in members]
            axes.plot(x, y, marker="o", color=_colour(results, family))
            for arm, place in zip(members, zip(x, y, strict=True), strict=True):
                axes.annotate(arm.label, place, xytext=(5, 4), textcoords="offset points", fontsize=7.5)
        axes.set_xlabel(across.heading)
        axes.set_ylabel(up.heading)
        axes.margins(0.12)
    return figure


def changes(results: Results, difference: Difference) -> str:
    """SVG of every pair's difference, sorted: what was lowered on the left, what was raised on the right."""
    metric = results.metric(difference.metric)
    values = [_shown(metric)(value) for value in sorted(change for _, change in difference.pairs)]
    family = next(arm.family for arm in results.arms if arm.label == difference.arm)
    colour = _colour(results, family)
    with _axes(f"{metric.title}: {difference.arm} − {difference.against}") as (figure, axes):
        axes.stairs(values, fill=True, color=colour, alpha=0.45)
        axes.axhline(_shown(metric)(difference.value), color=colour, linestyle="--")
        axes.set_xlabel(f"{difference.n} pairs, sorted (line: mean)")
    return svg(figure)


@contextmanager
def _axes(title: str, height: float = 2.9) -> Iterator[tuple[Figure, Axes]]:
    """A figure with one plot; what is drawn is not clipped, since a page has no room for the names of clips."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(4.2, height), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title)
        yield figure, axes
        for artist in axes.findobj():
            artist.set_clip_on(False)


def svg(figure: Figure) -> str:
    """A figure as an SVG element without anything that refers to outside."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>|<clipPath.*?</clipPath>", "", buffer.getvalue(), flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| clip-path="[^"]*"| id="(?!m)[^"]*"', "", text[text.index("<svg") :])
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    title = escape(figure.axes[0].get_title(), quote=True)
    return re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{title}">', text)


def _points(
    axes: Axes, direction: Literal["x", "y"], places: Sequence[Any], scores: Sequence[Score], metric: Metric,
    *, linestyle: str = "none", **look: Any,
) -> None:  # fmt: skip
    """Values with their intervals along x or y."""
    show = _shown(metric)
    values = [show(score.value) for score in scores]
    ends = [tuple(map(show, score.interval or (score.value, score.value))) for score in scores]
    errors = [[max(0.0, v - e[0]) for v, e in zip(values, ends, strict=True)],
              [max(0.0, e[1] - v) for v, e in zip(values, ends, strict=True)]]  # fmt: skip
    if direction == "x":
        axes.errorbar(values, places, xerr=errors, linestyle=linestyle, **look)
    else:
        axes.errorbar(places, values, yerr=errors, linestyle=linestyle, **look)


def _of_metric(results: Results, metric: Metric, group: str) -> dict[str, Score]:
    return {one.arm: one for one in results.scores([group]) if one.metric == metric.name}


def _families(arms: Sequence[Arm]) -> dict[str, list[Arm]]:
    return {arm.family: [one for one in arms if one.family == arm.family] for arm in arms}


def _shown(metric: Metric) -> Callable[[float], float]:
    return lambda value: 100 * value if metric.kind == "share" else value


def _colour(results: Results, family: str) -> str:
    families = list(dict.fromkeys(arm.family for arm in results.arms))
    return _COLOURS[families.index(family) % len(_COLOURS)]


def _title(text: str, group: str) -> str:
    return f"{text} · {group}" if group else text
