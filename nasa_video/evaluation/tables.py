"""Results as Markdown: scores with intervals, differences to the unguided arm, settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from nasa_video.evaluation.results import Difference, Metric, Results, Score

INTERVALS = (
    "Intervals are 95 %: Wilson for shares (differences: Newcombe's paired form), bootstrap over prompts for means."
)


def markdown(results: Results) -> str:
    """The whole report as text."""
    parts = [f"# {results.title}", ""]
    parts += [f"- {note}" for note in results.notes]
    parts += [f"- {INTERVALS}", ""]
    parts += ["## Scores", "", *score_table(results), ""]
    parts += _groups(results)
    changes = list(results.differences())
    if changes:
        parts += ["## Differences, pair by pair", "", *difference_table(results, changes), ""]
    parts += ["## Settings", "", *settings_table(results), ""]
    return "\n".join(parts)


def score_table(results: Results, group: str = "") -> Iterator[str]:
    """A row an arm, a column a metric, over one group or everything."""
    scores = {(one.arm, one.metric): one for one in results.scores([group])}
    metrics = [metric for metric in results.metrics if any(key[1] == metric.name for key in scores)]
    yield _row(["", "n", *(metric.heading for metric in metrics)])
    yield "|---" * (len(metrics) + 2) + "|"
    for arm in results.arms:
        count = max((one.n for (label, _), one in scores.items() if label == arm.label), default=0)
        cells = [_score(metric, scores.get((arm.label, metric.name))) for metric in metrics]
        yield _row([f"**{arm.label}**", str(count), *cells])


def difference_table(results: Results, changes: Sequence[Difference]) -> Iterator[str]:
    """A row an arm and metric: the mean of the paired differences, and how many pairs went which way."""
    yield _row(["", "against", "metric", "pairs", "difference", "raised", "lowered"])
    yield "|---" * 7 + "|"
    for one in changes:
        metric = results.metric(one.metric)
        change = metric.show(one.value, sign=True) + interval_text(metric, one.interval, sign=True)
        yield _row([one.arm, one.against, metric.heading, str(one.n), change, str(one.raised), str(one.lowered)])


def settings_table(results: Results) -> Iterator[str]:
    """Every setting, then every arm with its own."""
    yield _row(["setting", "value"])
    yield "|---|---|"
    for pair in all_settings(results):
        yield _row(pair)


def all_settings(results: Results) -> Iterator[tuple[str, str]]:
    """Name and value of every setting, then of every arm."""
    for name, value in results.settings.items():
        yield name, plain(value)
    for arm in results.arms:
        yield f"arm {arm.label}", plain({"method": arm.method, "steps": arm.steps, **arm.settings})


def interval_text(metric: Metric, interval: tuple[float, float] | None, sign: bool = False) -> str:
    """`` (low to high)``; nothing where there is no interval."""
    if interval is None:
        return ""
    return f" ({metric.show(interval[0], sign)} to {metric.show(interval[1], sign)})"


def plain(value: object) -> str:
    """A setting for people: texts as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _groups(results: Results) -> list[str]:
    groups = results.groups
    if len(groups) < 2:
        return []
    return [line for group in groups for line in (f"### {group}", "", *score_table(results, group), "")]


def _score(metric: Metric, score: Score | None) -> str:
    return "–" if score is None else metric.show(score.value) + interval_text(metric, score.interval)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"
