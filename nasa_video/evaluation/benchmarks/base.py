"""What benchmarks of finished outputs share: samples, a scorer that looks at each output, and results.

Outputs and scores are jobs of their own, so both resume, shard and spread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, JsonValue

from nasa_video import __version__
from nasa_video.evaluation.clip import Backbone, Clip, Resize
from nasa_video.evaluation.judges import DEFAULT_OPTIONS, FRAMES_LOOKED_AT, Judge, JudgeOptions, Question, parse_judge
from nasa_video.evaluation.metrics import measured_metrics, read_stills
from nasa_video.evaluation.results import Item, Metric, Results
from nasa_video.evaluation.samples import Model, Planned, Sample
from nasa_video.files.frames import Frames
from nasa_video.jobs.processes import Shard
from nasa_video.jobs.store import Engine, Job, Measured, Outcome, Record, Store, Tell, run_jobs, write_manifest


class Scorer(Protocol):
    """Looks at finished outputs."""

    @property
    def identity(self) -> dict[str, JsonValue]:
        """Everything that its scores depend on."""
        ...

    @property
    def frames(self) -> int | None:
        """How many frames of a video it looks at; None: all."""
        ...

    def __call__(self, frames: Frames, asked: Mapping[str, Any]) -> Measured:
        """What it finds in an output (F, H, W, 3)."""
        ...


class CosineScorer:
    """Measures ``cosines`` with ``texts``, means over the frames."""

    frames: int | None = FRAMES_LOOKED_AT

    def __init__(self, backbone: Backbone, device: str | None, resize: Resize | None = None) -> None:
        self._clip = Clip(backbone, device, resize)
        self.identity = self._clip.identity

    def __call__(self, frames: Frames, asked: Mapping[str, Any]) -> Measured:
        cosines = self._clip.pictures(list(frames)) @ self._clip.texts(asked["texts"]).T
        return {"cosines": cosines.mean(dim=0).tolist()}


class JudgeScorer:
    """Asks a judge a question, for ``shown``, ``held`` and ``detail`` (see Answer)."""

    def __init__(self, judge: str | Judge, options: JudgeOptions = DEFAULT_OPTIONS) -> None:
        self.judge = parse_judge(judge, options) if isinstance(judge, str) else judge
        self.identity, self.frames = self.judge.identity, self.judge.frames

    def __call__(self, frames: Frames, asked: Mapping[str, Any]) -> Measured:
        question = Question(**{**asked, "alternatives": tuple(asked["alternatives"])})
        return dataclasses.asdict(self.judge(frames, question))


class ScoreJob(Job):
    """What a scorer is asked about an output, which is named by its file and known by its content."""

    output: str
    sha256: str
    frames: int | None
    asked: dict[str, JsonValue]
    scorer: dict[str, JsonValue] = Field(default_factory=dict)


class ScoreWorker:
    """Reads outputs and scores them."""

    def __init__(self, folder: Path, new_scorer: Callable[[], Scorer]) -> None:
        self._folder, self._scorer = folder, new_scorer()

    def __call__(self, job: ScoreJob, path: Path) -> Measured:
        return self._scorer(read_stills(self._folder / job.output, job.frames), job.asked)


@dataclass(frozen=True)
class Benchmark:
    """Samples, how they are scored, and how a score becomes values.

    Attributes:
        ask: what the scorer is asked about a sample.
        scorer: loaded; new_scorer: makes another in another process.
        values: from what was measured of a sample, to values by metric.
        settings: what goes into the results beside model and methods.
    """

    kind: str
    title: str
    samples: list[Sample]
    ask: Callable[[Sample], Mapping[str, JsonValue]]
    scorer: Scorer
    new_scorer: Callable[[], Scorer]
    metrics: tuple[Metric, ...]
    values: Callable[[Measured], dict[str, float]]
    settings: dict[str, JsonValue] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def score_job(self, planned: Planned, record: Record) -> ScoreJob:
        """The job that scores a finished output."""
        assert record.output is not None
        return ScoreJob(
            output=record.output.name, sha256=str(record.sha256), frames=self.scorer.frames,
            asked=dict(self.ask(planned.sample)), scorer=self.scorer.identity,
        )  # fmt: skip

    def results(self, done: Measurements, plan: Sequence[Planned], settings: Mapping[str, JsonValue]) -> Results:
        """The results of a run that is complete."""
        items = [
            item_of(one, output, self.values(scored.measured), f"outputs/{output.output.name}")
            for one, output, scored in done.rows
            if output.output is not None
        ]
        return Results(
            kind=self.kind,
            title=f"{self.title} on {plan[0].job.request.model}",
            settings={**recorded(plan), **self.settings, **settings},
            arms=tuple({one.arm.label: one.arm for one in plan}.values()),
            metrics=(*self.metrics, *measured_metrics()),
            items=tuple(items),
            notes=self.notes,
        )


def item_of(planned: Planned, record: Record, values: Mapping[str, float], media: str) -> Item:
    """A sample of the results, with the measures of its output beside its values."""
    sample = planned.sample
    return Item(
        id=sample.id, arm=planned.arm.label, prompt=sample.prompt, negative=sample.negative, seed=sample.seed,
        group=sample.group, values={**values, **record.measured.get("quality", {})}, media=media,
    )  # fmt: skip


def recorded(plan: Sequence[Planned]) -> dict[str, JsonValue]:
    """The settings of a plan that a reader needs to make it again."""
    job = plan[0].job
    request = job.request
    return {
        "model": request.model, "checkpoint_sha256": job.checkpoint, "version": __version__, "frames": request.frames,
        "width": request.width, "height": request.height, "model_settings": job.settings,
    }  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Where and how a benchmark runs.

    Attributes:
        folder: gets ``manifest.jsonl``, the outputs and their scores.
        tell: given a name such as "make", what to call with each record.
    """

    folder: Path
    shard: Shard = field(default_factory=Shard)
    engine: Engine = "local"
    tell: Callable[[str], Tell] | None = None

    def jobs(self, name: str, jobs: Sequence[Job], store: Store, new_worker: Callable[[], Any]) -> Outcome:
        """Do this shard's part of the jobs and look for all."""
        tell = self.tell and self.tell(name)
        return run_jobs(jobs, store, new_worker, shard=self.shard, engine=self.engine, tell=tell)


