"""``nasa-video eval hpsv2`` and ``nasa-video eval negopt``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nasa_video.cli.eval_options import (
    BaseOption,
    EngineOption,
    FolderOption,
    FramesOption,
    MethodsOption,
    ShardOption,
    StepListOption,
    WeightsOption,
    run_benchmark,
    words,
)
from nasa_video.cli.options import AsJsonOption, DeviceOption

ModelOption = Annotated[str, typer.Option(help="Image or video model: a preset, a preset file, a folder or hub id.")]


def hpsv2(
    output: FolderOption,
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
    seed: Annotated[int, typer.Option(help="Of the first picture; they count up.")] = 0,
    steps: StepListOption = None,
    frames: FramesOption = None,
    base: BaseOption = None,
    weights: WeightsOption = None,
    device: DeviceOption = None,
    shard: ShardOption = None,
    engine: EngineOption = "local",
    as_json: AsJsonOption = False,
) -> None:
    """Human Preference Score v2 over its 4 x 800 prompts (table 3 of the paper)."""
    from nasa_video.evaluation.picture_scores import HpsPrompts
    from nasa_video.evaluation.picture_scores import hpsv2 as benchmark_of
    from nasa_video.evaluation.sampling import QUALITY_NEGATIVE, model_of

    chosen = model_of(model, device, frames, base, weights)
    chosen.methods(methods)
    asked = HpsPrompts(tuple(words(styles)), limit, prompts, neg or QUALITY_NEGATIVE, seed)
    benchmark = benchmark_of(hps_version, asked, checkpoint, device, backbone)
    run_benchmark(benchmark, chosen, methods, steps, output, shard, engine, as_json)


def negopt(
    output: FolderOption,
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
    seed: Annotated[int, typer.Option(help="Of the draw, and of the first picture; pictures count up.")] = 0,
    steps: StepListOption = None,
    frames: FramesOption = None,
    base: BaseOption = None,
    weights: WeightsOption = None,
    device: DeviceOption = None,
    shard: ShardOption = None,
    engine: EngineOption = "local",
    as_json: AsJsonOption = False,
) -> None:
    """CLIP+ and CLIP- over NegOpt's prompt pairs (table 3 of the paper)."""
    from nasa_video.evaluation.clip import Backbone
    from nasa_video.evaluation.picture_scores import negopt as benchmark_of
    from nasa_video.evaluation.prompt_files import negopt_pairs
    from nasa_video.evaluation.sampling import model_of

    chosen = model_of(model, device, frames, base, weights)
    chosen.methods(methods)
    clip = Backbone.parse(backbone)
    pairs, source = negopt_pairs(prompts)
    benchmark = benchmark_of(pairs, source, n, seed, clip, device)
    run_benchmark(benchmark, chosen, methods, steps, output, shard, engine, as_json)


def add_scores(evaluate: typer.Typer) -> None:
    """Register the commands."""
    evaluate.command()(hpsv2)
    evaluate.command()(negopt)
