"""The report of an evaluation as one HTML file that needs nothing else: no network, no scripts, light and dark."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from nasa_video.evaluation import plots
from nasa_video.evaluation.results import Arm, Difference, Metric, Results, Score
from nasa_video.evaluation.sheets import Pick, picks, sheet_metric, thumbnail
from nasa_video.evaluation.statistics import Interval
from nasa_video.evaluation.tables import INTERVALS, all_settings, markdown
from nasa_video.files.atomic import write_text

PROMPTS_SHOWN = 400
"""Rows of the table by prompt; the rest is in results.json."""
_MAIN_METRICS = 3
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# What quality costs: pairs of (across, up) where both were measured.
_TRADES = (
    ("removed", "held"), ("removed", "sharpness"), ("removed", "flicker"), ("removed", "out_of_range"),
    ("clip_minus", "clip_plus"), ("hpsv2", "luma"), ("aesthetic_quality", "luma"), ("imaging_quality", "luma"),
)  # fmt: skip


def write_report(results: Results, folder: Path, media: Path | None = None, stem: str = "report") -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` into a folder.

    Args:
        media: where the pictures that the results name lie; None: in the same folder.

    Returns:
        The two files.
    """
    page, text = folder / f"{stem}.html", folder / f"{stem}.md"
    write_text(page, html(results, media or folder))
    write_text(text, markdown(results))
    return page, text


