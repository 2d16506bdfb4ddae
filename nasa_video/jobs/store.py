"""Jobs of an evaluation: what is to be made, where it goes, and what of it is already there.

    jobs = [GenerationJob(prompt="a ball", seed=0, method="none", model="sprites", ...), ...]
    store = Store(folder / "videos", ".mp4")
    outcome = run_jobs(jobs, store, partial(VideoWorker, "sprites"), shard=Shard.choose(None))
    if not outcome.missing: table_of(outcome.records)

A job's id is a digest of everything that its output depends on, so an output is never one of other settings, and
whoever runs the same jobs into the same folder (a second try, another shard, another machine) finds what is finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from pydantic import Field, JsonValue

from nasa_video.errors import InputError, OutputError
from nasa_video.files.atomic import commit, explained, file_sha256, is_whole, process_name, remove_orphans, write_text
from nasa_video.jobs.processes import Shard
from nasa_video.models.presets import Strict
from nasa_video.video.request import VideoRequest

Engine = Literal["local", "ray"]
ENGINES: tuple[Engine, ...] = ("local", "ray")
Measured = dict[str, Any]
"""What a worker measured while it made an output: JSON values by name."""
_WORK_FOLDER = ".work"


class Job(Strict):
    """One piece of work; subclasses add what its output depends on.

    Fields in ``labels`` name a job for people and are no part of its id.
    """

    labels: ClassVar[frozenset[str]] = frozenset()

    @property
    def id(self) -> str:
        """20 hex digits of SHA-256 over the kind of job and its fields, the same on every machine.

        Fields that are None do not count: a field that a later version adds leaves finished work as it is.
        """
        content = [type(self).__name__, self.model_dump(mode="json", exclude=set(self.labels), exclude_none=True)]
        text = json.dumps(content, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


class GenerationJob(Job):
    """A video or still to make.

    Attributes:
        request: what the model is given, everything of it said.
        short: the prompt as its benchmark has it, where the model is given an extended one.
        label: the method as people wrote it, such as "nasa:0.8"; "none" is unguided.
        checkpoint: SHA-256 over the model's files (``assets.checkpoint_hash``).
        settings: the rest of what matters: the model's loop, dtype, frames a second, encoding.
        tags: for tables, such as a style or dimension; no part of the id.
    """

    labels: ClassVar[frozenset[str]] = frozenset({"label", "tags"})

    request: VideoRequest
    checkpoint: str
    short: str | None = None
    label: str = "none"
    settings: dict[str, JsonValue] = Field(default_factory=dict)
    tags: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """As the benchmark has it."""
        return self.short or self.request.prompt or ""


@dataclass(frozen=True)
class Record:
    """A finished job.

    Attributes:
        job: what was done.
        measured: what the worker returned.
        output: its file; None for a job that only measures.
        sha256: of the file.
    """

    job: Job
    measured: Measured
    output: Path | None = None
    sha256: str | None = None


class Worker(Protocol):
    """Does jobs of one kind; made once a process, since it holds the model."""

    def __call__(self, job: Any, path: Path) -> Measured:
        """Make the job's output at ``path`` (a scratch name with the store's suffix) and return what was measured.

        In a store without a suffix nothing is to be written at ``path``.
        """
        ...


class Store:
    """A folder of outputs ``ID.suffix`` with their records ``ID.json``.

    The record is written last and holds the output's size and SHA-256: a job is finished where its record can be read,
    is of this very job, holds numbers, and the output is what it says. Every file is written under a scratch name,
    flushed to the disk, and renamed, so a kill at any moment leaves a finished job or none. Several processes may use
    one folder.

    Args:
        folder: made when it is missing.
        suffix: such as ".mp4"; None for jobs that leave only their record.

    Raises:
        OutputError: the folder cannot be made.
    """

    def __init__(self, folder: Path, suffix: str | None = None) -> None:
        self.folder = folder
        self.suffix = suffix
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {folder}: {error.strerror}; choose another") from error

    def output(self, job: Job) -> Path | None:
        """Where a job's file is or will be."""
        return None if self.suffix is None else self.folder / f"{job.id}{self.suffix}"

    def record_path(self, job: Job) -> Path:
        """Where its record is or will be."""
        return self.folder / f"{job.id}.json"

    def find(self, job: Job) -> Record | None:
        """The job's record if it is finished and whole, else None."""
        try:
            stored = json.loads(self.record_path(job).read_text(encoding="utf-8"))
            same = stored["id"] == job.id
            record = Record(job, dict(stored["measured"]), self.output(job), stored["sha256"])
            size = stored["bytes"]
            json.dumps(record.measured, allow_nan=False)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not same or (record.output is not None and not is_whole(record.output, size, record.sha256)):
            return None
        return record

    def damaged(self, job: Job) -> bool:
        """Whether something of the job is there that cannot be used: an output without its record, cut, or changed."""
        output = self.output(job)
        there = self.record_path(job).exists() or (output is not None and output.exists())
        return there and self.find(job) is None

    def make(self, job: Job, worker: Worker) -> Record:
        """Do the job, whatever is there, and keep its output and record.

        Raises:
            OutputError: the worker left no file, or it cannot be kept (a full disk).
        """
        output = self.output(job)
        digest, size = None, 0
        with self.scratch() as folder:
            made = folder / f"{job.id}{self.suffix or ''}"
            measured = worker(job, made)
            if output is not None:
                if not made.is_file() or not made.stat().st_size:
                    raise OutputError(f"the job {job.id} left no file; this is a fault of {type(worker).__name__}")
                digest, size = file_sha256(made), made.stat().st_size
                commit(made, output)
            entry = {"id": job.id, "job": job.model_dump(mode="json"), "sha256": digest, "bytes": size}
            try:
                text = json.dumps(entry | {"measured": measured}, indent=1, sort_keys=True, allow_nan=False)
            except ValueError as error:
                raise OutputError(f"the job {job.id} measured what is no number: {measured!r:.300}") from error
            with explained(self.record_path(job)):
                (folder / "record").write_text(text, encoding="utf-8")
            commit(folder / "record", self.record_path(job))
        return Record(job, json.loads(text)["measured"], output, digest)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A fresh folder beside the outputs, gone afterwards; what killed processes of this machine left goes too."""
        root = self.folder / _WORK_FOLDER
        remove_orphans(root)
        folder = root / process_name()
        with explained(folder):
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                root.rmdir()


@dataclass
class Outcome:
    """What a run of jobs came to.

    Attributes:
        records: of every job that is finished, in the order of the jobs, other shards' ones included.
        missing: the jobs that are not (left to other shards).
        found, made, remade: how many of this shard's jobs were there, are new, and were there damaged.
    """

    records: list[Record] = field(default_factory=list)
    missing: list[Job] = field(default_factory=list)
    found: int = 0
    made: int = 0
    remade: int = 0

    @property
    def complete(self) -> bool:
        """Whether every job is finished, so that a table can be made."""
        return not self.missing


Tell = Callable[[Record, bool], None]
"""Called with each record of the shard, and whether it was made just now."""


def run_jobs(
    jobs: Sequence[Job],
    store: Store,
    new_worker: Callable[[], Worker],
    *,
    shard: Shard | None = None,
    engine: Engine = "local",
    tell: Tell | None = None,
) -> Outcome:
    """Do what is not finished of a shard's jobs, then look for all of them.

    Args:
        new_worker: makes the worker; called only when there is work, once a process. For Ray it must be picklable: a
            class, a top-level function, or ``functools.partial`` of one.
        engine: "local" does one job after the other here; "ray" spreads them over a cluster's devices.

    Raises:
        InputError, OutputError: what a worker raises, with the job named. Finished jobs stay; the next run goes on.
        InputError: an unknown engine, or Ray is not installed.
    """
    if engine not in ENGINES:
        raise InputError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    unique = list({job.id: job for job in jobs}.values())
    outcome = Outcome()
    known: dict[str, Record] = {}
    todo: list[Job] = []
    for job in (shard or Shard()).of(unique):
        record = store.find(job)
        if record is None:
            outcome.remade += store.damaged(job)
            todo.append(job)
        else:
            known[job.id] = record
            outcome.found += 1
            if tell is not None:
                tell(record, False)
    for record in _do(todo, store, new_worker, engine):
        known[record.job.id] = record
        outcome.made += 1
        if tell is not None:
            tell(record, True)
    _look_for(jobs, store, known, outcome)
    return outcome


def _look_for(jobs: Sequence[Job], store: Store, known: Mapping[str, Record], outcome: Outcome) -> None:
    """Fill in the records of all jobs; labels are those of the jobs asked for now, not of whoever made them."""
    for job in jobs:
        record = known.get(job.id) or store.find(job)
        if record is None:
            outcome.missing.append(job)
        else:
            outcome.records.append(Record(job, record.measured, record.output, record.sha256))


def _do(jobs: list[Job], store: Store, new_worker: Callable[[], Worker], engine: Engine) -> Iterator[Record]:
    if not jobs:
        return
    if engine == "ray":
        from nasa_video.jobs.ray_engine import run_on_ray

        yield from run_on_ray(jobs, store, new_worker)
        return
    worker = new_worker()
    for job in jobs:
        with named(job):
            record = store.make(job, worker)
        yield record


@contextlib.contextmanager
def named(job: Job) -> Iterator[None]:
    """Say which job an error came from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in job {job.id}: {json.dumps(job.model_dump(mode='json'))[:400]}")
        raise


def write_manifest(path: Path, jobs: Iterable[Job]) -> None:
    """Write the jobs as JSON lines with their ids, atomically; every shard writes the same file.

    Raises:
        OutputError: it cannot be written.
    """
    lines = (json.dumps({"id": job.id, **job.model_dump(mode="json")}, sort_keys=True) for job in jobs)
    write_text(path, "".join(f"{line}\n" for line in lines))
