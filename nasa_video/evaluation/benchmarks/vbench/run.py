"""``eval vbench`` from its options to its results: prompts, plan, videos, scores, table."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import JsonValue

from nasa_video.errors import InputError
from nasa_video.evaluation.assets import cached_sha256
from nasa_video.evaluation.benchmarks.base import Run, item_of, recorded
from nasa_video.evaluation.benchmarks.vbench.environment import read_prompt_list
from nasa_video.evaluation.benchmarks.vbench.scoring import Scores, Scoring, score_videos
from nasa_video.evaluation.metrics import measured_metrics
from nasa_video.evaluation.results import Item, Metric, Results
from nasa_video.evaluation.samples import Method, Planned, Sample, VideoModel
from nasa_video.guidance.terms import Negative
from nasa_video.jobs.store import GenerationJob, Outcome, Record, Store, Tell, write_manifest

# Of VBench's protocol; temporal flickering asks for 25.
SAMPLES = 5
_OUT_OF_RANGE = Metric(name="out_of_range", title="out of range", better="lower", digits=4)


@dataclass(frozen=True)
class PromptChoice:
    """Which prompts: a list in VBench's format (None: VBench's own), and what the model is given for them.

    Attributes:
        limit: at most so many prompts of a dimension.
        extended, extended_base: see :func:`read_extended`.
    """

    listed: Path | None = None
    limit: int | None = None
    extended: Path | None = None
    extended_base: Path | None = None

    def samples(self, scoring: Scoring, negatives: tuple[Negative, ...], seeds: Sequence[int]) -> list[Sample]:
        """A sample for each prompt and seed; InputError as :func:`select_prompts` and :func:`read_extended`."""
        entries = scoring.environment.prompts() if self.listed is None else read_prompt_list(self.listed)
        extended = None if self.extended is None else read_extended(self.extended, self.extended_base)
        chosen = select_prompts(entries, scoring.dimensions, self.limit, extended)
        return [
            Sample(f"{text} #{seed}", text, negatives, seed, extended=extended[text] if extended else None, tags=tags)
            for text, tags in chosen.items()
            for seed in seeds
        ]


@dataclass(frozen=True)
class VBenchOutcome:
    """How far it came; ``results`` is None while other shards' videos or scores are missing."""

    results: Results | None
    videos: Outcome
    scores: Scores


class VBenchRun:
    """A planned run: everything is checked before the first video is made.

    Args:
        seeds: of each prompt's videos.

    Raises:
        InputError: anything that cannot be used, or no VBench environment.
    """

    def __init__(
        self,
        model: VideoModel,
        methods: Sequence[Method],
        negatives: tuple[Negative, ...],
        scoring: Scoring,
        prompts: PromptChoice,
        seeds: Sequence[int],
        steps: Sequence[int | None],
        run: Run,
    ) -> None:
        self.scoring = scoring
        self._model, self._prompts, self._negatives, self._seeds, self._run = model, prompts, negatives, seeds, run
        self.plan: list[Planned] = model.plan(prompts.samples(scoring, negatives, seeds), methods, steps)
        self.jobs = list({one.job.id: one.job for one in self.plan}.values())
        self.videos = Store(run.folder / "videos", ".mp4")
        self.scores = Store(run.folder / "scores")

    @property
    def mine(self) -> list[GenerationJob]:
        """This shard's jobs."""
        return self._run.shard.of(self.jobs)

    @property
    def number_of_scores(self) -> int:
        """How many scores this shard's videos will have where no weights are missing, for a progress bar."""
        own = [cast("list[str]", job.tags["dimensions"]) for job in self.mine]
        return sum(name in dimensions for dimensions in own for name in self.scoring.dimensions)

    def run(self, tell: Callable[[str], Tell] | None = None) -> VBenchOutcome:
        """Generate, score, and put the results together once nothing is missing.

        Raises:
            InputError, OutputError, NasaVideoError: as ``run_jobs`` and ``score_videos``; a further run goes on.
        """
        write_manifest(self._run.folder / "manifest.jsonl", self.jobs)
        told = dataclasses.replace(self._run, tell=tell)
        outcome = told.jobs("videos", self.jobs, self.videos, self._model.new_worker)
        ours = {job.id for job in self.mine}
        mine = [record for record in outcome.records if record.job.id in ours]
        scores = score_videos(outcome.records, self.scoring, self.scores, mine, tell and tell("scores"))
        complete = outcome.complete and not scores.missing
        return VBenchOutcome(self._results(outcome.records, scores) if complete else None, outcome, scores)

    def _results(self, records: Sequence[Record], scores: Scores) -> Results:
        by_id = {record.job.id: record for record in records}
        pairs = [(one, by_id[one.job.id]) for one in self.plan]
        return results_of(pairs, scores, self.scoring, self._run.folder, self._settings(), self._notes())

    def _settings(self) -> dict[str, JsonValue]:
        prompts = self._prompts
        return {
            **recorded(self.plan),
            "negatives": [negative.text for negative in self._negatives],
            "steps": self.plan[0].job.request.steps,
            "prompts": len({one.sample.prompt for one in self.plan}),
            "prompt_list": _named(prompts.listed) or f"VBench {self.scoring.environment.version}",
            "prompts_a_dimension_at_most": prompts.limit,
            "extended_prompts": _named(prompts.extended),
            "seeds": list(self._seeds),
        }

    def _notes(self) -> list[str]:
        prompts, long = self._prompts, self.scoring.mode == "long"
        notes = [f"Every score is the mean of VBench's scores of single {'clips and then ' * long}videos, 0 to 1."]
        if prompts.listed is not None:
            notes.append(f"The prompts are not VBench's own but those of {prompts.listed.name}.")
        if prompts.extended is not None:
            notes.append(
                f"The model was given the extended prompts of {prompts.extended.name}; scores go by the short."
            )
        if prompts.limit is not None:
            notes.append(f"At most {prompts.limit} prompts of a dimension: not comparable with published scores.")
        if len(self._seeds) != SAMPLES:
            notes.append(f"{len(self._seeds)} samples of a prompt; VBench's protocol has {SAMPLES}.")
        if "temporal_flickering" in self.scoring.dimensions:
            notes.append(
                "Temporal flickering is scored on all videos; VBench makes 25 of a prompt and keeps the static ones."
            )
        return notes