def html(results: Results, folder: Path) -> str:
    """The page; pictures are read from ``folder``."""
    style = (files("nasa_video.evaluation") / "page.css").read_text(encoding="utf-8")
    sections = "\n".join(
        part for part in (_scores(results), _plots(results), _differences(results), _sheets(results, folder)) if part
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(results.title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
{_header(results)}
{sections}
{_settings(results)}
<footer>Made by nasa-video {escape(str(results.settings.get("version", "")))}. Every sample with its values is in
results.json, from which this page can be made again: <code>nasa-video eval report FOLDER</code>.</footer>
</main>
</body>
</html>
"""


def _header(results: Results) -> str:
    facts = [f"{len(results.arms)} arms", f"{len(results.items)} samples"]
    if "model" in results.settings:
        facts.insert(0, f"model {results.settings['model']}")
    checkpoint = results.settings.get("checkpoint_sha256")
    if isinstance(checkpoint, str):
        facts.append(f"checkpoint {checkpoint[:16]}…")
    notes = "".join(f"<li>{escape(note)}</li>" for note in results.notes)
    return (
        f'<h1>{escape(results.title)}</h1>\n<p class="facts">{escape(" · ".join(facts))}</p>\n'
        f'<ul class="notes">{notes}<li>{escape(INTERVALS)}</li></ul>'
    )


def _scores(results: Results) -> str:
    groups = results.groups
    parts = ["<h2>Scores</h2>", _score_table(results, "")]
    if len(groups) > 1:
        inner = "".join(f"<h3>{escape(group)}</h3>{_score_table(results, group)}" for group in groups)
        parts.append(f"<details{' open' if len(groups) <= 4 else ''}><summary>By group</summary>{inner}</details>")
    return "\n".join(parts)


def _score_table(results: Results, group: str) -> str:
    scores = {(one.arm, one.metric): one for one in results.scores([group])}
    metrics = [metric for metric in results.metrics if any(key[1] == metric.name for key in scores)]
    head = "".join(f"<th>{escape(metric.heading)}</th>" for metric in metrics)
    rows = "".join(_score_row(arm, metrics, scores) for arm in results.arms)
    return f'<div class="wide"><table><tr><th></th><th>n</th>{head}</tr>{rows}</table></div>'


def _score_row(arm: Arm, metrics: Sequence[Metric], scores: dict[tuple[str, str], Score]) -> str:
    own = [scores.get((arm.label, metric.name)) for metric in metrics]
    count = max((score.n for score in own if score is not None), default=0)
    cells = "".join(
        "<td>–</td>"
        if score is None
        else f"<td>{metric.show(score.value)}<small>{_between(metric, score.interval)}</small></td>"
        for metric, score in zip(metrics, own, strict=True)
    )
    return f"<tr><td><b>{escape(arm.label)}</b></td><td>{count}</td>{cells}</tr>"


def _between(metric: Metric, interval: Interval | None, sign: bool = False) -> str:
    return "" if interval is None else f"{metric.show(interval[0], sign)} to {metric.show(interval[1], sign)}"


def _plots(results: Results) -> str:
    drawn = [plot for plot in (*_score_plots(results), *_trade_plots(results)) if plot]
    return f'<h2>Plots</h2>\n<div class="plots">{"".join(drawn)}</div>' if drawn else ""


def _score_plots(results: Results) -> Iterator[str | None]:
    """Sweeps over the scale where there are several scales, else the arms below each other; a plot a group."""
    groups = results.groups if 1 < len(results.groups) <= 4 else [""]
    for metric in results.metrics[:_MAIN_METRICS]:
        for group in groups:
            yield plots.sweep(results, metric, group) or plots.forest(results, metric, group)


def _trade_plots(results: Results) -> Iterator[str | None]:
    metrics = {metric.name: metric for metric in results.metrics}
    for across, up in _TRADES:
        if across in metrics and up in metrics:
            yield plots.trade(results, metrics[across], metrics[up])


def _differences(results: Results) -> str:
    found = list(results.differences())
    if not found:
        return ""
    rows = "".join(_difference_row(results, one) for one in found)
    head = "<th></th><th>against</th><th>metric</th><th>pairs</th><th>difference</th><th>raised</th><th>lowered</th>"
    main = {metric.name for metric in results.metrics[:_MAIN_METRICS]}
    drawn = "".join(plots.changes(results, one) for one in found if one.metric in main)
    return (
        f"<h2>Differences, pair by pair</h2>\n<p>The same prompt and seed under both; bold where the interval leaves "
        f'out zero.</p>\n<div class="wide"><table><tr>{head}</tr>{rows}</table></div>\n'
        f'<h3>Every pair</h3><div class="plots">{drawn}</div>\n{_by_prompt(results, found)}'
    )


def _difference_row(results: Results, one: Difference) -> str:
    metric = results.metric(one.metric)
    sure = one.interval is not None and (one.interval[0] > 0 or one.interval[1] < 0)
    verdict = ""
    if sure and metric.better != "neither":
        verdict = " better" if (one.value > 0) == (metric.better == "higher") else " worse"
    return (
        f"<tr><td>{escape(one.arm)}</td><td>{escape(one.against)}</td><td>{escape(metric.heading)}</td><td>{one.n}</td>"
        f'<td class="{"sure" if sure else ""}{verdict}">{metric.show(one.value, True)}'
        f"<small>{_between(metric, one.interval, True)}</small></td><td>{one.raised}</td><td>{one.lowered}</td></tr>"
    )


def _by_prompt(results: Results, found: Sequence[Difference]) -> str:
    """One row a sample: its differences in the main metric under every arm."""
    metric = sheet_metric(results)
    columns = [one for one in found if one.metric == metric.name]
    if not columns:
        return ""
    by_item: dict[str, dict[str, float]] = {}
    texts: dict[str, tuple[str, str]] = {}
    for column in columns:
        for item, change in column.pairs:
            by_item.setdefault(item.id, {})[column.arm] = change
            texts.setdefault(item.id, (item.prompt, item.negative))
    ranked = sorted(by_item, key=lambda name: -sum(abs(change) for change in by_item[name].values()))
    head = "".join(f"<th>{escape(one.arm)}</th>" for one in columns)
    rows = "".join(
        f'<tr><td class="text">{_prompt(*texts[name])}</td><td>{escape(name)}</td>'
        + "".join(_change_cell(metric, by_item[name].get(one.arm)) for one in columns)
        + "</tr>"
        for name in ranked[:PROMPTS_SHOWN]
    )
    left = f" (the {PROMPTS_SHOWN} largest of {len(ranked)})" if len(ranked) > PROMPTS_SHOWN else ""
    return (
        f"<details><summary>{escape(metric.title)} by prompt, largest differences first{left}</summary>"
        f'<div class="wide"><table><tr><th>prompt</th><th>sample</th>{head}</tr>{rows}</table></div></details>'
    )


def _change_cell(metric: Metric, change: float | None) -> str:
    return "<td>–</td>" if change is None else f"<td>{metric.show(change, sign=True)}</td>"


def _prompt(prompt: str, negative: str) -> str:
    without = f' <span class="neg">without: {escape(negative)}</span>' if negative else ""
    return f"{escape(prompt)}{without}"


def _sheets(results: Results, folder: Path) -> str:
    metric = sheet_metric(results)
    parts = []
    for arm in results.arms:
        best, worst = picks(results, arm, metric)
        against = results.baseline_of(arm)
        for name, chosen in (("best", best), ("worst", worst)):
            figures = "".join(_figure(pick, arm.label, against, metric, folder) for pick in chosen)
            if figures:
                by = "" if against == arm.label else f", by the difference to {escape(against)}"
                parts.append(f'<h3>{escape(arm.label)}: {name}{by}</h3><div class="sheet">{figures}</div>')
    return f"<h2>Best and worst, by {escape(metric.title)}</h2>\n{''.join(parts)}" if parts else ""


def _figure(pick: Pick, arm: str, against: str, metric: Metric, folder: Path) -> str:
    own = thumbnail(pick.item, folder)
    if own is None:
        return ""
    other = thumbnail(pick.other, folder) if pick.other is not None else None
    pictures = _picture(own, arm if other else "", pick.item.prompt)
    if other:
        pictures = _picture(other, against, pick.item.prompt) + pictures
    value = f"<b>{escape(metric.title)} {metric.show(pick.value)}</b>"
    if pick.change is not None:
        value += f" ({metric.show(pick.change, sign=True)})"
    told = f"seed {pick.item.seed}: {_prompt(pick.item.prompt, pick.item.negative)}"
    return f"<figure>{pictures}<figcaption>{value}<br>{told}</figcaption></figure>"


def _picture(url: str, label: str, prompt: str) -> str:
    of = f'<p class="of">{escape(label)}</p>' if label else ""
    return f'{of}<img src="{url}" alt="{escape(prompt, quote=True)}">'


def _settings(results: Results) -> str:
    inner = "".join(
        f'<tr><td>{escape(name)}</td><td class="text">{escape(value)}</td></tr>'
        for name, value in all_settings(results)
    )
    return f'<h2>Settings</h2>\n<div class="wide"><table>{inner}</table></div>'