@dataclass(frozen=True)
class Measurements:
    """What a run came to.

    Attributes:
        rows: planned samples with the records of their output and of its score.
        missing: how many samples are left to other shards.
    """

    rows: list[tuple[Planned, Record, Record]]
    missing: int
    generation: Outcome
    measurement: Outcome


def make_and_measure(plan: Sequence[Planned], model: Model, benchmark: Benchmark, run: Run) -> Measurements:
    """Make what is not there, score what is not scored, in this shard; then look for everything."""
    outputs, scores = Store(run.folder / "outputs", model.suffix), Store(run.folder / "scores")
    write_manifest(run.folder / "manifest.jsonl", {one.job.id: one.job for one in plan}.values())
    made = run.jobs("make", [one.job for one in plan], outputs, model.new_worker)
    records = {record.job.id: record for record in made.records}
    there = [(one, records[one.job.id]) for one in plan if one.job.id in records]
    own = {job.id for job in run.shard.of(list({one.job.id: one.job for one in plan}.values()))}
    jobs = {(one.arm.label, one.sample.id): benchmark.score_job(one, record) for one, record in there}
    mine = [jobs[one.arm.label, one.sample.id] for one, record in there if record.job.id in own]
    # Here the scorer that is loaded already is used; elsewhere each process loads its own.
    new_scorer = benchmark.new_scorer if run.engine == "ray" else lambda: benchmark.scorer
    worker = partial(ScoreWorker, outputs.folder, new_scorer)
    scored = dataclasses.replace(run, shard=Shard()).jobs("measure", mine, scores, worker)
    found = {record.job.id: record for record in scored.records}
    rows = []
    for one, record in there:
        job = jobs[one.arm.label, one.sample.id]
        result = found.get(job.id) or scores.find(job)
        if result is not None:
            rows.append((one, record, result))
    return Measurements(rows, len(plan) - len(rows), made, scored)
