"""``nasa-video eval removal``, ``eval hpsv2`` and ``eval negopt``."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from nasa_video.cli.eval_options import (
    AnyModelOptions,
    FolderOption,
    MethodsOption,
    finish,
    job_progress,
    left_to_others,
    run_benchmark,
    words,
)
from nasa_video.cli.options import FirstChunkStepsOption, grouped

if TYPE_CHECKING:
    from nasa_video.evaluation.benchmarks.base import Benchmark
    from nasa_video.evaluation.benchmarks.removal import Draw
    from nasa_video.models.presets import VideoPreset

ModelOption = Annotated[str, typer.Option(help="Image or video model: a preset, a preset file, a folder or hub id.")]
KindsOption = Annotated[str, typer.Option("--cases", help="Comma list of unmentioned, stated, conflict.")]
PUBLISHED = ("cfg", "nasa", "nag", "vsf")
"""Methods that ``eval removal`` sets beside the model's own default where --methods says nothing."""


@dataclass(frozen=True)
class CaseOptions:
    """Which cases of the shipped model's world."""

    cases: KindsOption = "unmentioned,stated,conflict"
    attributes: Annotated[str | None, typer.Option(help="Comma list of attributes.", show_default="all")] = None
    n: Annotated[int, typer.Option("--n", min=1, help="Videos a cell.")] = 200
    seed: Annotated[int, typer.Option(help="Of the draw of prompts and of the videos.")] = 0
    split: Annotated[Literal["report", "choose"], typer.Option(help="choose: the set on which settings are tuned.")] = (
        "report"
    )

    @property
    def kinds(self) -> list[Any]:
        """The kinds of case; InputError for one that there is not."""
        from nasa_video.errors import InputError
        from nasa_video.evaluation.benchmarks.removal import KINDS

        kinds = words(self.cases)
        if not kinds or not set(kinds) <= set(KINDS):
            raise InputError(f"cases must be among {', '.join(KINDS)}, got {self.cases}")
        return kinds

    @property
    def chosen(self) -> list[str] | None:
        """The attributes; None is all."""
        return words(self.attributes) if self.attributes else None

    def draw(self, frames: int) -> Draw:
        """Which cases are drawn for every cell."""
        from nasa_video.evaluation.benchmarks.removal import Draw

        return Draw(self.n, self.split, self.seed, frames)


@dataclass(frozen=True)
class JudgeChoice:
    """Who judges, and what is asked of models but the shipped one."""

    judge: Annotated[
        str, typer.Option(help="sprites, clip[:ARCHITECTURE:WEIGHTS], command:PROGRAM, or http://HOST/v1#MODEL.")
    ] = "sprites"
    judge_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a judge has for one answer.")] = 300.0
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts with the feature that must go, in NegGenBench's format, for models but sprites."),
    ] = None
    seeds: Annotated[int, typer.Option(min=1, help="With --prompts: samples of a prompt, from --seed on.")] = 1

    def benchmark(self, model: Any, cases: CaseOptions, device: str | None) -> Benchmark:
        """Prompts of a file, or the sprites' cases; InputError where there are neither."""
        from nasa_video.errors import InputError
        from nasa_video.evaluation.benchmarks.removal import feature_removal, removal_prompts, sprites_removal
        from nasa_video.evaluation.judges import JudgeOptions
        from nasa_video.files.atomic import file_sha256

        how = JudgeOptions(device, self.judge_timeout)
        if self.prompts is not None:
            entries = removal_prompts(self.prompts)
            source = f"{self.prompts.name}, SHA-256 {file_sha256(self.prompts)}, {len(entries)} prompts"
            return feature_removal(entries, range(cases.seed, cases.seed + self.seeds), self.judge, how, source)
        if not is_sprites(model):
            raise InputError(
                f"{model.name} is no sprites model: give prompts with --prompts FILE (NegGenBench's format)"
            )
        return sprites_removal(cases.kinds, cases.chosen, cases.draw(model.preset.video.frames), self.judge, how)


@grouped
def removal(
    options: AnyModelOptions,
    cases: CaseOptions,
    judged: JudgeChoice,
    model: Annotated[str, typer.Option(help="A sprites model; with another --judge and --prompts any model.")] = (
        "sprites"
    ),
    methods: Annotated[
        str | None,
        typer.Option(help="As none,nasa:0.8.", show_default=f"none, the model's own, {', '.join(PUBLISHED)}"),
    ] = None,
    first_chunk_steps: FirstChunkStepsOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Videos made at once.")] = 16,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for table, report and outputs; a rerun resumes there.")
    ] = None,
) -> None:
    """How often the unwanted feature is gone, and everything asked for still there (table 2 of the paper)."""
    from nasa_video.errors import InputError

    chosen = options.model(model, first_chunk_steps)
    compared = methods or default_methods(chosen.preset)
    if judged.judge == "sprites" and judged.prompts is None:
        if not is_sprites(chosen):
            raise InputError(
                f"eval removal judges with the sprites detectors; {model} is no sprites model. Give another judge with "
                "--judge, and prompts with --prompts"
            )
        where = tempfile.TemporaryDirectory(prefix="nasa-video-removal-") if output is None else nullcontext(output)
        with where as folder:
            asked = (options, cases, first_chunk_steps, batch)
            _with_detectors(chosen, compared, asked, Path(folder), output is not None)
        return
    if output is None:
        raise InputError("give a folder with -o: what is judged is kept there, and a rerun goes on there")
    run_benchmark(judged.benchmark(chosen, cases, options.device), chosen, compared, output, options)


