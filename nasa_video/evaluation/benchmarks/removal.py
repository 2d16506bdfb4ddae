"""How often the unwanted feature is gone, and what was asked for still there: table 2 of arXiv 2412.02687, for videos.

The shipped model is judged by the detectors of its own world, cell by cell (:func:`plan_cells`); any model by any
judge, over prompts of a file or that world's own (:func:`feature_removal`, :func:`sprites_removal`).
"""

# B batch, F frames, H W height and width

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, JsonValue

from nasa_video import __version__
from nasa_video.errors import InputError
from nasa_video.evaluation.assets import checkpoint_hash, read_json
from nasa_video.evaluation.benchmarks.base import Benchmark, JudgeScorer
from nasa_video.evaluation.benchmarks.removal_cases import Case, CaseKind, Split, attributes_of, build_cases
from nasa_video.evaluation.judges import JudgeOptions, Question
from nasa_video.evaluation.metrics import measure, measured_metrics
from nasa_video.evaluation.results import Arm, Item, Metric, Results
from nasa_video.evaluation.samples import Method, Sample, arm_of, check_dtype, stored_sampler, with_sampler_of
from nasa_video.files.atomic import file_sha256
from nasa_video.files.frames import Frames
from nasa_video.jobs.store import Job, Measured, Record
from nasa_video.models.presets import VideoPreset
from nasa_video.video.request import find_guidance

if TYPE_CHECKING:
    import torch

    from nasa_video.video.pipeline import VideoPipeline

KINDS: tuple[CaseKind, ...] = ("unmentioned", "stated", "conflict")
SHOWN = 4
"""Cases of a cell that are kept as a strip of frames for the report: the same ones under every method."""
STRIP_FRAMES = 4
METRICS = (
    Metric(name="removed", title="removed", kind="share"),
    Metric(name="held", title="held", kind="share"),
    Metric(name="both", title="both", kind="share"),
)
_OUT_OF_RANGE = Metric(name="out_of_range", title="out of range", better="lower", digits=4)


# --- the detectors of the sprites world


class SpritesJudge:
    """The detectors of the sprites world: the shipped ones, or those of a file."""

    def __init__(self, weights: Path | None = None, device: str | torch.device = "cpu") -> None:
        from nasa_video.sprites.detectors import Detector

        self._detector = Detector.load(weights)
        self._detector.network.to(device)

    def __call__(self, videos: Sequence[Frames]) -> list[dict[str, str]]:
        """One dictionary a video (F, H, W, 3): attribute to label; "none" and "unsure" are answers."""
        import torch

        from nasa_video.files.frames import tensor_from_frames

        labels = self._detector.detect(torch.stack([tensor_from_frames(video) for video in videos]))
        return [{name: column[i] for name, column in labels.items()} for i in range(len(videos))]


def detector_hash() -> str:
    """SHA-256 of the shipped detectors' weights."""
    from importlib.resources import as_file, files

    with as_file(files("nasa_video.sprites") / "weights" / "detector.safetensors") as path:
        return file_sha256(path)


@dataclass(frozen=True)
class Verdict:
    """What became of one case: is the feature gone, is everything else there, and what was measured of the video."""

    removed: bool
    held: bool
    measured: dict[str, float]

    @property
    def values(self) -> dict[str, float]:
        """By metric."""
        shares = {"removed": self.removed, "held": self.held, "both": self.removed and self.held}
        return {name: float(share) for name, share in shares.items()} | self.measured


def verdict(case: Case, labels: dict[str, str], measured: dict[str, float]) -> Verdict:
    """Judge one case; "unsure" counts neither as removed nor as held."""
    from nasa_video.sprites.detectors import UNSURE, shows

    found = labels[case.attribute]
    removed = found != UNSURE and not shows(found, case.value)
    return Verdict(removed, all(shows(labels[name], value) for name, value in case.stated.items()), measured)


def run_cases(
    pipeline: VideoPipeline,
    method: Method,
    steps: int,
    cases: Sequence[Case],
    judge: SpritesJudge,
    frames: int,
    batch: int,
    look: Callable[[Frames], None] | None = None,
) -> list[Verdict]:
    """Make and judge the cases' videos, ``batch`` at a time; ``look`` is called with each of them."""
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
        shares = np.mean([chunk.out_of_range for chunk in chunks], axis=0)
        for case, labels, video, share in zip(part, judge(list(videos)), videos, shares, strict=True):
            verdicts.append(verdict(case, labels, {"out_of_range": float(share), **measure(video)}))
            if look is not None:
                look(video)
    return verdicts


# --- cells: the cases of one attribute and kind under one method


@dataclass(frozen=True)
class Cell:
    """One cell of the table; ``first_steps`` as in ``SamplerSettings``."""

    method: Method
    steps: int
    attribute: str
    kind: CaseKind
    first_steps: int | None = None

    def arm(self, several: bool) -> Arm:
        """The arm that its samples belong to; ``several``: the table has more than one number of steps."""
        return arm_of(self.method, self.steps, several, self.first_steps)


