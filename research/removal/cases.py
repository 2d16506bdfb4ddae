# ruff: noqa: D101, D103
"""Prompts, cases and the measure: gone, held, brought, right, left alone.

A case is a prompt, a seed and a term naming something that the UNGUIDED video of that seed shows.

    gone     the thing is no longer shown
    held     every other attribute is as in the unguided video (flaws, weather and a second object that were there are
             still there; colour and shape of what is left are among those that were there)
    brought  a flaw, weather or second object that was not there
    right    gone, held, and nothing brought

OBJECTIVE (written down before any run): the share of `right`, averaged over the attributes (each attribute's share has
the same weight), first chunks of short prompts at 4 steps; a setting is admitted only where at least 95 % of the videos
that do not show the negative are left alone (all attributes equal).
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nasa_video.sprites.captions import caption_stating, full_caption, term
from nasa_video.sprites.world import ATTRIBUTES, FLAWS, sample_scenes

SPLITS = {"choosing": (11, 1_000_000), "reporting": (12, 2_000_000), "calibrating": (13, 3_000_000)}
THINGS = (*FLAWS, "weather", "texture", "count", "background", "colour", "size")
MORE = ("shape", "motion")
_BASIC = ("colour", "size", "motion", "background")
Row = Mapping[str, str]


def prompts_of(kind: str, n: int, split: str) -> tuple[list[str], list[int], list[frozenset[str]]]:
    """n prompts of a kind (short, middling, full), their seeds, and the attributes that each states."""
    number, first = SPLITS[split]
    offset = {"short": 0, "middling": 1, "full": 2}[kind]
    rng = random.Random(number * 10 + offset)
    scenes = sample_scenes(n, torch.Generator().manual_seed(number * 10 + offset))
    texts, stated = [], []
    for i in range(n):
        row = scenes.row(i)
        if kind == "full":
            caption = full_caption(row, rng)
        else:
            row["count"] = 0
            number_more = rng.randrange(3) if kind == "short" else 3
            more = rng.sample(_BASIC, number_more)
            if kind == "middling":
                more.append(rng.choice(("texture", "weather", "count")))
            caption = caption_stating(row, frozenset({"shape", *more}), rng)
        texts.append(caption.text)
        stated.append(caption.stated)
    return texts, [first + offset * 100_000 + i for i in range(n)], stated


@dataclass(frozen=True)
class Case:
    """A prompt's index, and the thing that its unguided video shows."""

    index: int
    attribute: str
    value: str
    stated: bool

    @property
    def text(self) -> str:
        return "two objects" if self.attribute == "count" else term(self.attribute, self.value)


def shown_things(labels: Row) -> list[tuple[str, str]]:
    """What a video shows that a negative can name."""
    things = [(flaw, flaw) for flaw in FLAWS if labels[flaw] == flaw]
    if labels["weather"] in ("snow", "rain"):
        things.append(("weather", labels["weather"]))
    if labels["texture"] in ("striped", "dotted"):
        things.append(("texture", labels["texture"]))
    if labels["count"] == "two":
        things.append(("count", "two"))
    for name in ("background", "colour", "size", *MORE):
        things += [(name, value) for value in labels[name].split("+") if value in ATTRIBUTES[name]]
    return things


