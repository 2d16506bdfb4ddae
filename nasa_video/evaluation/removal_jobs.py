"""The sprites removal table as jobs, one a cell, so that it resumes, shards and spreads as every evaluation does."""

# F frames, H W picture height and width

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
from pydantic import Field, JsonValue

from nasa_video import __version__
from nasa_video.evaluation.cases import Case, CaseKind, Split, build_cases
from nasa_video.evaluation.identity import checkpoint_hash
from nasa_video.evaluation.removal import Cell, SpritesJudge, Verdict, detector_hash, row_of, run_cases
from nasa_video.evaluation.results import Arm, Item, Metric, Results
from nasa_video.evaluation.sampling import arm_of
from nasa_video.evaluation.video_jobs import check_dtype, stored_sampler, with_sampler_of
from nasa_video.files.frames import Frames
from nasa_video.jobs.store import Job, Measured, Record
from nasa_video.models.presets import VideoPreset
from nasa_video.video.pipeline import VideoPipeline
from nasa_video.video.recipe import StoredGuidance, restore_guidance, store_guidance

SHOWN = 4
"""Cases of a cell that are kept as a strip of frames for the report: the same ones under every method."""
STRIP_FRAMES = 4

QUALITY_METRICS = (
    Metric(name="sharpness", title="sharpness"),
    Metric(name="noise", title="noise", better="lower"),
    Metric(name="flicker", title="flicker", better="lower"),
    Metric(name="motion", title="motion", better="neither"),
    Metric(name="colourfulness", title="colourfulness", better="neither", digits=1),
    Metric(name="luma", title="mean luma", better="neither", digits=1),
)
REMOVAL_METRICS = (
    Metric(name="removed", title="removed", kind="share"),
    Metric(name="held", title="held", kind="share"),
    Metric(name="both", title="both", kind="share"),
)


class CellJob(Job):
    """One cell of the table; see Cell and ``build_cases``.

    Attributes:
        settings: the rest of what its videos depend on: the model's loop and dtype.
    """

    labels: ClassVar[frozenset[str]] = frozenset({"label"})

    label: str
    model: str
    checkpoint: str
    detector: str
    guidance: StoredGuidance | None
    steps: int
    attribute: str
    kind: CaseKind
    n: int
    split: Split
    seed: int
    frames: int
    version: str = __version__
    settings: dict[str, JsonValue] = Field(default_factory=dict)


@dataclass(frozen=True)
class Draw:
    """Which cases are drawn for every cell."""

    n: int
    split: Split
    seed: int
    frames: int


def plan_cells(preset: VideoPreset, plan: Sequence[Cell], draw: Draw, dtype: str) -> list[tuple[Cell, CellJob]]:
    """A job for every cell, in the table's order.

    Args:
        dtype: of the model, such as "float32"; cells made in another are others.
    """
    checkpoint, detector = checkpoint_hash(preset), detector_hash()
    return [
        (
            cell,
            CellJob(
                label=cell.method.label,
                model=preset.name,
                checkpoint=checkpoint,
                detector=detector,
                guidance=store_guidance(cell.method.guidance),
                steps=cell.steps,
                attribute=cell.attribute,
                kind=cell.kind,
                settings={
                    "sampler": stored_sampler(preset.sampler.with_first_chunk_steps(cell.first_steps)),
                    "dtype": dtype,
                },
                **dataclasses.asdict(draw),
            ),
        )
        for cell in plan
    ]


class CellWorker:
    """Makes and judges the videos of a cell; its output is a sheet of a few of them, a strip of frames each."""

    def __init__(self, model: str, device: str | None, batch: int, dtype: str | None = None) -> None:
        wanted = None if dtype is None else check_dtype(dtype)
        self._pipeline = VideoPipeline.from_pretrained(model, device, wanted)
        self._judge = SpritesJudge(device=self._pipeline.model.device)
        self._batch = batch

    def __call__(self, job: CellJob, path: Path) -> Measured:
        """Measured are the cases' ``verdicts``; the sheet shows the first of them, from the top."""
        from nasa_video.evaluation.removal import Method

        cases = build_cases(job.attribute, job.kind, job.n, job.split, job.seed)
        strips = _Strips()
        method = Method(job.label, restore_guidance(job.guidance))
        verdicts = run_cases(
            with_sampler_of(job.settings, self._pipeline),
            method, job.steps, cases, self._judge, job.frames, self._batch, strips.look,
        )  # fmt: skip
        strips.save(path)
        return {"verdicts": [dataclasses.asdict(one) for one in verdicts]}


