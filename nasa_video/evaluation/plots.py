"""Plots as SVG that takes its colours from the page around it (light or dark), without scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from nasa_video.evaluation.results import Difference, Metric, Results, Score

_WIDTH, _HEIGHT = 400, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 30, 44
NUM_COLOURS = 6
"""Classes c0 … c5 that the page gives colours to."""


@dataclass(frozen=True)
class Axis:
    """Numbers from ``low`` to ``high`` on pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, share: bool = False) -> Axis:
        """An axis that holds the values with a little room; a share's is cut at 0 and 1."""
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.05
        low, high = low - room, high + room
        if share:
            low, high = max(low, -0.02), min(high, 1.02)
        return cls(low, high, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """About five round numbers."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
        first = math.ceil(self.low / step)
        return [round(index * step, 10) for index in range(first, math.floor(self.high / step) + 1)]


def sweep(results: Results, metric: Metric, group: str = "") -> str | None:
    """A metric over the scale, one curve a family; None where no family has two scales."""
    scores = _of_metric(results, metric, group)
    arms = [arm for arm in results.arms if arm.label in scores and arm.scale is not None and arm.method != "none"]
    families = {arm.family: [one for one in arms if one.family == arm.family] for arm in arms}
    if not any(len({arm.scale for arm in family}) > 1 for family in families.values()):
        return None
    flat = [scores[arm.label] for arm in results.arms if arm.label in scores and arm.method == "none"]
    y = Axis.around(_reach([*(scores[arm.label] for arm in arms), *flat]), _HEIGHT - _BOTTOM, _TOP, _is_share(metric))
    x = Axis.around([0.0, *(arm.scale or 0.0 for arm in arms)], _LEFT, _WIDTH - _RIGHT)
    parts = [_frame(x, y, "", metric)]
    for score in flat:
        parts.append(
            f'<line class="flat" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(score.value):.1f}" '
            f'y2="{y(score.value):.1f}"><title>{_told(metric, score)}</title></line>'
        )
    for index, (family, members) in enumerate(families.items()):
        points = sorted(((arm.scale or 0.0, scores[arm.label]) for arm in members), key=lambda point: point[0])
        # Families stand a little beside each other, so that none hides another at the same scale.
        places = [(x(scale) + 5 * (index - (len(families) - 1) / 2), score) for scale, score in points]
        parts.append(_curve([(left, y(score.value)) for left, score in places], _colour(results, family)))
        parts += [_whisker(left, y, metric, score, _colour(results, family)) for left, score in places]
    parts.append(_legend(results, list(families)))
    return _svg(_title(metric.heading, group), parts)


def forest(results: Results, metric: Metric, group: str = "") -> str | None:
    """A metric of every arm with its interval, one below the other."""
    scores = _of_metric(results, metric, group)
    if not scores:
        return None
    arms = [arm for arm in results.arms if arm.label in scores]
    left = min(170, 20 + 6.6 * max(len(arm.label) for arm in arms))
    height = _TOP + _BOTTOM + 22 * len(arms)
    x = Axis.around(_reach(list(scores.values())), left, _WIDTH - _RIGHT, _is_share(metric))
    parts = [_x_axis(x, metric, height)]
    for row, arm in enumerate(arms):
        y, score, colour = _TOP + 22 * row + 11, scores[arm.label], _colour(results, arm.family)
        low, high = score.interval or (score.value, score.value)
        parts.append(
            f'<g class="{colour}"><text class="name" x="{left - 8:.0f}" y="{y + 4}">{escape(arm.label)}</text>'
            f'<line class="whisker" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle cx="{x(score.value):.1f}" cy="{y}" r="4.5"><title>{_told(metric, score)}</title></circle></g>'
        )
    return _svg(_title(metric.heading, group), parts, height)


def trade(results: Results, across: Metric, up: Metric, group: str = "") -> str | None:
    """One metric against another, one curve a family; each point is an arm."""
    xs, ys = _of_metric(results, across, group), _of_metric(results, up, group)
    arms = [arm for arm in results.arms if arm.label in xs and arm.label in ys]
    if len(arms) < 2:
        return None
    x = Axis.around([xs[arm.label].value for arm in arms], _LEFT, _WIDTH - _RIGHT, _is_share(across))
    y = Axis.around([ys[arm.label].value for arm in arms], _HEIGHT - _BOTTOM, _TOP, _is_share(up))
    parts = [_frame(x, y, across.heading, up, across)]
    taken: list[tuple[float, float]] = []
    for family in dict.fromkeys(arm.family for arm in arms):
        members = sorted((arm for arm in arms if arm.family == family), key=lambda arm: arm.scale or 0)
        places = [(x(xs[arm.label].value), y(ys[arm.label].value)) for arm in members]
        parts.append(_curve(places, _colour(results, family)))
        for arm, (left, top) in zip(members, places, strict=True):
            line = top - 6
            while any(abs(line - other) < 10 and abs(left - beside) < 90 for beside, other in taken):
                line += 11
            taken.append((left, line))
            told = f"{_told(across, xs[arm.label])}; {_told(up, ys[arm.label])}"
            # A label that would run over the right edge stands on the other side of its point.
            anchor, shift = ("end", -7) if left > 0.72 * _WIDTH else ("start", 7)
            parts.append(
                f'<g class="{_colour(results, family)}"><circle cx="{left:.1f}" cy="{top:.1f}" r="4.5"><title>{told}'
                f'</title></circle><text class="point" text-anchor="{anchor}" x="{left + shift:.1f}" '
                f'y="{line:.1f}">{escape(arm.label)}</text></g>'
            )
    return _svg(_title(f"{up.title} against {across.title}", group), parts)


def changes(results: Results, difference: Difference) -> str:
    """Every pair's difference, sorted: what was lowered on the left, what was raised on the right."""
    metric = results.metric(difference.metric)
    values = sorted(change for _, change in difference.pairs)
    y = Axis.around([*values, 0.0], _HEIGHT - _BOTTOM, _TOP)
    x = Axis(0, len(values), _LEFT, _WIDTH - _RIGHT)
    # A step line of at most as many points as there are pixels.
    stride = max(1, len(values) // (_WIDTH - _LEFT - _RIGHT))
    path = [f"M{x(0):.1f},{y(0):.1f}"]
    for index in range(0, len(values), stride):
        end = min(index + stride, len(values))
        path.append(f"L{x(index):.1f},{y(values[index]):.1f}L{x(end):.1f},{y(values[index]):.1f}")
    path.append(f"L{x(len(values)):.1f},{y(0):.1f}Z")
    colour = _colour(results, next(arm.family for arm in results.arms if arm.label == difference.arm))
    mean = f'<line class="mean {colour}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(difference.value):.1f}" y2="{y(difference.value):.1f}"/>'  # noqa: E501
    parts = [
        _y_axis(y, metric, sign=True),
        f'<path class="area {colour}" d="{"".join(path)}"/>{mean}',
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>',
        f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}">{difference.n} pairs, sorted'
        f" (line: mean)</text>",
    ]
    return _svg(f"{metric.title}: {difference.arm} − {difference.against}", parts)


def _of_metric(results: Results, metric: Metric, group: str) -> dict[str, Score]:
    return {one.arm: one for one in results.scores([group]) if one.metric == metric.name}


def _is_share(metric: Metric) -> bool:
    return metric.kind == "share"


def _reach(scores: Sequence[Score]) -> list[float]:
    """Values and the ends of their intervals."""
    return [end for score in scores for end in (score.value, *(score.interval or ()))]


def _colour(results: Results, family: str) -> str:
    families = list(dict.fromkeys(arm.family for arm in results.arms))
    return f"c{families.index(family) % NUM_COLOURS}"


def _told(metric: Metric, score: Score) -> str:
    low_high = ""
    if score.interval:
        low_high = f" ({metric.show(score.interval[0])} to {metric.show(score.interval[1])})"
    return escape(f"{score.arm}: {metric.title} {metric.show(score.value)}{low_high}, n = {score.n}")


def _title(text: str, group: str) -> str:
    return f"{text} · {group}" if group else text


def _curve(points: Sequence[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="curve {colour}" points="{path}"/>' if len(points) > 1 else ""


def _legend(results: Results, families: Sequence[str]) -> str:
    """The families' names in their colours, below the title."""
    named = "".join(
        f'<tspan class="family {_colour(results, family)}" dx="{10 if index else 0}">{escape(family)}</tspan>'
        for index, family in enumerate(families)
    )
    return f'<text class="label" x="{_WIDTH / 2:g}" y="{_HEIGHT - 8}" dy="0">scale: {named}</text>'


def _whisker(x: float, y: Axis, metric: Metric, score: Score, colour: str) -> str:
    low, high = score.interval or (score.value, score.value)
    return (
        f'<g class="{colour}"><line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}"/>'
        f'<circle cx="{x:.1f}" cy="{y(score.value):.1f}" r="4"><title>{_told(metric, score)}</title></circle></g>'
    )


def _frame(x: Axis, y: Axis, label: str, up: Metric, across: Metric | None = None) -> str:
    return _x_axis(x, across, _HEIGHT, label) + _y_axis(y, up)


def _x_axis(x: Axis, metric: Metric | None, height: float, label: str = "") -> str:
    bottom = height - _BOTTOM
    marks = "".join(
        f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{_TOP}" y2="{bottom}"/>'
        f'<text class="tick" text-anchor="middle" x="{x(tick):.1f}" y="{bottom + 15}">{_tick(tick, metric)}</text>'
        for tick in x.ticks
    )
    return (
        f'{marks}<line class="axis" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{bottom}" y2="{bottom}"/>'
        f'<text class="label" x="{(x.start + x.end) / 2:.1f}" y="{height - 8}">{escape(label)}</text>'
    )


def _y_axis(y: Axis, metric: Metric, sign: bool = False) -> str:
    marks = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{y(tick) + 4:.1f}">{_tick(tick, metric, sign)}</text>'
        for tick in y.ticks
    )
    return f'{marks}<line class="axis" x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'


def _tick(value: float, metric: Metric | None, sign: bool = False) -> str:
    number = 100 * value if metric is not None and _is_share(metric) else value
    return f"{round(number, 6):{'+' if sign and value else ''}g}"


def _svg(title: str, parts: Sequence[str], height: float = _HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(title, quote=True)}">'
        f'<text class="title" x="{_WIDTH / 2:g}" y="17">{escape(title)}</text>{"".join(parts)}</svg>'
    )