@dataclass(frozen=True)
class Draw:
    """Which cases are drawn for every cell."""

    n: int
    split: Split
    seed: int
    frames: int

    def cases(self, attribute: str, kind: CaseKind) -> list[Case]:
        """Those of one cell."""
        return build_cases(attribute, kind, self.n, self.split, self.seed)


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


class CellJob(Job):
    """One cell of the table as a job.

    Attributes:
        guidance: the method's spelling.
        settings: the rest of what its videos depend on: the model's loop and dtype.
    """

    labels: ClassVar[frozenset[str]] = frozenset({"label"})

    label: str
    model: str
    checkpoint: str
    detector: str
    guidance: str
    steps: int
    attribute: str
    kind: CaseKind
    draw: Draw
    version: str = __version__
    settings: dict[str, JsonValue] = Field(default_factory=dict)


def plan_cells(preset: VideoPreset, plan: Sequence[Cell], draw: Draw, dtype: str) -> list[tuple[Cell, CellJob]]:
    """A job for every cell, in the table's order.

    Args:
        dtype: of the model, such as "float32"; cells made in another are others.
    """
    checkpoint, detector = checkpoint_hash(preset), detector_hash()
    planned = []
    for cell in plan:
        sampler = stored_sampler(preset.sampler.with_first_chunk_steps(cell.first_steps))
        job = CellJob(
            label=cell.method.label, model=preset.name, checkpoint=checkpoint, detector=detector,
            guidance=cell.method.spelling, steps=cell.steps, attribute=cell.attribute, kind=cell.kind, draw=draw,
            settings={"sampler": sampler, "dtype": dtype},
        )  # fmt: skip
        planned.append((cell, job))
    return planned


class CellWorker:
    """Makes and judges the videos of a cell; its output is a sheet of a few of them, a strip of frames each."""

    def __init__(self, model: str, device: str | None, batch: int, dtype: str | None = None) -> None:
        from nasa_video.video.pipeline import VideoPipeline

        self._pipeline = VideoPipeline.from_pretrained(model, device, None if dtype is None else check_dtype(dtype))
        self._judge = SpritesJudge(device=self._pipeline.model.device)
        self._batch = batch

    def __call__(self, job: CellJob, path: Path) -> Measured:
        """Measured are the cases' ``verdicts``; the sheet shows the first of them, from the top."""
        from PIL import Image

        strips: list[Frames] = []

        def look(video: Frames) -> None:
            if len(strips) < SHOWN:
                wanted = np.linspace(0, len(video) - 1, STRIP_FRAMES).round().astype(int)
                strips.append(np.concatenate(list(video[wanted]), axis=1))

        method = Method(job.label, find_guidance(job.guidance, self._pipeline.preset))
        pipeline = with_sampler_of(job.settings, self._pipeline)
        cases = job.draw.cases(job.attribute, job.kind)
        verdicts = run_cases(pipeline, method, job.steps, cases, self._judge, job.draw.frames, self._batch, look)
        Image.fromarray(np.concatenate(strips, axis=0)).save(path)
        return {"verdicts": [dataclasses.asdict(one) for one in verdicts]}


def removal_results(preset: VideoPreset, done: Sequence[tuple[Cell, Record]], draw: Draw, folder: Path) -> Results:
    """Every case of the table as a sample; its group is the kind of case, parted by attribute."""
    several = len({(cell.steps, cell.first_steps) for cell, _ in done}) > 1
    job = done[0][1].job
    assert isinstance(job, CellJob)
    return Results(
        kind="removal",
        title=f"Removal on {preset.name}",
        settings={
            "model": preset.name,
            "title": preset.title,
            "checkpoint_sha256": job.checkpoint,
            "judge": {"judge": "sprites", "sha256": job.detector},
            "version": __version__,
            **dataclasses.asdict(draw),
            "model_settings": job.settings,
            "attributes": list(dict.fromkeys(cell.attribute for cell, _ in done)),
        },
        arms=tuple({arm.label: arm for arm in (cell.arm(several) for cell, _ in done)}.values()),
        metrics=(*METRICS, *measured_metrics(), _OUT_OF_RANGE),
        items=tuple(item for cell, record in done for item in _items(cell, record, draw, several, folder)),
        notes=(
            "removed: the detectors do not see what the negative prompt names; held: they see everything else that "
            "the prompt states; “unsure” counts as neither.",
            "One prompt and seed a sample, the same in every arm, so that arms are compared pair by pair.",
        ),
    )