def results_of(
    pairs: Sequence[tuple[Planned, Record]],
    scores: Scores,
    scoring: Scoring,
    folder: Path,
    settings: Mapping[str, JsonValue],
    notes: Sequence[str] = (),
) -> Results:
    """Everything measured, by video; a score that is missing is not there, and never a zero.

    Args:
        folder: of the results, which media are relative to.
    """
    items = [_item(one, record, scores, folder) for one, record in pairs]
    have = {name for item in items for name in item.values}
    without = {name: sum(values.get(name, 0.0) is None for values in scores.values.values()) for name in have}
    dimensions = tuple(
        Metric(name=name, title=name.replace("_", " "), digits=4) for name in scoring.dimensions if name in have
    )
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
            "judges_weights": cast("dict[str, JsonValue]", scoring.weights),
            "skipped": dict(scoring.skipped),
            "failed": dict(scores.failed),
        },
        arms=tuple({one.arm.label: one.arm for one, _ in pairs}.values()),
        metrics=(*dimensions, *measured_metrics(), _OUT_OF_RANGE),
        items=tuple(items),
        notes=(
            *notes,
            *(f"{name} was skipped, its weights are missing: {reason}" for name, reason in scoring.skipped.items()),
            *(f"{name} failed: {reason}" for name, reason in scores.failed.items()),
            *(f"VBench gave no {name} for {count} videos" for name, count in without.items() if count),
        ),
    )


def _item(planned: Planned, record: Record, scores: Scores, folder: Path) -> Item:
    assert record.output is not None
    found = scores.values.get((str(record.sha256), planned.sample.prompt), {})
    values = {name: value for name, value in found.items() if value is not None}
    values["out_of_range"] = record.measured["out_of_range"]
    return item_of(planned, record, values, os.path.relpath(record.output, folder))


def _named(path: Path | None) -> str | None:
    return None if path is None else f"{path.name}, SHA-256 {cached_sha256(path)}"


# --- prompts


def select_prompts(
    entries: Iterable[Mapping[str, Any]],
    dimensions: Sequence[str],
    limit: int | None = None,
    extended: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """The prompts that belong to the dimensions, each once, in the list's order, with their tags.

    VBench lists a few prompts twice, for different dimensions: they become one with both. Tags of a prompt are
    ``dimensions``, all of its own (VBench-Long's clips depend on them), and ``auxiliary``, what its judges are told.

    Args:
        limit: at most so many prompts of a dimension, spread evenly over its list.
        extended: what the model is given instead, by prompt; every selected prompt must be there.

    Raises:
        InputError: nothing is left, or a prompt has no extended one.
    """
    prompts: dict[str, dict[str, Any]] = {}
    for entry in entries:
        tags = prompts.setdefault(entry["prompt_en"], {"dimensions": [], "auxiliary": {}})
        tags["dimensions"] = sorted({*tags["dimensions"], *entry["dimension"]})
        tags["auxiliary"] |= entry.get("auxiliary_info") or {}
    chosen: set[str] = set()
    for dimension in dimensions:
        own = [text for text, tags in prompts.items() if dimension in tags["dimensions"]]
        count = len(own) if limit is None else min(limit, len(own))
        chosen.update(own[index * len(own) // count] for index in range(count))
    if not chosen:
        raise InputError(f"the list has no prompt for {', '.join(dimensions)}; see dimension in its entries")
    lacking = sorted(text for text in chosen if extended is not None and text not in extended)
    if lacking:
        raise InputError(f"{len(lacking)} prompts have no extended one, such as {lacking[0]!r}")
    return {text: tags for text, tags in prompts.items() if text in chosen}


def read_extended(path: Path, base: Path | None) -> dict[str, str]:
    """Extended prompts by prompt, from a JSON object, or from a text file beside one with the same lines unextended.

    Raises:
        InputError: they cannot be read, a text file comes without its base, or the two do not match line by line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = json.loads(text)
            if isinstance(found, dict) and all(isinstance(value, str) and value.strip() for value in found.values()):
                return found
            raise InputError(f"{path} must be one JSON object, prompt to extended prompt")
        if base is None:
            raise InputError(
                f"{path} alone does not say which prompt a line extends; give the file with the same lines unextended "
                "as --extended-base (VBench publishes both), or a JSON object"
            )
        before, after = _lines(base.read_text(encoding="utf-8")), _lines(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"the extended prompts cannot be read: {error}") from error
    if len(before) != len(after):
        raise InputError(f"{base} has {len(before)} prompts and {path} {len(after)}: they do not belong together")
    return dict(zip(before, after, strict=True))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
