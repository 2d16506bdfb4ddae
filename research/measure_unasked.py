"""How often guided videos show what nobody asked for: measure_unasked.py [--methods none,nasa:1.25] [--n 48]

The scenes behind the reported cases of the removal table are one plain sprite, with no weather, texture, second object
or flaw but the one that a case is about. A prompt that does not say all may be answered with them, as often as in the
data: compare with "none". *Held* does not count them. Prints Markdown, shares in percent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.progress import Progress

from nasa_video import VideoPipeline
from nasa_video.evaluation.cases import Case, build_cases
from nasa_video.evaluation.removal import SpritesJudge, parse_methods, run_cases
from nasa_video.files.frames import Frames
from nasa_video.sprites.detectors import shows
from nasa_video.sprites.world import ATTRIBUTES, FLAWS

CELLS = {"conflict": ("colour", "background"), "unmentioned": ("weather", "blurry")}
BESIDES = {name: ATTRIBUTES[name][1:] for name in ("weather", "texture", "count", *FLAWS)}
"""What a plain sprite is without."""


class RememberingJudge(SpritesJudge):
    """Keeps what it has said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[dict[str, str]] = []

    def __call__(self, videos: Sequence[Frames]) -> list[dict[str, str]]:
        labels = super().__call__(videos)
        self.said += labels
        return labels


def unasked(case: Case, labels: dict[str, str]) -> set[str]:
    """Attributes of a video that its prompt does not ask for, and its negative does not name."""
    return {
        name
        for name, values in BESIDES.items()
        if name != case.attribute and any(shows(labels[name], value) for value in values)
    }


def main(
    methods: Annotated[
        str, typer.Option(help="As in eval removal.")
    ] = "none,nasa:1.25,nasa-centred+nolimit:0.5,nasa-centred:0.5,vsf:1.4",
    steps: Annotated[int, typer.Option(help="Steps of a chunk.")] = 4,
    n: Annotated[int, typer.Option(help="Videos of each attribute.", min=1)] = 48,
) -> None:
    """Makes the videos and prints the table."""
    pipeline = VideoPipeline.from_pretrained("sprites")
    asked = [(kind, method) for kind in CELLS for method in parse_methods(methods, pipeline)]
    rows = []
    with Progress() as progress:
        for kind, method in progress.track(asked):
            judge = RememberingJudge()
            cases = [case for name in CELLS[kind] for case in build_cases(name, kind, n, "report")]  # type: ignore[arg-type]
            run_cases(pipeline, method, steps, cases, judge, frames=33, batch=24)
            found = [unasked(case, labels) for case, labels in zip(cases, judge.said, strict=True)]
            counts = Counter(name for names in found for name in names)
            shares = [sum(map(bool, found)), *(counts[name] for name in BESIDES)]
            rows.append(
                f"| {method.label} | {kind} | " + " | ".join(f"{100 * c / len(cases):.0f}" for c in shares) + " |"
            )
    print(f"{steps} steps, {2 * n} videos a row\n")
    print("| method | case | any | " + " | ".join(BESIDES) + " |")
    print("|" + "---|" * (3 + len(BESIDES)))
    print("\n".join(rows))


if __name__ == "__main__":
    typer.run(main)
