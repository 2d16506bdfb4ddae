"""The sprites removal table as jobs: the same rows however it is cut up, killed or spread."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_evaluation import ANY

from nasa_video.evaluation import removal_jobs
from nasa_video.evaluation.cases import Case
from nasa_video.evaluation.removal import Cell, Method, Verdict, cells, row_of
from nasa_video.evaluation.removal_jobs import CellJob, CellWorker, Draw, plan_cells, removal_results, rows_of
from nasa_video.evaluation.report import markdown, plot
from nasa_video.guidance.methods import Nasa
from nasa_video.jobs.processes import Shard
from nasa_video.jobs.store import Outcome, Store, run_jobs
from nasa_video.models.presets import VideoPreset, find_preset

DRAW = Draw(n=6, split="report", seed=0, frames=9)
METHODS = [Method("none", None), Method("nasa:1", Nasa(1.0))]


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> VideoPreset:
    monkeypatch.setattr(removal_jobs, "checkpoint_hash", lambda preset: "ab" * 32)
    return find_preset("sprites")


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> CellWorker:
    """A worker without a model: what it finds follows from a case's seed, and its pictures from the seed too."""

    def run_cases(
        pipeline: Any, method: Method, steps: int, cases: Sequence[Case], judge: Any, frames: int, batch: int, look: Any
    ) -> list[Verdict]:
        verdicts = []
        for case in cases:
            found = Verdict(bool(case.seed % 2) or method.guidance is not None, bool(case.seed % 3), 0.5, ANY)
            look(case, np.full((frames, 8, 8, 3), case.seed % 256, np.uint8), found)
            verdicts.append(found)
        return verdicts

    monkeypatch.setattr(removal_jobs, "run_cases", run_cases)
    one = CellWorker.__new__(CellWorker)
    one._pipeline = SimpleNamespace(with_sampler=lambda sampler: sampler)  # type: ignore[assignment]
    one._judge = None  # type: ignore[assignment]
    one._batch = 4
    return one


def table(preset: VideoPreset) -> list[tuple[Cell, CellJob]]:
    return plan_cells(preset, list(cells(METHODS, [4], ["conflict"], ["colour", "shape", "size"])), DRAW, "float32")


def make(planned: list[tuple[Cell, CellJob]], folder: Path, worker: Any, **options: Any) -> Outcome:
    return run_jobs([job for _, job in planned], Store(folder / "cells", ".png"), lambda: worker, **options)


def rows(planned: list[tuple[Cell, CellJob]], done: Outcome) -> list[dict[str, Any]]:
    return rows_of(list(zip((cell for cell, _ in planned), done.records, strict=True)))


def test_two_shards_and_a_killed_run_give_the_single_runs_rows(
    preset: VideoPreset, worker: CellWorker, tmp_path: Path
) -> None:
    planned = table(preset)
    whole = rows(planned, make(planned, tmp_path / "whole", worker))
    for index in (0, 1):
        part = make(planned, tmp_path / "parts", worker, shard=Shard(index, 2))
    assert rows(planned, part) == whole

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
    assert rows(planned, again) == whole


def test_the_rows_are_those_of_the_verdicts(preset: VideoPreset, worker: CellWorker, tmp_path: Path) -> None:
    planned = table(preset)
    done = make(planned, tmp_path, worker)
    one = rows(planned, done)[1]
    cases = removal_jobs.build_cases("shape", "conflict", 6, "report", 0)
    held = sum(case.seed % 3 > 0 for case in cases)
    assert (one["label"], one["attribute"], one["removed"], one["held"]) == ("nasa:1", "shape", 1.0, held / 6)
    expected = [Verdict(True, bool(case.seed % 3), 0.5, ANY) for case in cases]
    assert json.loads(json.dumps(one)) == json.loads(json.dumps(row_of(planned[1][0], expected)))


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
    assert [row["first_steps"] for row in rows(opened, done)] == [None, None, 4, 4]
    text = markdown(rows(opened, done))
    assert "| none | 4 | conflict |" in text
    assert "| none | 1, first 4 | conflict |" in text
    labels = [
        arm.label
        for arm in removal_results(
            preset, list(zip((c for c, _ in opened), done.records, strict=True)), DRAW, tmp_path
        ).arms
    ]
    assert labels == ["none, 4 steps", "nasa:1, 4 steps", "none, 1 steps, first 4", "nasa:1, 1 steps, first 4"]
    plot(rows(opened, done), tmp_path / "plot.png")


def test_results_hold_every_case_with_pictures_of_the_first(
    preset: VideoPreset, worker: CellWorker, tmp_path: Path
) -> None:
    planned = table(preset)
    done = list(zip((cell for cell, _ in planned), make(planned, tmp_path, worker).records, strict=True))
    found = removal_results(preset, done, DRAW, tmp_path)
    assert len(found.items) == 36
    both = {arm.label: {item.id for item in found.of(arm.label) if item.media} for arm in found.arms}
    assert both["none"] == both["nasa:1"]
    assert len(both["none"]) == 12, "the same four cases of each cell, so that arms can be set beside each other"
    item = next(item for item in found.of("nasa:1") if item.id == "conflict/shape/2")
    from nasa_video.evaluation.sheets import thumbnail

    assert item.crop == (0, 16, 32, 24)
    assert (thumbnail(item, tmp_path) or "").startswith("data:image/webp")
    assert {score.metric for score in found.scores()} >= {"removed", "held", "both", "sharpness", "luma", "flicker"}