def cases_of(
    rows: Sequence[Row], stated: Sequence[frozenset[str]], most: int, attributes: Sequence[str] = THINGS, seed: int = 0
) -> list[Case]:
    """At most `most` cases an attribute, drawn by lot from what the videos show."""
    found: dict[str, list[Case]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row["count"] == "none":
            continue
        for name, value in shown_things(row):
            if name in attributes:
                found[name].append(Case(i, name, value, name in stated[i]))
    rng = random.Random(seed)
    return [c for name in attributes for c in rng.sample(found[name], min(most, len(found[name])))]


def absent_of(rows: Sequence[Row], most: int, attributes: Sequence[str] = THINGS, seed: int = 0) -> list[Case]:
    """Terms that the videos do not show: `most` an attribute."""
    rng, cases = random.Random(seed), []
    for name in attributes:
        for i in rng.sample(range(len(rows)), min(most, len(rows))):
            row = rows[i]
            values = [v for v in ATTRIBUTES[name] if v not in ("no", "none", "plain", "one")]
            values = [v for v in values if v not in row[name].split("+")]
            if row["count"] != "none" and values:
                cases.append(Case(i, name, rng.choice(values), False))
    return cases


@dataclass(frozen=True)
class Verdict:
    gone: bool
    held: bool
    brought: bool
    lost: tuple[str, ...] = ()

    @property
    def right(self) -> bool:
        return self.gone and self.held and not self.brought


def judge(before: Row, after: Row, case: Case, motion: bool = False) -> Verdict:
    """Compare the guided video's labels with the unguided one's; an attribute that was unsure before is not judged.

    `motion` is judged in whole clips only: of a first chunk of 9 frames the detector reads it right in 48 %.
    """
    after = {
        k: before[k] if before[k] == "unsure" or (k == "motion" and not motion) else v for k, v in after.items()
    } | ({case.attribute: after[case.attribute]})
    name, value = case.attribute, case.value
    gone = value not in after[name].split("+")
    brought, lost = [], []
    for flaw in FLAWS:
        if flaw == name:
            continue
        if before[flaw] != after[flaw]:
            (brought if after[flaw] == flaw else lost).append(flaw)
    if name != "weather" and before["weather"] != after["weather"]:
        (lost if after["weather"] == "none" else brought).append("weather")
    if name == "weather" and after["weather"] not in ("none", value):
        brought.append("weather")
    if name != "count" and before["count"] != after["count"]:
        (brought if after["count"] == "two" else lost).append("count")
    if name == "count" and after["count"] == "none":
        lost.append("count")
    for other in ("texture", "motion", "background"):
        if other != name and before[other] != after[other]:
            lost.append(other)
    if name != "size" and before["size"] != after["size"] and name != "count":
        lost.append("size")
    for other in ("colour", "shape"):
        was, now = set(before[other].split("+")), set(after[other].split("+"))
        if other == name:  # what else was there stays
            kept = (was - {value}) <= now
        elif name == "count":
            kept = now <= was
        else:
            kept = was == now
        if not kept:
            lost.append(other)
    return Verdict(gone, not lost, bool(brought), (*lost, *(f"+{b}" for b in brought)))


def left_alone(before: Row, after: Row, motion: bool = False) -> bool:
    return all(before[k] in (after[k], "unsure") for k in before if motion or k != "motion")


def wilson(k: int, n: int) -> tuple[float, float]:
    if not n:
        return 0.0, 1.0
    z, p = 1.96, k / n
    middle, half = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def table(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> dict[str, dict[str, float]]:
    """Shares by attribute, and `macro`, their mean over attributes."""
    by: dict[str, list[Verdict]] = defaultdict(list)
    for case, verdict in zip(cases, verdicts, strict=True):
        by[case.attribute].append(verdict)
    result: dict[str, dict[str, float]] = {}
    keys = ("gone", "held", "brought", "right")
    for name, found in by.items():
        result[name] = {k: sum(getattr(v, k) for v in found) / len(found) for k in keys} | {"n": len(found)}
        result[name]["low"], result[name]["high"] = wilson(sum(v.right for v in found), len(found))
    counted = [r for name, r in result.items() if name in THINGS]
    result["macro"] = {k: sum(r[k] for r in counted) / len(counted) for k in keys} | {"n": len(cases)}
    result["all"] = {k: sum(getattr(v, k) for v in verdicts) / len(verdicts) for k in keys} | {"n": len(verdicts)}
    return result


def show(name: str, result: Mapping[str, Mapping[str, float]], detail: bool = False) -> str:
    def cell(r: Mapping[str, float]) -> str:
        return "/".join(f"{100 * r[k]:.0f}" for k in ("gone", "held", "brought", "right"))

    line = f"{name:44} macro {cell(result['macro'])}  all {cell(result['all'])} n={result['all']['n']}"
    if detail:
        line += "\n    " + "  ".join(
            f"{k} {cell(r)} ({r['n']:.0f})" for k, r in result.items() if k not in ("macro", "all")
        )
    return line