def is_sprites(model: Any) -> bool:
    """Whether a model makes videos of the shipped model's world."""
    return getattr(model.preset, "vocabulary", None) == "sprites"


def default_methods(preset: Any) -> str:
    """Unguided, the model's own default, and the published methods."""
    own = getattr(preset, "default_guidance", "nasa")
    others = [name for name in PUBLISHED if name != own.partition(":")[0].partition(",")[0]]
    return "; ".join(["none", own, *others])


def _with_detectors(
    model: Any, methods: str, asked: tuple[AnyModelOptions, CaseOptions, int | None, int], folder: Path, keep: bool
) -> None:
    """The table of the shipped model, cell by cell."""
    from nasa_video.evaluation.benchmarks.removal import CellWorker, cells, plan_cells, removal_results
    from nasa_video.evaluation.samples import methods_of
    from nasa_video.jobs.store import Store, write_manifest

    options, cases, first_steps, batch = asked
    preset: VideoPreset = model.preset
    counts = [count or preset.sampler.default_steps for count in options.counts]
    for count in counts:
        preset.sampler.timesteps(count)
    table = list(cells(methods_of(methods, preset), counts, cases.kinds, cases.chosen, first_steps))
    draw = cases.draw(options.frames or preset.video.frames)
    planned = plan_cells(preset, table, draw, model.dtype)
    jobs = [job for _, job in planned]
    write_manifest(folder / "manifest.jsonl", jobs)
    with job_progress({"cells": len(options.run(folder).shard.of(jobs))}) as bar:
        run = options.run(folder, bar)
        new_worker = partial(CellWorker, model.source, options.device, batch, model.dtype)
        done = run.jobs("cells", jobs, Store(folder / "cells", ".png"), new_worker)
    if done.missing:
        left_to_others(run.shard, len(done.missing), folder, options.as_json)
        return
    records = list(zip((cell for cell, _ in planned), done.records, strict=True))
    finish(removal_results(preset, records, draw, folder), folder, options.as_json, keep)


@grouped
def hpsv2(
    output: FolderOption,
    options: AnyModelOptions,
    model: ModelOption = "dmd2-sdxl-4step",
    methods: MethodsOption = "none,nasa",
    hps_version: Annotated[str, typer.Option(help="v2 (the paper's) or v2.1; they do not compare.")] = "v2",
    checkpoint: Annotated[
        Path | None, typer.Option(help="HPS_v2_compressed.pt or HPS_v2.1_compressed.pt.", show_default="hub cache")
    ] = None,
    backbone: Annotated[str, typer.Option(help="open_clip architecture of the scorer, or a config.json.")] = "ViT-H-14",
    prompts: Annotated[
        Path | None, typer.Option(help="Folder with anime.json and the others.", show_default="hub cache")
    ] = None,
    styles: Annotated[str, typer.Option(help="Comma list of styles.")] = "anime,concept-art,paintings,photo",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts of a style.")] = None,
    neg: Annotated[
        str | None, typer.Option("--neg", help="What guided methods avoid.", show_default="the paper's")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the first sample; they count up.")] = 0,
) -> None:
    """Human Preference Score v2 over its 4 x 800 prompts (table 3 of the paper)."""
    from nasa_video.evaluation.benchmarks.hpsv2 import HpsPrompts
    from nasa_video.evaluation.benchmarks.hpsv2 import hpsv2 as benchmark_of
    from nasa_video.evaluation.samples import QUALITY_NEGATIVE, methods_of

    chosen = options.model(model)
    methods_of(methods, chosen.preset)
    asked = HpsPrompts(tuple(words(styles)), limit, prompts, neg or QUALITY_NEGATIVE, seed)
    benchmark = benchmark_of(hps_version, asked, checkpoint, options.device, backbone)
    run_benchmark(benchmark, chosen, methods, output, options)


@grouped
def negopt(
    output: FolderOption,
    options: AnyModelOptions,
    model: ModelOption = "dmd2-sdxl-4step",
    methods: MethodsOption = "none,nasa",
    backbone: Annotated[
        str, typer.Option(help="CLIP as ARCHITECTURE:WEIGHTS; scores of different ones do not compare.")
    ] = "ViT-L-14:openai",
    prompts: Annotated[
        Path | None,
        typer.Option(help="The pairs: .parquet, .csv, .json, .jsonl, or a folder of them.", show_default="hub cache"),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Pairs to draw.")] = 30_000,
    seed: Annotated[int, typer.Option(help="Of the draw, and of the first sample; they count up.")] = 0,
) -> None:
    """CLIP+ and CLIP- over NegOpt's prompt pairs (table 3 of the paper)."""
    from nasa_video.evaluation.benchmarks.negopt import negopt as benchmark_of
    from nasa_video.evaluation.benchmarks.negopt import negopt_pairs
    from nasa_video.evaluation.clip import Backbone
    from nasa_video.evaluation.samples import methods_of

    chosen = options.model(model)
    methods_of(methods, chosen.preset)
    pairs, source = negopt_pairs(prompts)
    benchmark = benchmark_of(pairs, source, n, seed, Backbone.parse(backbone), options.device)
    run_benchmark(benchmark, chosen, methods, output, options)
