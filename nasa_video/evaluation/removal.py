"""The removal table: how often the unwanted feature is gone, and everything that was asked for still there.

A video version of table 2 of arXiv 2412.02687, with the sprites' detectors as judge.
"""

# B batch, F frames, H W picture height and width

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from nasa_video.errors import InputError
from nasa_video.evaluation.cases import Case, CaseKind, Split, attributes_of, build_cases
from nasa_video.evaluation.quality import Quality, mean_quality, quality
from nasa_video.evaluation.statistics import wilson
from nasa_video.files.frames import Frames
from nasa_video.guidance.methods import Guidance
from nasa_video.video.pipeline import VideoPipeline

KINDS: tuple[CaseKind, ...] = ("unmentioned", "stated", "conflict")


@dataclass(frozen=True)
class Method:
    """One way of guiding: a label such as "nasa:0.8" and its settings; None is unguided."""

    label: str
    guidance: Guidance | None

    @property
    def name(self) -> str:
        """The method's name without its scale."""
        return self.guidance.name if self.guidance else "none"

    @property
    def scale(self) -> float | None:
        """The method's scale."""
        return self.guidance.scale if self.guidance else None


class Guides(Protocol):
    """What makes a method with a model's settings: a pipeline, or a preset that is not loaded."""

    def guidance(self, method: str = "nasa", scale: float | None = None) -> Guidance:
        """The method; InputError for one that there is not, or a scale that it cannot take."""
        ...


def parse_methods(text: str, pipeline: Guides) -> list[Method]:
    """``none,cfg:2,nasa,nasa:0.8,nasa+nopad:0.1`` as methods with the model's settings.

    ``+nopad`` takes padding out of the negative branch, ``+pad`` takes it in; ``+conflict2`` is centred NASA's
    rise where prompt and negative contradict each other, of which 0 is none; ``+limit0.3`` is its limit elsewhere,
    ``+nolimit`` is without; ``+tau1.5`` and ``+alpha0.5`` are NAG's, ``+bias-1`` is VSF's.

    Raises:
        InputError: an unknown method or a scale that it cannot take.
    """
    methods = []
    for label in (part.strip() for part in text.split(",") if part.strip()):
        head, _, scale = label.partition(":")
        name, *switches = head.split("+")
        if name == "none" and not switches and not scale:
            methods.append(Method("none", None))
            continue
        try:
            guidance = pipeline.guidance(name, float(scale) if scale else None)
        except ValueError as error:
            raise InputError(f"method {label!r}: {error}") from error
        for switch in switches:
            if not (own := _own_setting(guidance.name, switch)):
                raise InputError(
                    f"method {label!r}: unknown switch {switch!r}; all but cfg take nopad and pad, "
                    + ", ".join(f"{name} {' and '.join(settings)} with a number" for name, settings in _OWN.items())
                )
            try:
                guidance = dataclasses.replace(guidance, **own)
            except ValueError as error:
                raise InputError(f"method {label!r}: {error}") from error
        methods.append(Method(label, guidance))
    if not methods:
        raise InputError("give at least one method, such as none,cfg:3,nasa")
    return methods


_OWN = {"nasa-centred": ("conflict", "limit"), "nag": ("tau", "alpha"), "vsf": ("bias",)}
"""By method, the settings that a switch can name beside padding."""


def _own_setting(method: str, switch: str) -> dict[str, Any]:
    """The setting of a method that a switch names; empty for a switch that is not one of its own."""
    if switch in ("nopad", "pad"):
        return {} if method == "cfg" else {"negative_padding": switch == "pad"}
    if method == "nasa-centred" and switch == "nolimit":
        return {"limit": None}
    found = re.fullmatch(r"([a-z]+)(-?\d+(?:\.\d+)?)", switch)
    return {found[1]: float(found[2])} if found and found[1] in _OWN.get(method, ()) else {}


class Judge(Protocol):
    """Says what videos show."""

    def __call__(self, videos: Sequence[Frames]) -> list[dict[str, str]]:
        """One dictionary a video (F, H, W, 3): attribute to label; "none" and "unsure" are answers."""
        ...


class SpritesJudge:
    """The detectors of the sprites world: the shipped ones, or those of a file."""

    def __init__(self, weights: Path | None = None, device: str | torch.device = "cpu") -> None:
        from nasa_video.sprites.detectors import Detector

        self._detector = Detector.load(weights)
        self._detector.network.to(device)

    def __call__(self, videos: Sequence[Frames]) -> list[dict[str, str]]:
        from nasa_video.files.frames import tensor_from_frames

        labels = self._detector.detect(torch.stack([tensor_from_frames(video) for video in videos]))
        return [{name: column[i] for name, column in labels.items()} for i in range(len(videos))]


def detector_hash() -> str:
    """SHA-256 of the shipped detectors' weights."""
    from importlib.resources import as_file, files

    from nasa_video.files.atomic import file_sha256

    with as_file(files("nasa_video.sprites") / "weights" / "detector.safetensors") as path:
        return file_sha256(path)


@dataclass(frozen=True)
class Verdict:
    """What became of one case."""

    removed: bool
    held: bool
    out_of_range: float
    quality: Quality


