"""Scores of videos by VBench and VBench-Long: asked for in its own environment, kept by video, regrouped by us."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, JsonValue

from nasa_video.errors import NasaVideoError
from nasa_video.evaluation.benchmarks.vbench import runner
from nasa_video.evaluation.benchmarks.vbench.environment import Environment
from nasa_video.evaluation.benchmarks.vbench.weights import CACHE_VARIABLE, fingerprints, missing_weights
from nasa_video.jobs.processes import TORCHRUN
from nasa_video.jobs.store import GenerationJob, Job, Measured, Record, Store, Tell

Mode = Literal["standard", "long"]
# Enough that loading a judge's weights does not count, few enough that a kill loses minutes.
BATCH = 32


class DimensionJob(Job):
    """One dimension of one video.

    Attributes:
        video: SHA-256 of its file, so that a video that was made again is scored again.
        dimensions: all of the prompt's own; the length of VBench-Long's clips depends on them.
        auxiliary: what VBench's judge of this prompt is told.
        weights: SHA-256 of the judge's files by path.
    """

    video: str
    prompt: str
    dimension: str
    mode: Mode
    dimensions: tuple[str, ...]
    auxiliary: dict[str, JsonValue]
    vbench: str
    device: str
    weights: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Scoring:
    """How videos are scored.

    Attributes:
        device: of the judges, cpu or cuda.
        cache: folder of VBench's weights.
        batch: videos a subprocess.
    """

    environment: Environment
    mode: Mode
    dimensions: tuple[str, ...]
    device: str
    cache: Path
    batch: int = BATCH

    @cached_property
    def skipped(self) -> dict[str, str]:
        """Dimensions that cannot be scored here, with the files that are missing."""
        missing = missing_weights(self.dimensions, self.cache)
        return {name: "; ".join(one.describe() for one in weights) for name, weights in missing.items()}

    @cached_property
    def weights(self) -> dict[str, dict[str, str]]:
        """SHA-256 of the files of every other dimension."""
        return {name: fingerprints(name, self.cache) for name in self.dimensions if name not in self.skipped}

    def jobs(self, record: Record) -> list[DimensionJob]:
        """A video's jobs: those of the dimensions that are its prompt's."""
        job = cast(GenerationJob, record.job)
        own = cast("list[str]", job.tags["dimensions"])
        return [
            DimensionJob(
                video=str(record.sha256), prompt=job.prompt, dimension=name, mode=self.mode, dimensions=tuple(own),
                auxiliary=cast("dict[str, JsonValue]", job.tags.get("auxiliary") or {}),
                vbench=self.environment.version, device=self.device, weights=weights,
            )
            for name, weights in self.weights.items()
            if name in own
        ]  # fmt: skip


@dataclass
class Scores:
    """What became of the scoring.

    Attributes:
        values: dimension to score (0..1, None where VBench gave none), by video's SHA-256 and prompt.
        failed: dimensions at which VBench failed, with its reason.
        missing: number of scores that are left to other shards.
        versions: of VBench and what it stands on; several where shards had different ones.
    """

    values: dict[tuple[str, str], dict[str, float | None]] = field(default_factory=lambda: defaultdict(dict))
    failed: dict[str, str] = field(default_factory=dict)
    missing: int = 0
    versions: dict[str, list[str]] = field(default_factory=dict)

    def add(self, job: DimensionJob, measured: Measured) -> None:
        """Take in a score that was found."""
        self.values[job.video, job.prompt][job.dimension] = measured["score"]
        for name, version in measured["versions"].items():
            known = self.versions.setdefault(name, [])
            if version not in known:
                known.append(version)


def score_videos(
    records: Sequence[Record],
    scoring: Scoring,
    store: Store,
    mine: Sequence[Record] | None = None,
    tell: Tell | None = None,
) -> Scores:
    """Score what is not scored yet, and gather all scores.

    Args:
        records: finished videos.
        store: of scores; a store without a suffix.
        mine: those to score now (one shard's); all by default.

    Raises:
        NasaVideoError: VBench's process broke down. Scores that came before that are kept.
    """
    scores = Scores()
    # Videos by the dimensions that they lack; two equal videos of one prompt are scored once.
    groups: dict[tuple[str, ...], dict[tuple[str, str], Record]] = defaultdict(dict)
    for record in records if mine is None else mine:
        lacking = tuple(job.dimension for job in scoring.jobs(record) if store.find(job) is None)
        if lacking:
            groups[lacking].setdefault((str(record.sha256), cast(GenerationJob, record.job).prompt), record)
    for dimensions, videos in groups.items():
        several = list(videos.values())
        for start in range(0, len(several), scoring.batch):
            left = [name for name in dimensions if name not in scores.failed]
            if left:
                _score_batch(left, several[start : start + scoring.batch], scoring, store, scores, tell)
    for record in records:
        for job in scoring.jobs(record):
            found = store.find(job)
            if found is not None:
                scores.add(job, found.measured)
            elif job.dimension not in scores.failed:
                scores.missing += 1
    return scores


def _score_batch(
    dimensions: list[str], records: list[Record], scoring: Scoring, store: Store, scores: Scores, tell: Tell | None
) -> None:
    """Score one batch in a subprocess; each score is kept as it comes."""
    jobs = {(str(key), job.dimension): job for key, record in enumerate(records) for job in scoring.jobs(record)}
    versions: dict[str, str] = {}
    # A fresh folder: VBench-Long takes clips that it finds for granted.
    with store.scratch() as work:
        for entry in ask(_request(dimensions, records, scoring, work), scoring):
            if entry["kind"] == "versions":
                versions = {name: str(value) for name, value in entry.items() if name != "kind"}
            elif entry["kind"] == "failed":
                scores.failed[entry["dimension"]] = entry["reason"]
            elif entry["kind"] == "score":
                measured = {"score": entry["score"], "clips": entry["clips"], "versions": versions}
                record = store.make(jobs[entry["key"], entry["dimension"]], lambda *_, found=measured: found)
                if tell is not None:
                    tell(record, True)


def _request(dimensions: list[str], records: list[Record], scoring: Scoring, work: Path) -> dict[str, Any]:
    videos = []
    for number, record in enumerate(records):
        job = cast(GenerationJob, record.job)
        assert record.output is not None
        videos.append(
            {
                "key": str(number), "path": str(record.output.absolute()), "prompt": job.prompt,
                "dimensions": job.tags["dimensions"], "auxiliary": job.tags.get("auxiliary") or None,
            }
        )  # fmt: skip
    return {
        "mode": scoring.mode, "device": scoring.device, "work": str(work.absolute()), "dimensions": dimensions,
        "videos": videos,
    }  # fmt: skip


def ask(request: dict[str, Any], scoring: Scoring) -> Iterator[dict[str, Any]]:
    """Run our script in VBench's environment and yield its answer as it comes.

    Raises:
        NasaVideoError: the process ended before its answer did; the message has its last lines.
    """
    # -I: the script's own folder must not be searched, it has names that VBench's modules have too.
    command = [str(scoring.environment.python), "-I", str(Path(runner.__file__))]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=_environment(scoring)
        )
        assert process.stdin is not None
        assert process.stdout is not None
        ended = False
        try:
            with process.stdin as pipe:
                json.dump(request, pipe)
            for entry in runner.read_answer(process.stdout):
                ended = entry["kind"] == "end"
                yield entry
            status = process.wait()
        except BrokenPipeError:
            status = process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stdout.close()
        if status or not ended:
            log.seek(0)
            last = " | ".join(log.read().strip().splitlines()[-4:])
            raise NasaVideoError(
                f"VBench's process ended with status {status} before its answer was complete; scores so far are kept, "
                f"run the command again to go on. Its last lines: {last or 'none'}"
            )


def _environment(scoring: Scoring) -> dict[str, str]:
    """Nothing is downloaded behind our back: weights were looked for before, and the hub stays offline."""
    # VBench's own scoring in parallel would wait for ranks that do not exist.
    left_out = ("PYTHON", "VIRTUAL_ENV", *TORCHRUN)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    cache = scoring.cache.absolute()
    return kept | {
        CACHE_VARIABLE: str(cache),
        "TORCH_HOME": str(cache / "torch"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
