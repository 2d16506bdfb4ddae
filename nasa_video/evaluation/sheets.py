"""Contact sheets: the samples that an arm did best and worst, beside the same samples of what it is held against."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from nasa_video.errors import InputError
from nasa_video.evaluation.results import Arm, Item, Metric, Results
from nasa_video.evaluation.sampling import pictures_of

SHOWN = 4
"""Best samples of an arm, and as many worst."""
_FRAMES = 4
_MAX_SIDE = 256


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


def thumbnail(item: Item, folder: Path) -> str | None:
    """A sample's picture (a video: frames side by side) as a data URL; None where its file is not there any more."""
    if item.media is None:
        return None
    try:
        frames = pictures_of(folder / item.media, _FRAMES)
    except InputError:
        return None
    image = Image.fromarray(np.concatenate(list(frames), axis=1))
    if item.crop is not None:
        image = image.crop(item.crop)
    side = _MAX_SIDE * (len(frames) if len(frames) > 1 else max(1, round(image.width / image.height)))
    image.thumbnail((side, _MAX_SIDE))
    return data_url(image)


def data_url(image: Image.Image) -> str:
    """A picture inside a page."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def sheet_metric(results: Results) -> Metric:
    """What samples are ranked by: everything right where that is measured, else the first metric."""
    named: Sequence[Metric] = [metric for metric in results.metrics if metric.name == "both"]
    return (*named, *results.metrics)[0]
