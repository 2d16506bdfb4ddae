"""The sprites removal table as jobs: the same results however it is cut up, killed or spread."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from test_evaluation import ANY

from nasa_video.evaluation.benchmarks import removal
from nasa_video.evaluation.benchmarks.removal import (
    Cell,
    CellJob,
    CellWorker,
    Draw,
    Verdict,
    cells,
    plan_cells,
    removal_results,
)
from nasa_video.evaluation.benchmarks.removal_cases import Case
from nasa_video.evaluation.report import score_table, thumbnail
from nasa_video.evaluation.results import Results
from nasa_video.evaluation.samples import Method, methods_of
from nasa_video.guidance.methods import METHODS as REGISTERED
from nasa_video.guidance.methods import Guidance, Nasa, register
from nasa_video.jobs.processes import Shard
from nasa_video.jobs.store import Outcome, Store, run_jobs
from nasa_video.models.presets import VideoPreset, find_preset

DRAW = Draw(n=6, split="report", seed=0, frames=9)
METHODS = [Method("none", None), Method("nasa:1", Nasa(1.0))]


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> VideoPreset:
    monkeypatch.setattr(removal, "checkpoint_hash", lambda preset: "ab" * 32)
    return find_preset("sprites")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> CellWorker:
    """A worker without a model: what it finds follows from a case's seed, and its pictures from the seed too."""

    def run_cases(
        pipeline: Any, method: Method, steps: int, cases: Sequence[Case], judge: Any, frames: int, batch: int, look: Any
    ) -> list[Verdict]:
        verdicts = []
        for case in cases:
            found = Verdict(bool(case.seed % 2) or method.guidance is not None, bool(case.seed % 3), ANY)
            look(np.full((frames, 8, 8, 3), case.seed % 256, np.uint8))
            verdicts.append(found)
        return verdicts

    monkeypatch.setattr(removal, "run_cases", run_cases)
    one = CellWorker.__new__(CellWorker)
    one._pipeline = SimpleNamespace(with_sampler=lambda sampler: sampler, preset=find_preset("sprites"))  # type: ignore[assignment]
    one._judge = None  # type: ignore[assignment]
    one._batch = 4
    return one


def table(preset: VideoPreset) -> list[tuple[Cell, CellJob]]:
    return plan_cells(preset, list(cells(METHODS, [4], ["conflict"], ["colour", "shape", "size"])), DRAW, "float32")


def make(planned: list[tuple[Cell, CellJob]], folder: Path, worker: Any, **options: Any) -> Outcome:
    return run_jobs([job for _, job in planned], Store(folder / "cells", ".png"), lambda: worker, **options)


def table_of(preset: VideoPreset, planned: list[tuple[Cell, CellJob]], done: Outcome, folder: Path) -> Results:
    return removal_results(preset, list(zip((cell for cell, _ in planned), done.records, strict=True)), DRAW, folder)


def test_two_shards_and_a_killed_run_give_the_single_runs_rows(
    preset: VideoPreset, worker: CellWorker, tmp_path: Path
) -> None:
    planned = table(preset)
    whole = table_of(preset, planned, make(planned, tmp_path / "whole", worker), tmp_path / "whole")
    for index in (0, 1):
        part = make(planned, tmp_path / "parts", worker, shard=Shard(index, 2))
    assert table_of(preset, planned, part, tmp_path / "parts") == whole

    made: list[str] = []

    def killed(job: CellJob, path: Path) -> Any:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(job.id)
        return worker(job, path)

    with pytest.raises(KeyboardInterrupt):
        make(planned, tmp_path / "killed", killed)
    again = make(planned, tmp_path / "killed", worker)
    assert (again.found, again.made) == (4, 2)
    assert table_of(preset, planned, again, tmp_path / "killed") == whole


def test_the_scores_are_those_of_the_verdicts(preset: VideoPreset, worker: CellWorker, tmp_path: Path) -> None:
    planned = table(preset)
    found = table_of(preset, planned, make(planned, tmp_path, worker), tmp_path)
    scores = {(one.arm, one.group, one.metric): one for one in found.scores(["", *found.groups, *found.parts])}
    cases = DRAW.cases("shape", "conflict")
    held = sum(case.seed % 3 > 0 for case in cases)
    assert scores["nasa:1", "conflict/shape", "removed"].value == 1
    assert scores["nasa:1", "conflict/shape", "held"].value == held / 6
    assert scores["nasa:1", "conflict", "removed"].n == 18, "a kind is all of its attributes"
    assert found.groups == ["conflict"]
    assert found.parts == ["conflict/shape", "conflict/colour", "conflict/size"]


