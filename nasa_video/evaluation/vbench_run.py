"""``eval vbench`` from its options to its results: plan, generate, score, put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from nasa_video.evaluation.identity import cached_sha256
from nasa_video.evaluation.results import Results
from nasa_video.evaluation.vbench import Mode, Scores, Scoring, results_of, score_videos, skipped_dimensions
from nasa_video.evaluation.vbench_prompts import read_extended, select_prompts
from nasa_video.evaluation.vbench_setup import Environment, read_prompt_list
from nasa_video.evaluation.vbench_weights import check_dimensions
from nasa_video.evaluation.video_jobs import VideoWorker, methods_of, model_dtype, plan_videos
from nasa_video.guidance.terms import Negative
from nasa_video.jobs.processes import Shard
from nasa_video.jobs.store import Engine, GenerationJob, Record, Store, run_jobs, write_manifest
from nasa_video.models.loading import choose_device
from nasa_video.models.presets import find_preset

# Of VBench's protocol; temporal flickering asks for 25.
SAMPLES = 5


@dataclass(frozen=True)
class VBenchOptions:
    """What ``eval vbench`` was asked for.

    Attributes:
        prompts: a list in VBench's format instead of VBench's own.
        limit: at most so many prompts of a dimension.
        samples: videos of a prompt, with the seeds ``seed``, ``seed + 1`` …
        device: of the model; ``judge_device``: of VBench's judges; None takes CUDA where there is one.
    """

    model: str
    methods: str
    negatives: tuple[Negative, ...]
    dimensions: tuple[str, ...]
    output: Path
    venv: Path
    cache: Path
    mode: Mode = "standard"
    prompts: Path | None = None
    extended: Path | None = None
    extended_base: Path | None = None
    limit: int | None = None
    samples: int = SAMPLES
    seed: int = 0
    steps: int | None = None
    frames: int | None = None
    device: str | None = None
    dtype: str | None = None
    judge_device: str | None = None
    shard: Shard = field(default_factory=Shard)
    engine: Engine = "local"


@dataclass(frozen=True)
class VBenchOutcome:
    """How far it came.

    Attributes:
        results: None while other shards' videos or scores are missing.
        videos, missing_videos: made, and left to other shards.
        found, made, remade: of this run.
    """

    results: Results | None
    scores: Scores
    videos: int
    missing_videos: int
    found: int
    made: int
    remade: int


class VBenchRun:
    """A planned run: everything is checked before the first video is made.

    Raises:
        InputError: anything in the options that cannot be used, or no VBench environment.
    """

    def __init__(self, options: VBenchOptions) -> None:
        self.options = options
        dimensions = check_dimensions(options.dimensions)
        environment = Environment(options.venv)
        preset = find_preset(options.model)
        self.methods = methods_of(options.methods, preset)
        self.dtype = model_dtype(options.device, options.dtype)
        judges = choose_device(options.judge_device).type
        self.scoring = Scoring(environment, options.mode, dimensions, judges, options.cache)
        listed = environment.prompts() if options.prompts is None else read_prompt_list(options.prompts)
        extended = None if options.extended is None else read_extended(options.extended, options.extended_base)
        prompts = select_prompts(listed, dimensions, options.limit, extended)
        self.jobs: list[GenerationJob] = plan_videos(
            preset,
            prompts,
            self.methods,
            options.negatives,
            seeds=range(options.seed, options.seed + options.samples),
            steps=options.steps,
            frames=options.frames,
            dtype=self.dtype,
        )
        self.videos = Store(options.output / "videos", ".mp4")
        self.scores = Store(options.output / "scores")

    @property
    def mine(self) -> list[GenerationJob]:
        """This shard's jobs."""
        return self.options.shard.of(list({job.id: job for job in self.jobs}.values()))

    @property
    def skipped(self) -> dict[str, str]:
        """Dimensions without their weights, and what they need: to be said before hours are spent."""
        return skipped_dimensions(self.scoring)

    def run(
        self,
        tell_video: Callable[[Record, bool], None] | None = None,
        tell_score: Callable[[Any, float | None], None] | None = None,
    ) -> VBenchOutcome:
        """Generate, score, and put the results together once nothing is missing; ``results.json`` is written then.

        Raises:
            InputError, OutputError, NasaVideoError: as ``run_jobs`` and ``score_videos``; a further run goes on.
        """
        options = self.options
        write_manifest(options.output / "manifest.jsonl", self.jobs)
        outcome = run_jobs(
            self.jobs,
            self.videos,
            partial(VideoWorker, options.model, options.device, self.dtype),
            shard=options.shard,
            engine=options.engine,
            tell=tell_video,
        )
        ours = {job.id for job in self.mine}
        mine = [record for record in outcome.records if record.job.id in ours]
        scores = score_videos(outcome.records, self.scoring, self.scores, mine, tell_score)
        results = None
        if outcome.complete and not scores.missing:
            results = results_of(
                outcome.records, scores, self.scoring, self.methods, self._settings(), options.output, self._notes()
            )
            results.write(options.output)
        return VBenchOutcome(
            results, scores, len(outcome.records), len(outcome.missing), outcome.found, outcome.made, outcome.remade
        )

    def _settings(self) -> dict[str, JsonValue]:
        job, options = self.jobs[0], self.options
        settings: dict[str, JsonValue] = {
            "model": job.model,
            "checkpoint_sha256": job.checkpoint,
            "version": job.version,
            "negatives": [negative.text for negative in options.negatives],
            "steps": job.steps,
            "frames": job.frames,
            "width": job.width,
            "height": job.height,
            "sampling": job.settings,
            "prompts": len({job.prompt for job in self.jobs}),
            "prompt_list": _named(options.prompts) or f"VBench {self.scoring.environment.version}",
            "prompts_a_dimension_at_most": options.limit,
            "extended_prompts": _named(options.extended),
            "seeds": list(range(options.seed, options.seed + options.samples)),
        }
        return settings

    def _notes(self) -> Sequence[str]:
        options = self.options
        notes = [
            f"Every score is the mean of VBench's scores of single {'clips and then ' * self._long}videos, 0 to 1."
        ]
        if options.prompts is not None:
            notes.append(f"The prompts are not VBench's own but those of {options.prompts.name}.")
        if options.extended is not None:
            notes.append(
                f"The model was given the extended prompts of {options.extended.name}; scores go by the short."
            )
        if options.limit is not None:
            notes.append(f"At most {options.limit} prompts of a dimension: not comparable with published scores.")
        if options.samples != SAMPLES:
            notes.append(f"{options.samples} samples of a prompt; VBench's protocol has {SAMPLES}.")
        if "temporal_flickering" in self.scoring.dimensions:
            notes.append(
                "Temporal flickering is scored on all videos; VBench makes 25 of a prompt and keeps the static ones."
            )
        return notes

    @property
    def _long(self) -> bool:
        return self.options.mode == "long"


def _named(path: Path | None) -> str | None:
    return None if path is None else f"{path.name}, SHA-256 {cached_sha256(path)}"