def _items(cell: Cell, record: Record, draw: Draw, several: bool, folder: Path) -> Iterator[Item]:
    from PIL import Image

    cases = draw.cases(cell.attribute, cell.kind)
    shown = min(SHOWN, len(cases))
    assert record.output is not None
    with Image.open(record.output) as sheet:
        width, height = sheet.width, sheet.height // shown
    sheet_name = record.output.relative_to(folder).as_posix()
    for index, (case, one) in enumerate(zip(cases, record.measured["verdicts"], strict=True)):
        yield Item(
            id=f"{cell.kind}/{cell.attribute}/{index}",
            arm=cell.arm(several).label,
            prompt=case.prompt,
            negative=case.negative,
            seed=case.seed,
            group=f"{cell.kind}/{cell.attribute}",
            values=Verdict(**one).values,
            media=sheet_name if index < shown else None,
            crop=(0, index * height, width, (index + 1) * height) if index < shown else None,
        )


# --- any model, any judge


@dataclass(frozen=True)
class Removal:
    """A prompt, the feature that must be absent, and how to ask for it.

    Attributes:
        feature: what the negative prompt names and the judge looks for.
        present: a question that "yes" answers where the prompt is held; None where the file has none.
        absent: a question that "yes" answers where the feature is missing; None asks whether the feature is there.
        alternatives: what could be there instead, for judges that choose ("female" for "male").
    """

    prompt: str
    feature: str
    negative: str
    present: str | None = None
    absent: str | None = None
    alternatives: tuple[str, ...] = ()


def removal_prompts(path: Path) -> list[Removal]:
    """NegGenBench's format, ``[{prompt, missing_element, question_1, question_2}, …]``.

    Also understood: ``feature`` for ``missing_element``, ``negative`` where the negative prompt says it otherwise,
    ``alternatives`` for what could be there instead; the questions may be left out.

    Raises:
        InputError: it cannot be read, or an entry lacks its prompt or feature.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} must hold a JSON list of entries with prompt and missing_element")
    found = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            raise InputError(f"{path}, entry {number}, must be an object with prompt and missing_element")
        feature = entry.get("missing_element", entry.get("feature"))
        for name, value in (("prompt", entry.get("prompt")), ("missing_element", feature)):
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{path}, entry {number}, has no {name}")
        others = entry.get("alternatives", [])
        if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
            raise InputError(f"{path}, entry {number}: alternatives must be a list of texts")
        questions = entry.get("question_1"), entry.get("question_2")
        negative = str(entry.get("negative") or feature)
        found.append(Removal(entry["prompt"], str(feature), negative, *questions, tuple(others)))
    return found


def feature_removal(
    prompts: Sequence[Removal], seeds: Sequence[int], judge: str, options: JudgeOptions, source: str
) -> Benchmark:
    """How often the named feature is absent, as a judge sees it; one still or video for each of a prompt's seeds."""
    asked = {f"{index:04d}/{seed}": one for index, one in enumerate(prompts) for seed in seeds}
    samples = [Sample(name, one.prompt, one.negative, int(name.rpartition("/")[2])) for name, one in asked.items()]
    return _judged(samples, asked, judge, options, {"prompts": source, "seeds": list(seeds)})


def sprites_removal(
    kinds: Sequence[CaseKind], attributes: Sequence[str] | None, draw: Draw, judge: str, options: JudgeOptions
) -> Benchmark:
    """The sprites' own cases with another judge than the detectors."""
    samples, asked = [], {}
    for kind in kinds:
        for attribute in attributes_of(kind):
            if attributes is None or attribute in attributes:
                for index, case in enumerate(draw.cases(attribute, kind)):
                    name = f"{kind}/{attribute}/{index}"
                    samples.append(Sample(name, case.prompt, case.negative, case.seed, f"{kind}/{attribute}"))
                    asked[name] = Removal(case.prompt, case.negative, case.negative)
    settings: dict[str, JsonValue] = {"prompts": "the sprites' cases", "n": draw.n, "split": draw.split}
    return _judged(samples, asked, judge, options, {**settings, "seed": draw.seed})


def _judged(
    samples: list[Sample], asked: dict[str, Removal], judge: str, options: JudgeOptions, settings: dict[str, JsonValue]
) -> Benchmark:
    new_scorer = partial(JudgeScorer, judge, options)
    scorer = new_scorer()
    held = scorer.judge.asks_held and all(one.present for one in asked.values())

    def ask(sample: Sample) -> dict[str, JsonValue]:
        one = asked[sample.id]
        question = dataclasses.asdict(Question(one.prompt, one.feature, one.present, one.absent, one.alternatives))
        return {**question, "alternatives": list(one.alternatives)}

    def values(measured: dict[str, Any]) -> dict[str, float]:
        found = Verdict(measured["shown"] is False, measured["held"] is True, {}).values
        return found if held else {"removed": found["removed"]}

    return Benchmark(
        "removal",
        "Removal",
        samples,
        ask,
        scorer,
        new_scorer,
        METRICS if held else METRICS[:1],
        values,
        {"judge": scorer.identity, **settings},
        (
            "removed: the judge says that the unwanted feature is not there; “unsure” counts as not removed.",
            *(() if held else ("This judge (or these prompts) cannot say whether the prompt is held.",)),
            "Wilson intervals take samples as independent; several seeds of one prompt are less than that.",
        ),
    )
