"""The results of an evaluation: what was measured of every sample, kept whole so that any table can be made from it.

results = Results.read(Path("runs/hpsv2"))            # a folder with results.json, or the file
for score in results.scores(): print(score.arm, score.metric, score.value, score.interval)
for change in results.differences("none"): print(change.arm, change.value, change.interval)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, FiniteFloat, JsonValue, ValidationError, model_validator

from nasa_video.errors import InputError
from nasa_video.evaluation.statistics import Interval, bootstrap_mean, paired_shares, wilson
from nasa_video.files.atomic import write_text
from nasa_video.models.presets import Strict

RESULTS_FILE = "results.json"
ENOUGH_PAIRS = 10


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
        group: a style, dimension or kind of case; ``kind/part`` is a part of the group ``kind``.
        values: by metric; a metric that could not be measured of this sample is not there.
        media: its picture or video, relative to the folder of the results; ``crop`` is (left, top, right, bottom).
    """

    id: str
    arm: str
    prompt: str
    seed: int
    negative: str = ""
    group: str = ""
    values: dict[str, FiniteFloat]
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
    def sure(self) -> bool:
        """Whether the interval leaves out zero, over enough pairs for an interval to mean something."""
        return self.n >= ENOUGH_PAIRS and self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

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
        """Groups in the order of the samples, without the empty one; parts of groups are not among them."""
        return [name for name in dict.fromkeys(item.group.partition("/")[0] for item in self.items) if name]

    @property
    def parts(self) -> list[str]:
        """Parts of groups, such as "conflict/colour"."""
        return [name for name in dict.fromkeys(item.group for item in self.items) if "/" in name]

    def metric(self, name: str) -> Metric:
        """A metric by name."""
        return next(metric for metric in self.metrics if metric.name == name)

    def of(self, arm: str, group: str = "") -> list[Item]:
        """Samples of an arm, of one group (or part of one) or all."""
        own = [item for item in self.items if item.arm == arm]
        return [item for item in own if not group or f"{item.group}/".startswith(f"{group}/")]

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


def plain(value: object) -> str:
    """A setting for people: texts as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- two runs as one


def compare_runs(first: Results, second: Results, arms: str | None, folders: Sequence[Path]) -> Results:
    """Arms "A: …" and "B: …" over the samples that both runs have; each of B is held against its one of A.

    Args:
        arms: ``ARM_OF_A=ARM_OF_B``, several with commas between; None takes the arms of the same name, or the only arm
            of each.
        folders: of the two runs, where their media lie.

    Raises:
        InputError: the runs are of different kinds, or share no arm, metric or sample.
    """
    if first.kind != second.kind:
        raise InputError(f"the runs are of different kinds, {first.kind} and {second.kind}; compare two of one kind")
    pairs = _pairs(first, second, arms)
    metrics = tuple(metric for metric in first.metrics if metric in second.metrics)
    shared = {item.id for item in first.items} & {item.id for item in second.items}
    if not metrics or not shared:
        what = "samples (prompts and seeds)" if metrics else "metrics"
        raise InputError(f"the runs share no {what}; make both with the same prompts, --seed and --n")
    labels = {(one, side): f"{side}: {one}" for pair in pairs for one, side in zip(pair, "AB", strict=True)}
    chosen: list[Arm] = []
    items: list[Item] = []
    for old, new in pairs:
        chosen.append(_renamed(first, old, labels[old, "A"], labels[old, "A"]))
        chosen.append(_renamed(second, new, labels[new, "B"], labels[old, "A"]))
        items += _moved(first.of(old), shared, labels[old, "A"], folders[0])
        items += _moved(second.of(new), shared, labels[new, "B"], folders[1])
    return Results(
        kind=first.kind,
        title=f"{first.title} (A) and {second.title} (B)",
        settings={
            f"{side}: {name}": value
            for side, run in (("A", first), ("B", second))
            for name, value in run.settings.items()
        },
        arms=tuple(chosen),
        metrics=metrics,
        items=tuple(items),
        notes=(f"{len(shared)} samples (prompt and seed) are in both runs; only these are compared.", *first.notes),
    )  # fmt: skip


def different_settings(first: Results, second: Results) -> Iterator[tuple[str, str, str]]:
    """Settings in which two runs differ: name, value of the first, value of the second."""
    for name in dict.fromkeys((*first.settings, *second.settings)):
        old, new = first.settings.get(name), second.settings.get(name)
        if old != new:
            yield name, plain(old), plain(new)


def _pairs(first: Results, second: Results, arms: str | None) -> list[tuple[str, str]]:
    old, new = ([arm.label for arm in run.arms] for run in (first, second))
    if arms is None:
        same = [(label, label) for label in old if label in new]
        if not same and len(old) == len(new) == 1:
            same = [(old[0], new[0])]
        if not same:
            raise InputError(
                f"no arm is in both runs (A has {', '.join(old)}; B has {', '.join(new)}); say which: "
                "--arms ARM_OF_A=ARM_OF_B"
            )
        return same
    # Labels hold commas and equals signs themselves, so the text is cut by the labels that there are.
    known = {f"{a}={b}": (a, b) for a in old for b in new}
    pairs, rest = [], arms.strip()
    while rest:
        found = max((pair for pair in known if f"{rest},".startswith(f"{pair},")), key=len, default=None)
        if found is None:
            raise InputError(
                f"--arms takes ARM_OF_A=ARM_OF_B, got {rest!r}; A has {', '.join(old)}; B has {', '.join(new)}"
            )
        pairs.append(known[found])
        rest = rest[len(found) + 1 :].strip()
    return pairs


def _renamed(results: Results, label: str, name: str, against: str) -> Arm:
    arm = next(arm for arm in results.arms if arm.label == label)
    return arm.model_copy(update={"label": name, "against": against})


def _moved(items: Sequence[Item], shared: set[str], arm: str, folder: Path) -> list[Item]:
    return [
        item.model_copy(
            update={"arm": arm, "media": str((folder / item.media).absolute()) if item.media is not None else None}
        )
        for item in items
        if item.id in shared
    ]
