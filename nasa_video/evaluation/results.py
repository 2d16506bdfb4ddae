"""The results of an evaluation: what was measured of every sample, kept whole so that any table can be made from it.

results = Results.read(Path("runs/hpsv2"))            # a folder with results.json, or the file
for score in results.scores(): print(score.arm, score.metric, score.value, score.interval)
for change in results.differences("none"): print(change.arm, change.value, change.interval)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, ValidationError, model_validator

from nasa_video.errors import InputError
from nasa_video.evaluation.statistics import Interval, bootstrap_mean, paired_shares, wilson
from nasa_video.files.atomic import write_text
from nasa_video.models.presets import Strict

RESULTS_FILE = "results.json"


class Metric(Strict):
    """One column.

    Attributes:
        kind: "share": every sample is 0 or 1, with a Wilson interval; "mean": any number, with a bootstrap interval.
        better: which way is better; "neither" for what only stands beside (mean luma).
        digits: decimals in a table; shares are shown in per cent.
    """

    name: str
    title: str
    kind: Literal["share", "mean"] = "mean"
    better: Literal["higher", "lower", "neither"] = "higher"
    digits: int = 2

    def show(self, value: float, sign: bool = False) -> str:
        """A value of this metric for people."""
        number, digits = (100 * value, 1) if self.kind == "share" else (value, self.digits)
        return f"{number:{'+' if sign else ''}.{digits}f}"

    @property
    def heading(self) -> str:
        """Title with unit and direction."""
        unit = ", %" if self.kind == "share" else ""
        return self.title + unit + {"higher": " ↑", "lower": " ↓", "neither": ""}[self.better]


class Arm(Strict):
    """One thing that is compared: a method with all its settings, at one number of steps.

    ``against`` names the arm that it is held against, where that is not the unguided one.
    """

    label: str
    method: str = "none"
    scale: float | None = None
    steps: int | None = None
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    against: str | None = None

    @property
    def family(self) -> str:
        """The label without its scale: the arms of one sweep share it."""
        return re.sub(r":[-+.\deE]+(?=,|$)", "", self.label)


class Item(Strict):
    """One sample.

    Attributes:
        id: prompt and seed, equal in every arm that made the same sample: what pairs are formed by.
        group: a style, dimension or kind of case.
        values: by metric; a metric that could not be measured of this sample is not there.
        media: its picture or video, relative to the folder of the results; ``crop`` is (left, top, right, bottom).
    """

    id: str
    arm: str
    prompt: str
    seed: int
    negative: str = ""
    group: str = ""
    values: dict[str, float]
    media: str | None = None
    crop: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Score:
    """A metric over the samples of one arm (and group; "" is all). ``interval`` is None where n is too small."""

    arm: str
    group: str
    metric: str
    n: int
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Difference:
    """A metric of one arm minus that of another, over the samples that both have.

    Attributes:
        pairs: (item of the arm, its difference), for tables by prompt.
        raised, lowered: how many pairs changed which way.
    """

    arm: str
    against: str
    metric: str
    value: float
    interval: Interval | None
    pairs: list[tuple[Item, float]]

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    @property
    def raised(self) -> int:
        """Pairs in which the arm has more."""
        return sum(change > 0 for _, change in self.pairs)

    @property
    def lowered(self) -> int:
        """Pairs in which the arm has less."""
        return sum(change < 0 for _, change in self.pairs)


class Results(Strict):
    """Everything that an evaluation found, and with what.

    Attributes:
        kind: the command: "removal", "hpsv2" ...
        settings: model, checkpoint hash, prompts, seeds, versions: whatever a reader needs to make it again.
        notes: what must be known to read the numbers.
    """

    format: Literal[1] = 1
    kind: str
    title: str
    settings: dict[str, JsonValue]
    arms: tuple[Arm, ...]
    metrics: tuple[Metric, ...]
    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Results:
        labels = [arm.label for arm in self.arms]
        if len(set(labels)) != len(labels):
            raise ValueError(f"two arms have one label: {', '.join(labels)}")
        seen = set()
        for item in self.items:
            if item.arm not in labels:
                raise ValueError(f"the sample {item.id} is of an unknown arm {item.arm!r}")
            if (item.arm, item.id) in seen:
                raise ValueError(f"the sample {item.id} is twice in {item.arm}")
            seen.add((item.arm, item.id))
        return self

    @classmethod
    def read(cls, path: Path) -> Results:
        """From a file, or from a folder that holds ``results.json``.

        Raises:
            InputError: it is not there or is something else.
        """
        file = path / RESULTS_FILE if path.is_dir() else path
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read; give the folder that an eval command wrote with -o") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{file} holds no results of this version: {place}: {first['msg']}") from error

    def write(self, folder: Path) -> Path:
        """Write ``results.json`` into a folder, whole or not at all."""
        path = folder / RESULTS_FILE
        write_text(path, self.model_dump_json(indent=1) + "\n")
        return path

    @property
    def groups(self) -> list[str]:
        """Groups in the order of the samples, without the empty one."""
        return [name for name in dict.fromkeys(item.group for item in self.items) if name]

    def metric(self, name: str) -> Metric:
        """A metric by name."""
        return next(metric for metric in self.metrics if metric.name == name)

    def of(self, arm: str, group: str = "") -> list[Item]:
        """Samples of an arm, of one group or all."""
        return [item for item in self.items if item.arm == arm and (not group or item.group == group)]

    def scores(self, groups: Sequence[str] = ("",)) -> Iterator[Score]:
        """Every metric of every arm in the groups ("" is all samples); a metric without samples is left out."""
        for group in groups:
            for arm in self.arms:
                items = self.of(arm.label, group)
                for metric in self.metrics:
                    score = _score(arm.label, group, metric, items)
                    if score is not None:
                        yield score

    @property
    def baseline(self) -> str:
        """What differences are taken against: the unguided arm if there is one, else the first."""
        return next((arm.label for arm in self.arms if arm.method == "none"), self.arms[0].label)

    def baseline_of(self, arm: Arm) -> str:
        """What an arm is held against: what it names, else the unguided arm of its steps, else :attr:`baseline`."""
        if arm.against is not None:
            return arm.against
        same = (one.label for one in self.arms if one.method == "none" and one.steps == arm.steps)
        return next(same, self.baseline)

    def differences(self, against: str | None = None) -> Iterator[Difference]:
        """Every arm minus the one it is held against (None: :meth:`baseline_of`), metric by metric.

        Raises:
            InputError: there is no such arm.
        """
        if against is not None and against not in {arm.label for arm in self.arms}:
            raise InputError(f"there is no {against!r}; there are {', '.join(arm.label for arm in self.arms)}")
        for arm in self.arms:
            base = against if against is not None else self.baseline_of(arm)
            if base != arm.label:
                first, second = self.of(base), self.of(arm.label)
                for metric in self.metrics:
                    found = difference(metric, first, second, base, arm.label)
                    if found is not None:
                        yield found


def difference(
    metric: Metric, first: Sequence[Item], second: Sequence[Item], against: str, arm: str
) -> Difference | None:
    """The second minus the first over the samples (by id) that both have; None where there are none."""
    before = {item.id: item.values[metric.name] for item in first if metric.name in item.values}
    pairs = [
        (item, item.values[metric.name] - before[item.id])
        for item in second
        if metric.name in item.values and item.id in before
    ]
    if not pairs:
        return None
    changes = [change for _, change in pairs]
    if metric.kind == "share":
        old = [bool(before[item.id]) for item, _ in pairs]
        interval: Interval | None = paired_shares(old, [bool(item.values[metric.name]) for item, _ in pairs])
    else:
        interval = bootstrap_mean(changes, [item.prompt for item, _ in pairs])
    return Difference(arm, against, metric.name, sum(changes) / len(changes), interval, pairs)


def _score(arm: str, group: str, metric: Metric, items: Sequence[Item]) -> Score | None:
    measured = [item for item in items if metric.name in item.values]
    if not measured:
        return None
    values = [item.values[metric.name] for item in measured]
    n = len(values)
    if metric.kind == "share":
        interval: Interval | None = wilson(round(sum(values)), n)
    else:
        interval = bootstrap_mean(values, [item.prompt for item in measured])
    return Score(arm, group, metric.name, n, sum(values) / n, interval)