def verdict(case: Case, labels: dict[str, str], out_of_range: float, measured: Quality) -> Verdict:
    """Judge one case; "unsure" counts neither as removed nor as held."""
    from nasa_video.sprites.detectors import UNSURE, shows

    found = labels[case.attribute]
    removed = found != UNSURE and not shows(found, case.value)
    held = all(shows(labels[name], value) for name, value in case.stated.items())
    return Verdict(removed, held, out_of_range, measured)


@dataclass(frozen=True)
class Cell:
    """One cell of the table before it is filled; ``first_steps`` as in ``SamplerSettings``."""

    method: Method
    steps: int
    attribute: str
    kind: CaseKind
    first_steps: int | None = None

    @property
    def key(self) -> str:
        """Its name in a journal."""
        first = "" if self.first_steps is None else f" first {self.first_steps}"
        return f"{self.method.label}/{self.steps}{first}/{self.kind}/{self.attribute}"


def cells(
    methods: Sequence[Method],
    steps: Sequence[int],
    kinds: Sequence[CaseKind],
    attributes: Sequence[str] | None,
    first_steps: int | None = None,
) -> Iterator[Cell]:
    """Every cell, the ones that share their videos' prompts next to each other.

    Raises:
        InputError: an attribute that no kind of case exists for.
    """
    known = {name for kind in kinds for name in attributes_of(kind)}
    unknown = sorted(set(attributes or ()) - known)
    if unknown:
        raise InputError(f"no case for {', '.join(unknown)}; choose among {', '.join(sorted(known))}")
    for kind in kinds:
        for attribute in attributes_of(kind):
            if attributes is None or attribute in attributes:
                for count in steps:
                    for method in methods:
                        yield Cell(method, count, attribute, kind, None if first_steps == count else first_steps)


Look = Callable[[Case, Frames, Verdict], None]
"""Called with every judged video (F, H, W, 3)."""


def run_cases(
    pipeline: VideoPipeline,
    method: Method,
    steps: int,
    cases: Sequence[Case],
    judge: Judge,
    frames: int,
    batch: int,
    look: Look | None = None,
) -> list[Verdict]:
    """Make and judge the cases' videos, ``batch`` at a time."""
    verdicts = []
    for start in range(0, len(cases), batch):
        part = cases[start : start + batch]
        chunks = list(
            pipeline.stream_batch(
                [case.prompt for case in part],
                seeds=[case.seed for case in part],
                negatives=[case.negative for case in part] if method.guidance else None,
                guidance=method.guidance,
                frames=frames,
                steps=steps,
            )
        )
        videos = np.concatenate([chunk.frames for chunk in chunks], axis=1)
        shares = [[chunk.out_of_range[i] for chunk in chunks] for i in range(len(part))]
        for case, labels, video, share in zip(part, judge(list(videos)), videos, shares, strict=True):
            verdicts.append(verdict(case, labels, float(np.mean(share)), quality(video)))
            if look is not None:
                look(case, video, verdicts[-1])
    return verdicts


def row_of(cell: Cell, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """A row of the table: shares from 0 to 1, each with its 95 % Wilson interval."""
    n = len(verdicts)
    counts = {
        "removed": sum(v.removed for v in verdicts),
        "held": sum(v.held for v in verdicts),
        "both": sum(v.removed and v.held for v in verdicts),
    }
    mean = mean_quality([v.quality for v in verdicts])
    return {
        "method": cell.method.name,
        "label": cell.method.label,
        "scale": cell.method.scale,
        "steps": cell.steps,
        "first_steps": cell.first_steps,
        "attribute": cell.attribute,
        "case": cell.kind,
        "n": n,
        **{name: count / n for name, count in counts.items()},
        **{f"{name}_interval": wilson(count, n) for name, count in counts.items()},
        "out_of_range": float(np.mean([v.out_of_range for v in verdicts])),
        "sharpness": mean.sharpness,
        "flicker": mean.flicker,
        "luma": mean.luma,
    }


def removal_table(
    pipeline: VideoPipeline,
    plan: Iterable[Cell],
    judge: Judge,
    *,
    n: int,
    split: Split,
    seed: int = 0,
    frames: int,
    batch: int = 16,
    journal: Path | None = None,
    tell: Callable[[Cell, dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Fill the cells.

    Args:
        journal: a JSON-lines file; cells that it holds are not run again, each finished cell is appended at once.
        tell: called with every row as it is ready.
    """
    settings = {"n": n, "split": split, "seed": seed, "frames": frames, "model": pipeline.preset.name}
    done = _read_journal(journal, settings)
    rows = []
    for cell in plan:
        row = done.get(cell.key)
        if row is None:
            cases = build_cases(cell.attribute, cell.kind, n, split, seed)
            made_by = pipeline.opening_in(cell.first_steps)
            row = row_of(cell, run_cases(made_by, cell.method, cell.steps, cases, judge, frames, batch))
            if journal is not None:
                with journal.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": cell.key, "settings": settings, "row": row}) + "\n")
        rows.append(row)
        if tell is not None:
            tell(cell, row)
    return rows


def _read_journal(journal: Path | None, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if journal is None or not journal.exists():
        return {}
    done = {}
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a killed run was writing: its cell is made again
        if entry["settings"] == settings:
            done[entry["key"]] = entry["row"]
    return done
