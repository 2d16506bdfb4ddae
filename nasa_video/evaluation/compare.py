"""Two evaluations as one, so that every table and plot can set them against each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from nasa_video.errors import InputError
from nasa_video.evaluation.results import Arm, Item, Results
from nasa_video.evaluation.tables import plain


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
    there = [arm.label for arm in first.arms], [arm.label for arm in second.arms]
    if arms is None:
        same = [(label, label) for label in there[0] if label in there[1]]
        if not same and len(there[0]) == len(there[1]) == 1:
            same = [(there[0][0], there[1][0])]
        if not same:
            raise InputError(
                f"no arm is in both runs (A has {', '.join(there[0])}; B has {', '.join(there[1])}); say which: "
                "--arms ARM_OF_A=ARM_OF_B"
            )
        return same
    pairs = []
    # Labels such as "nasa:1, 4 steps" hold commas, so the text is cut only where what follows holds a "=".
    for text in _cut(arms):
        old, equals, new = (part.strip() for part in text.partition("="))
        if not equals or old not in there[0] or new not in there[1]:
            raise InputError(
                f"--arms takes ARM_OF_A=ARM_OF_B, got {text!r}; A has {', '.join(there[0])}; B has "
                f"{', '.join(there[1])}"
            )
        pairs.append((old, new))
    return pairs


def _cut(text: str) -> list[str]:
    parts: list[str] = []
    for part in text.split(","):
        if "=" in part or not parts:
            parts.append(part)
        else:
            parts[-1] += f",{part}"
    return parts


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
