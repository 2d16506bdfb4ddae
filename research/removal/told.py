"""Full captions of what a video shows, from the detector's labels, without what the negatives name."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from nasa_video.sprites.captions import _ALWAYS_THERE, caption_stating
from nasa_video.sprites.world import ATTRIBUTES, FLAWS


def row_of(labels: Mapping[str, str]) -> dict[str, int]:
    """The integers of a scene with these labels; what is unsure is the first value."""
    row = {}
    for name, values in ATTRIBUTES.items():
        first = labels[name].split("+")[0]
        row[name] = values.index(first) if first in values else 0
    for name in ("shape", "colour"):
        second = labels[name].split("+")[-1]
        values = ATTRIBUTES[name]
        row[name + "2"] = values.index(second) if second in values else 0
        if row[name + "2"] == row[name]:
            row[name + "2"] = (row[name] + 1) % len(values)
    return row


def without(
    row: dict[str, int], things: Sequence[tuple[str, str]], second: Mapping[str, Sequence[int]]
) -> dict[str, int]:
    """The scene without these things: the next value in `second`'s order (best first) that none of them names."""
    row = dict(row)
    banned: dict[str, set[int]] = {}
    for name, value in things:
        banned.setdefault(name, set()).add(ATTRIBUTES[name].index(value))
    for name, values in banned.items():
        names = (name, name + "2") if name in ("shape", "colour") and row["count"] == 1 else (name,)
        for each in names:
            if row[each] in values:
                other = {row[n] for n in names if n != each} if len(names) > 1 else set()
                order = second.get(name) or range(len(ATTRIBUTES[name]))
                row[each] = next(v for v in order if v not in values and v not in other)
    return row


def told(row: Mapping[str, int], rng: random.Random, unsure: Sequence[str] = ()) -> str:
    """All there is in a scene but what nobody is sure of."""
    stated = set(_ALWAYS_THERE) | {flaw for flaw in FLAWS if row[flaw]}
    stated |= {name for name in ("texture", "weather") if row[name]}
    return caption_stating(row, frozenset(stated - set(unsure)), rng).text


def unsure_of(labels: Mapping[str, str]) -> list[str]:
    """Attributes that a label leaves unsure, or half of them where there are two objects."""
    two = labels["count"] == "two"
    return [
        n
        for n in ATTRIBUTES
        if (labels[n] in ("unsure", "none") and n != "weather")
        or (two and n in ("shape", "colour") and "+" not in labels[n])
    ]