def test_a_cell_is_made_again_when_anything_that_matters_changes(preset: VideoPreset) -> None:
    jobs = {job.id for _, job in table(preset)}
    assert len(jobs) == 6
    cell = list(cells(METHODS, [4], ["conflict"], ["colour"]))
    for change in ({"n": 7}, {"split": "choose"}, {"seed": 1}, {"frames": 21}):
        assert not jobs & {
            job.id for _, job in plan_cells(preset, cell, dataclasses.replace(DRAW, **change), "float32")
        }
    assert not jobs & {job.id for _, job in plan_cells(preset, cell, DRAW, "bfloat16")}, "a CPU's cells on a GPU"
    renamed = [dataclasses.replace(one, method=Method("another name", one.method.guidance)) for one in cell]
    assert {job.id for _, job in plan_cells(preset, renamed, DRAW, "float32")} <= jobs, (
        "a label changes nothing that is made"
    )


def test_cells_whose_first_chunk_has_more_steps_are_others_and_say_so(
    preset: VideoPreset, worker: CellWorker, tmp_path: Path
) -> None:
    def of(first_steps: int | None) -> list[tuple[Cell, CellJob]]:
        return plan_cells(preset, list(cells(METHODS, [4, 1], ["conflict"], ["colour"], first_steps)), DRAW, "float32")

    plain, opened = of(None), of(4)
    ids, opened_ids = ([job.id for _, job in planned] for planned in (plain, opened))
    assert ids[:2] == opened_ids[:2], "four steps that open in four are four steps"
    assert not {*ids[2:]} & {*opened_ids[2:]}
    pipelines: list[Any] = []
    worker._pipeline.with_sampler = lambda sampler: pipelines.append(sampler)  # type: ignore[method-assign, assignment]
    done = make(opened, tmp_path, worker)
    assert [sampler.first_chunk_steps for sampler in pipelines] == [None, None, 4, 4]
    found = table_of(preset, opened, done, tmp_path)
    assert "| **none, 1 steps, first 4** | 6 |" in score_table(found).markdown()
    labels = [arm.label for arm in found.arms]
    assert labels == ["none, 4 steps", "nasa:1, 4 steps", "none, 1 steps, first 4", "nasa:1, 1 steps, first 4"]


def test_results_hold_every_case_with_pictures_of_the_first(
    preset: VideoPreset, worker: CellWorker, tmp_path: Path
) -> None:
    planned = table(preset)
    found = table_of(preset, planned, make(planned, tmp_path, worker), tmp_path)
    assert len(found.items) == 36
    both = {arm.label: {item.id for item in found.of(arm.label) if item.media} for arm in found.arms}
    assert both["none"] == both["nasa:1"]
    assert len(both["none"]) == 12, "the same four cases of each cell, so that arms can be set beside each other"
    item = next(item for item in found.of("nasa:1") if item.id == "conflict/shape/2")

    assert item.crop == (0, 16, 32, 24)
    assert (thumbnail(item, tmp_path) or "").startswith("data:image/webp")
    assert {score.metric for score in found.scores()} >= {"removed", "held", "both", "sharpness", "luma", "flicker"}


def test_the_products_own_default_is_compared_where_nothing_is_said(preset: VideoPreset) -> None:
    from nasa_video.cli.eval_benchmarks import default_methods

    methods = methods_of(default_methods(preset), preset)
    own = next(method for method in methods if method.name == preset.default_guidance.partition(":")[0])
    assert own.guidance == methods_of(preset.default_guidance, preset)[0].guidance
    assert {"none", "cfg", "nasa", "nag", "vsf"} <= {method.name for method in methods}


def test_ones_own_method_is_a_cell_by_its_name(
    preset: VideoPreset, worker: CellWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nasa_video.guidance.methods.METHODS", dict(REGISTERED))

    @register
    @dataclass(frozen=True)
    class Half(Nasa):
        name: ClassVar[str] = "half"
        label: ClassVar[str] = "half NASA"

    asked: list[Guidance | None] = []

    def run_cases(pipeline: Any, method: Method, *rest: Any) -> list[Verdict]:
        asked.append(method.guidance)
        rest[-1](np.zeros((9, 8, 8, 3), np.uint8))
        return [Verdict(True, True, ANY)] * 6

    monkeypatch.setattr(removal, "run_cases", run_cases)
    plan = list(cells(methods_of("none,half:0.7", preset), [4], ["conflict"], ["colour"]))
    planned = plan_cells(preset, plan, DRAW, "float32")
    found = table_of(preset, planned, make(planned, tmp_path, worker), tmp_path)
    assert asked == [None, Half(0.7)]
    assert [arm.method for arm in found.arms] == ["none", "half"]