class _Strips:
    """Keeps strips of the first videos that it is shown."""

    def __init__(self) -> None:
        self._rows: list[Frames] = []

    def look(self, case: Case, video: Frames, verdict: Verdict) -> None:
        if len(self._rows) < SHOWN:
            wanted = np.linspace(0, len(video) - 1, STRIP_FRAMES).round().astype(int)
            self._rows.append(np.concatenate(list(video[wanted]), axis=1))

    def save(self, path: Path) -> None:
        from PIL import Image

        Image.fromarray(np.concatenate(self._rows, axis=0)).save(path)


def verdicts_of(record: Record) -> list[Verdict]:
    """The verdicts that a cell's record holds."""
    from nasa_video.evaluation.quality import Quality

    return [Verdict(**one | {"quality": Quality(**one["quality"])}) for one in record.measured["verdicts"]]


def rows_of(done: Sequence[tuple[Cell, Record]]) -> list[dict[str, Any]]:
    """The rows of the table."""
    return [row_of(cell, verdicts_of(record)) for cell, record in done]


def removal_results(preset: VideoPreset, done: Sequence[tuple[Cell, Record]], draw: Draw, folder: Path) -> Results:
    """Every case of the table as a sample, in groups by kind of case."""
    several = len({(cell.steps, cell.first_steps) for cell, _ in done}) > 1
    arms = {arm.label: arm for arm in (_arm(cell, several) for cell, _ in done)}
    items = [item for cell, record in done for item in _items(cell, record, draw, several, folder)]
    out_of_range = Metric(name="out_of_range", title="out of range", better="lower", digits=4)
    return Results(
        kind="removal",
        title=f"Removal on {preset.name}",
        settings={
            "model": preset.name,
            "title": preset.title,
            "checkpoint_sha256": checkpoint_hash(preset),
            "judge": {"judge": "sprites", "sha256": detector_hash()},
            "version": __version__,
            **dataclasses.asdict(draw),
            "model_settings": _settings(done),
            "attributes": list(dict.fromkeys(cell.attribute for cell, _ in done)),
        },
        arms=tuple(arms.values()),
        metrics=(*REMOVAL_METRICS, *QUALITY_METRICS, out_of_range),
        items=tuple(items),
        notes=(
            "removed: the detectors do not see what the negative prompt names; held: they see everything else that "
            "the prompt states; “unsure” counts as neither.",
            "One prompt and seed a sample, the same in every arm, so that arms are compared pair by pair.",
        ),
    )


def _arm(cell: Cell, several: bool) -> Arm:
    return arm_of(cell.method, cell.steps, several, cell.first_steps)


def _settings(done: Sequence[tuple[Cell, Record]]) -> dict[str, JsonValue]:
    """The first cell's; a table is planned in one dtype, and steps are told with the arms."""
    return dict(cast(CellJob, done[0][1].job).settings) if done else {}


def _items(cell: Cell, record: Record, draw: Draw, several: bool, folder: Path) -> list[Item]:
    cases = build_cases(cell.attribute, cell.kind, draw.n, draw.split, draw.seed)
    arm = _arm(cell, several).label
    crops = _crops(record.output, min(SHOWN, len(cases)))
    items = []
    for index, (case, one) in enumerate(zip(cases, verdicts_of(record), strict=True)):
        crop = crops[index] if index < len(crops) else None
        items.append(
            Item(
                id=f"{cell.kind}/{cell.attribute}/{index}",
                arm=arm,
                prompt=case.prompt,
                negative=case.negative,
                seed=case.seed,
                group=cell.kind,
                values={
                    "removed": float(one.removed),
                    "held": float(one.held),
                    "both": float(one.removed and one.held),
                    "out_of_range": one.out_of_range,
                    **dataclasses.asdict(one.quality),
                },
                media=record.output.relative_to(folder).as_posix() if crop and record.output else None,
                crop=crop,
            )
        )
    return items


def _crops(sheet: Path | None, rows: int) -> list[tuple[int, int, int, int]]:
    """The boxes of a sheet's rows."""
    from PIL import Image

    assert sheet is not None
    with Image.open(sheet) as image:
        width, height = image.width, image.height // rows
    return [(0, row * height, width, (row + 1) * height) for row in range(rows)]
