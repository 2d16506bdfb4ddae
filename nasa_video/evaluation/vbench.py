"""Scores of videos by VBench and VBench-Long: asked for in its own environment, kept by video, regrouped by us."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, JsonValue

from nasa_video.errors import NasaVideoError
from nasa_video.evaluation import vbench_runner
from nasa_video.evaluation.removal import Method
from nasa_video.evaluation.results import Arm, Item, Metric, Results
from nasa_video.evaluation.vbench_runner import read_answer
from nasa_video.evaluation.vbench_setup import Environment
from nasa_video.evaluation.vbench_weights import CACHE_VARIABLE, fingerprints, missing_weights
from nasa_video.jobs.processes import TORCHRUN
from nasa_video.jobs.store import GenerationJob, Job, Measured, Record, Store

Mode = Literal["standard", "long"]
# Enough that loading a judge's weights does not count, few enough that a kill loses minutes.
BATCH = 32


class ScoreJob(Job):
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


@dataclass
class Scores:
    """What became of the scoring.

    Attributes:
        values: dimension to score (0..1, None where VBench gave none), by video's SHA-256 and prompt.
        skipped: dimensions whose weights are missing, with what is missing.
        failed: dimensions at which VBench failed, with its reason.
        missing: number of scores that are left to other shards.
        versions: of VBench and what it stands on; several where shards had different ones.
    """

    values: dict[tuple[str, str], dict[str, float | None]] = field(default_factory=lambda: defaultdict(dict))
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    missing: int = 0
    versions: dict[str, list[str]] = field(default_factory=dict)

    def add(self, job: ScoreJob, measured: Measured) -> None:
        """Take in a score that was found."""
        self.values[job.video, job.prompt][job.dimension] = measured["score"]
        for name, version in measured["versions"].items():
            known = self.versions.setdefault(name, [])
            if version not in known:
                known.append(version)


Told = Callable[[ScoreJob, float | None], None]


def skipped_dimensions(scoring: Scoring) -> dict[str, str]:
    """Dimensions that cannot be scored here, with the files that are missing."""
    missing = missing_weights(scoring.dimensions, scoring.cache)
    return {name: "; ".join(one.describe() for one in weights) for name, weights in missing.items()}


def score_videos(
    records: Sequence[Record],
    scoring: Scoring,
    store: Store,
    mine: Sequence[Record] | None = None,
    tell: Told | None = None,
) -> Scores:
    """Score what is not scored yet, and gather all scores.

    Args:
        records: finished videos.
        store: of scores; a store without a suffix.
        mine: those to score now (one shard's); all by default.

    Raises:
        NasaVideoError: VBench's process broke down. Scores that came before that are kept.
    """
    scores = Scores(skipped=skipped_dimensions(scoring))
    dimensions = [name for name in scoring.dimensions if name not in scores.skipped]
    weights = {name: fingerprints(name, scoring.cache) for name in dimensions}
    for dims, videos in _open_work(records if mine is None else mine, scoring, store, dimensions, weights):
        for batch in _batches(videos, scoring.batch):
            left = [name for name in dims if name not in scores.failed]
            if left:
                _score_batch(left, batch, scoring, store, weights, scores, tell)
    for record in records:
        for job in score_jobs(record, scoring, dimensions, weights):
            found = store.find(job)
            if found is not None:
                scores.add(job, found.measured)
            elif job.dimension not in scores.failed:
                scores.missing += 1
    return scores


def score_jobs(
    record: Record, scoring: Scoring, dimensions: Iterable[str], weights: Mapping[str, dict[str, str]]
) -> Iterator[ScoreJob]:
    """A video's jobs: those of the dimensions that are its prompt's."""
    job = cast(GenerationJob, record.job)
    own = cast("list[str]", job.tags["dimensions"])
    for dimension in dimensions:
        if dimension in own:
            yield ScoreJob(
                video=str(record.sha256),
                prompt=job.prompt,
                dimension=dimension,
                mode=scoring.mode,
                dimensions=tuple(own),
                auxiliary=cast("dict[str, JsonValue]", job.tags.get("auxiliary") or {}),
                vbench=scoring.environment.version,
                device=scoring.device,
                weights=weights[dimension],
            )


def _open_work(
    records: Iterable[Record],
    scoring: Scoring,
    store: Store,
    dimensions: Sequence[str],
    weights: Mapping[str, dict[str, str]],
) -> Iterator[tuple[tuple[str, ...], list[Record]]]:
    """Videos grouped by the dimensions that they lack; two equal videos of one prompt are scored once."""
    groups: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    seen = set()
    for record in records:
        jobs = list(score_jobs(record, scoring, dimensions, weights))
        lacking = tuple(job.dimension for job in jobs if store.find(job) is None)
        key = (record.sha256, cast(GenerationJob, record.job).prompt)
        if lacking and key not in seen:
            seen.add(key)
            groups[lacking].append(record)
    yield from groups.items()


def _batches(records: list[Record], size: int) -> Iterator[list[Record]]:
    for start in range(0, len(records), size):
        yield records[start : start + size]


def _score_batch(
    dimensions: list[str],
    records: list[Record],
    scoring: Scoring,
    store: Store,
    weights: Mapping[str, dict[str, str]],
    scores: Scores,
    tell: Told | None,
) -> None:
    """Score one batch in a subprocess; each score is kept as it comes."""
    jobs = {
        (str(number), job.dimension): job
        for number, record in enumerate(records)
        for job in score_jobs(record, scoring, dimensions, weights)
    }
    # A fresh folder: VBench-Long takes clips that it finds for granted.
    versions: dict[str, str] = {}
    with store.scratch() as work:
        for entry in ask(_request(dimensions, records, scoring, work), scoring):
            if entry["kind"] == "versions":
                versions = {name: str(value) for name, value in entry.items() if name != "kind"}
            elif entry["kind"] == "failed":
                scores.failed[entry["dimension"]] = entry["reason"]
            elif entry["kind"] == "score":
                job = jobs[entry["key"], entry["dimension"]]
                store.make(job, _Keep({"score": entry["score"], "clips": entry["clips"], "versions": versions}))
                if tell is not None:
                    tell(job, entry["score"])


class _Keep:
    """A worker whose work is done already."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured

    def __call__(self, job: Any, path: Path) -> Measured:
        return self._measured


def _request(dimensions: list[str], records: list[Record], scoring: Scoring, work: Path) -> dict[str, Any]:
    videos = []
    for number, record in enumerate(records):
        job = cast(GenerationJob, record.job)
        assert record.output is not None
        videos.append(
            {
                "key": str(number),
                "path": str(record.output.absolute()),
                "prompt": job.prompt,
                "dimensions": job.tags["dimensions"],
                "auxiliary": job.tags.get("auxiliary") or None,
            }
        )
    return {
        "mode": scoring.mode,
        "device": scoring.device,
        "work": str(work.absolute()),
        "dimensions": dimensions,
        "videos": videos,
    }


def ask(request: dict[str, Any], scoring: Scoring) -> Iterator[dict[str, Any]]:
    """Run our script in VBench's environment and yield its answer as it comes.

    Raises:
        NasaVideoError: the process ended before its answer did; the message has its last lines.
    """
    # -I: the script's own folder must not be searched, it has names that VBench's modules have too.
    command = [str(scoring.environment.python), "-I", str(Path(vbench_runner.__file__))]
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
            for entry in read_answer(process.stdout):
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
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    # VBench's own scoring in parallel would wait for ranks that do not exist.
    for name in TORCHRUN:
        kept.pop(name, None)
    cache = scoring.cache.absolute()
    return kept | {
        CACHE_VARIABLE: str(cache),
        "TORCH_HOME": str(cache / "torch"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }


_LUMA = Metric(name="luma", title="mean luma", better="neither", digits=1)
_BESIDE = (
    Metric(name="sharpness", title="sharpness", better="neither", digits=3),
    Metric(name="flicker", title="flicker, grey levels", better="lower"),
    Metric(name="out_of_range", title="out of range", better="lower", digits=4),
)


def results_of(
    records: Sequence[Record],
    scores: Scores,
    scoring: Scoring,
    methods: Sequence[Method],
    settings: Mapping[str, JsonValue],
    folder: Path,
    notes: Sequence[str] = (),
) -> Results:
    """Everything measured, by video; a score that is missing is not there, and never a zero.

    Args:
        folder: of the results, which media are relative to.
    """
    items = [_item(record, scores, folder) for record in records]
    have = {name for item in items for name in item.values}
    measures = [
        Metric(name=name, title=name.replace("_", " "), digits=4) for name in scoring.dimensions if name in have
    ]
    without = {name: sum(values.get(name, 0.0) is None for values in scores.values.values()) for name in have}
    return Results(
        kind="vbench",
        title="VBench-Long" if scoring.mode == "long" else "VBench",
        settings={
            **settings,
            "mode": scoring.mode,
            "dimensions": list(scoring.dimensions),
            "vbench": scoring.environment.version,
            "vbench_environment": {name: ", ".join(several) for name, several in scores.versions.items()},
            "judges_on": scoring.device,
            "judges_weights": {
                name: cast("dict[str, JsonValue]", fingerprints(name, scoring.cache))
                for name in scoring.dimensions
                if name not in scores.skipped
            },
            "skipped": dict(scores.skipped),
            "failed": dict(scores.failed),
        },
        arms=_arms(records, methods),
        metrics=(*measures, _LUMA, *_BESIDE),
        items=tuple(items),
        notes=(
            *notes,
            *(f"{name} was skipped, its weights are missing: {reason}" for name, reason in scores.skipped.items()),
            *(f"{name} failed: {reason}" for name, reason in scores.failed.items()),
            *(f"VBench gave no {name} for {count} videos" for name, count in without.items() if count),
        ),
    )


def _item(record: Record, scores: Scores, folder: Path) -> Item:
    job = cast(GenerationJob, record.job)
    assert record.output is not None
    found = scores.values.get((str(record.sha256), job.prompt), {})
    quality = record.measured["quality"]
    values = {name: value for name, value in found.items() if value is not None}
    values |= {name: quality[name] for name in ("luma", "sharpness", "flicker")}
    return Item(
        id=f"{job.prompt} #{job.seed}",
        arm=job.label,
        prompt=job.prompt,
        seed=job.seed,
        negative=", ".join(negative.text for negative in job.negatives),
        values=values | {"out_of_range": record.measured["out_of_range"]},
        media=os.path.relpath(record.output, folder),
    )


def _arms(records: Sequence[Record], methods: Sequence[Method]) -> tuple[Arm, ...]:
    steps = {record.job.label: record.job.steps for record in records if isinstance(record.job, GenerationJob)}
    settings: dict[str, dict[str, JsonValue]] = {
        record.job.label: record.job.guidance.model_dump(mode="json")["settings"]
        for record in records
        if isinstance(record.job, GenerationJob) and record.job.guidance is not None
    }
    return tuple(
        Arm(
            label=method.label,
            method=method.name,
            scale=method.scale,
            steps=steps.get(method.label),
            settings=settings.get(method.label, {}),
        )
        for method in methods
    )


def number_of_scores(jobs: Iterable[GenerationJob], scoring: Scoring) -> int:
    """How many scores videos will have where no weights are missing, for a progress bar."""
    return sum(name in cast("list[str]", job.tags["dimensions"]) for job in jobs for name in scoring.dimensions)
