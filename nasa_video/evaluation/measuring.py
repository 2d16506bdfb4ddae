"""Jobs that measure finished outputs: cosines with CLIP, answers of a judge. They resume and shard as all jobs do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue

from nasa_video.evaluation.clip import Backbone, Clip, Resize
from nasa_video.evaluation.judges import FRAMES_LOOKED_AT, Judge, Question, parse_judge
from nasa_video.evaluation.sampling import Planned, pictures_of
from nasa_video.jobs.processes import Shard
from nasa_video.jobs.store import Engine, Job, Measured, Outcome, Record, Store, Tell, Worker, run_jobs, write_manifest


class CosineJob(Job):
    """Cosines of an output with texts.

    Attributes:
        output, sha256: the file, by its name in its store and its content.
        scorer: identity of the CLIP model.
    """

    output: str
    sha256: str
    texts: tuple[str, ...]
    frames: int | None
    scorer: dict[str, JsonValue] = Field(default_factory=dict)


class JudgeJob(Job):
    """A judge's answer about an output; see CosineJob and Question."""

    output: str
    sha256: str
    question: dict[str, JsonValue]
    frames: int | None
    judge: dict[str, JsonValue] = Field(default_factory=dict)


class CosineWorker:
    """Measures ``cosines``, one for each text."""

    def __init__(self, folder: Path, clip: Clip) -> None:
        self._folder = folder
        self._clip = clip

    @classmethod
    def load(cls, folder: Path, backbone: Backbone, device: str | None, resize: Resize | None) -> CosineWorker:
        """With a model of its own, in another process."""
        return cls(folder, Clip(backbone, device, resize))

    def __call__(self, job: CosineJob, path: Path) -> Measured:
        frames = pictures_of(self._folder / job.output, job.frames)
        cosines = self._clip.pictures(list(frames)) @ self._clip.texts(job.texts).T
        return {"cosines": cosines.mean(dim=0).tolist()}


class JudgeWorker:
    """Asks for ``shown``, ``held`` and ``detail`` (see Answer)."""

    def __init__(self, folder: Path, judge: Judge) -> None:
        self._folder = folder
        self._judge = judge

    @classmethod
    def load(cls, folder: Path, judge: str, device: str | None) -> JudgeWorker:
        """With a judge of its own, in another process."""
        return cls(folder, parse_judge(judge, device))

    def __call__(self, job: JudgeJob, path: Path) -> Measured:
        stored: dict[str, Any] = dict(job.question)
        question = Question(**stored | {"alternatives": tuple(stored["alternatives"])})
        return dataclasses.asdict(self._judge(pictures_of(self._folder / job.output, job.frames), question))


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One way of measuring: which job an output gets, and who does it.

    Attributes:
        folder: of the records, inside the evaluation's.
        job: of a planned sample and its finished output.
        new_worker: makes the worker, given the folder of the outputs and the engine: here it uses the model that is
            loaded already, elsewhere it loads its own.
    """

    folder: str
    job: Callable[[Planned, Record], Job]
    new_worker: Callable[[Path, Engine], Callable[[], Worker]]


def cosines(
    clip: Clip, backbone: Backbone, device: str | None, resize: Resize | None, texts: Callable[[Planned], Sequence[str]]
) -> Measurement:
    """Cosines with the texts of each sample."""

    def job(planned: Planned, record: Record) -> Job:
        return CosineJob(texts=tuple(texts(planned)), scorer=clip.identity, **_output(record))

    def new_worker(folder: Path, engine: Engine) -> Callable[[], Worker]:
        if engine == "local":
            return partial(CosineWorker, folder, clip)
        return partial(CosineWorker.load, folder, backbone, device, resize)

    return Measurement("scores", job, new_worker)


def answers(judge: Judge, text: str, device: str | None, question: Callable[[Planned], Question]) -> Measurement:
    """Answers of the judge that ``text`` names, to the question of each sample."""

    def job(planned: Planned, record: Record) -> Job:
        asked = dataclasses.asdict(question(planned))
        asked["alternatives"] = list(asked["alternatives"])
        return JudgeJob(question=asked, judge=judge.identity, **_output(record, judge.frames))

    def new_worker(folder: Path, engine: Engine) -> Callable[[], Worker]:
        if engine == "local":
            return partial(JudgeWorker, folder, judge)
        return partial(JudgeWorker.load, folder, text, device)

    return Measurement("answers", job, new_worker)


@dataclasses.dataclass(frozen=True)
class Measurements:
    """What a run came to.

    Attributes:
        rows: planned samples with the records of their output and of its measurement.
        missing: how many samples are left to other shards.
        generation, measurement: the two outcomes.
    """

    rows: list[tuple[Planned, Record, Record]]
    missing: int
    generation: Outcome
    measurement: Outcome


def make_and_measure(
    plan: Sequence[Planned],
    suffix: str,
    new_worker: Callable[[], Worker],
    measurement: Measurement,
    folder: Path,
    *,
    shard: Shard | None = None,
    engine: Engine = "local",
    tell: Callable[[str], Tell] | None = None,
) -> Measurements:
    """Make what is not there, measure what is not measured, in this shard; then look for everything.

    Args:
        folder: gets ``manifest.jsonl``, ``outputs/`` and the measurement's folder.
        tell: given "make" or "measure", what to call with each record.
    """
    shard = shard or Shard()
    outputs = Store(folder / "outputs", suffix)
    write_manifest(folder / "manifest.jsonl", {one.job.id: one.job for one in plan}.values())
    made = run_jobs(
        [one.job for one in plan], outputs, new_worker, shard=shard, engine=engine, tell=tell and tell("make")
    )
    records = {record.job.id: record for record in made.records}
    there = [(one, records[one.job.id]) for one in plan if one.job.id in records]
    own = {job.id for job in shard.of(_unique(one.job for one in plan))}
    jobs = {(one.arm.label, one.sample.id): measurement.job(one, record) for one, record in there}
    mine = [jobs[one.arm.label, one.sample.id] for one, record in there if record.job.id in own]
    store = Store(folder / measurement.folder)
    measured = run_jobs(
        mine, store, measurement.new_worker(outputs.folder, engine), engine=engine, tell=tell and tell("measure")
    )
    found = {record.job.id: record for record in measured.records}
    rows = []
    for one, record in there:
        job = jobs[one.arm.label, one.sample.id]
        result = found.get(job.id) or store.find(job)
        if result is not None:
            rows.append((one, record, result))
    return Measurements(rows, len(plan) - len(rows), made, measured)


def _output(record: Record, frames: int | None = FRAMES_LOOKED_AT) -> dict[str, Any]:
    assert record.output is not None
    return {"output": record.output.name, "sha256": record.sha256, "frames": frames}


def _unique(jobs: Iterable[Job]) -> list[Job]:
    return list({job.id: job for job in jobs}.values())
