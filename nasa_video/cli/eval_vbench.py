"""``nasa-video eval vbench`` and ``nasa-video eval setup vbench``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nasa_video.cli.console import say
from nasa_video.cli.eval_options import (
    FolderOption,
    MethodsOption,
    RunOptions,
    finish,
    job_progress,
    left_to_others,
    say_made,
    words,
)
from nasa_video.cli.options import NegOption, grouped

if TYPE_CHECKING:
    from nasa_video.evaluation.benchmarks.vbench.run import PromptChoice
    from nasa_video.evaluation.benchmarks.vbench.scoring import Mode, Scoring

setup = typer.Typer(name="setup", help="Install what a measurement needs and cannot share.", no_args_is_help=True)

VenvOption = Annotated[
    Path | None, typer.Option(help="VBench's environment.", show_default="$NASA_VIDEO_VBENCH, or in the user's cache")
]
CacheOption = Annotated[
    Path | None, typer.Option(help="VBench's weights.", show_default="$VBENCH_CACHE_DIR, or ~/.cache/vbench")
]


@setup.command("vbench")
def setup_vbench(
    venv: VenvOption = None,
    python: Annotated[
        str | None, typer.Option(help="Interpreter to make it from (3.9 to 3.11).", show_default="this one")
    ] = None,
    torch: Annotated[
        list[str] | None,
        typer.Option(
            help="What pip is asked for, as torch==2.14.1; give it once a package.", show_default="torch, torchvision"
        ),
    ] = None,
    constraint: Annotated[Path | None, typer.Option(help="A pip constraints file.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Also download the weights of these dimensions (comma list, or all).")
    ] = None,
    cache: CacheOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Download without asking.")] = False,
) -> None:
    """Make VBench's own environment, and say which weights its dimensions need before any is downloaded."""
    from nasa_video.evaluation.benchmarks.vbench import environment
    from nasa_video.evaluation.benchmarks.vbench import weights as files

    folder = venv or environment.default_venv()
    place = cache or files.cache_folder()
    chosen = files.check_dimensions(words(weights)) if weights else ()
    steps = environment.install_steps(folder, python, tuple(torch or environment.TORCH), constraint)
    say(f"VBench's environment: {folder} ({environment.SIZE}); VBench is Apache-2.0")
    _say_weights(chosen or files.DEFAULT_DIMENSIONS, place)
    if dry_run:
        for step in steps:
            say(f"+ {' '.join(step)}")
        return
    environment.install(steps, say)
    say(f"VBench {environment.Environment(folder).version} is ready in {folder}")
    lacking = files.missing_weights(chosen, place)
    wanted = list(dict.fromkeys(one for several in lacking.values() for one in several))
    if not wanted:
        return
    total = sum(one.bytes for one in wanted) / 1e9
    if not yes:
        typer.confirm(f"Download {len(wanted)} files, {total:.2f} GB, under the licences above?", abort=True, err=True)
    files.download(wanted, place, say)


@dataclass(frozen=True)
class PromptOptions:
    """Which prompts."""

    prompts: Annotated[
        Path | None, typer.Option(help="A list in VBench's JSON format.", show_default="VBench's own")
    ] = None
    extended_prompts: Annotated[
        Path | None, typer.Option(help="What the model is given instead: JSON, or text with --extended-base.")
    ] = None
    extended_base: Annotated[Path | None, typer.Option(help="The same lines unextended.")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts of a dimension.")] = None
    samples: Annotated[int, typer.Option(min=1, help="Videos of a prompt; seeds count up from --seed.")] = 5
    seed: Annotated[int, typer.Option(help="Of the first sample.")] = 0

    @property
    def choice(self) -> PromptChoice:
        """As the run takes it."""
        from nasa_video.evaluation.benchmarks.vbench.run import PromptChoice

        return PromptChoice(self.prompts, self.limit, self.extended_prompts, self.extended_base)


@dataclass(frozen=True)
class ScoringOptions:
    """What is scored, and where."""

    dimensions: Annotated[str, typer.Option(help="Comma list of VBench's dimensions, or all.")] = (
        "aesthetic_quality,imaging_quality"
    )
    long: Annotated[bool, typer.Option("--long", help="VBench-Long: clips are scored.")] = False
    judge_device: Annotated[str | None, typer.Option(help="Of VBench's judges.", show_default="as --device")] = None
    venv: VenvOption = None
    cache: CacheOption = None

    def scoring(self, device: str | None) -> Scoring:
        """How videos are scored; InputError for an unknown dimension or no environment."""
        from nasa_video.evaluation.benchmarks.vbench.environment import Environment, default_venv
        from nasa_video.evaluation.benchmarks.vbench.scoring import Scoring
        from nasa_video.evaluation.benchmarks.vbench.weights import cache_folder, check_dimensions
        from nasa_video.models.loading import choose_device

        dimensions = check_dimensions(words(self.dimensions))
        judges = choose_device(self.judge_device or device).type
        environment = Environment(self.venv or default_venv())
        mode: Mode = "long" if self.long else "standard"
        return Scoring(environment, mode, dimensions, judges, self.cache or cache_folder())


@grouped
def vbench(
    output: FolderOption,
    options: RunOptions,
    asked: PromptOptions,
    judges: ScoringOptions,
    model: Annotated[str, typer.Option(help="Preset, folder, or hub id.")] = "sprites",
    methods: MethodsOption = "none,nasa",
    neg: NegOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; say it where this machine has no GPU and a cluster's have.",
            show_default="bfloat16 on CUDA, else float32",
        ),
    ] = None,
) -> None:
    """VBench and VBench-Long: videos of its prompts for every method, scored in an environment of its own."""
    from nasa_video.errors import InputError
    from nasa_video.evaluation.benchmarks.vbench.run import VBenchRun
    from nasa_video.evaluation.samples import VideoModel, methods_of
    from nasa_video.guidance.terms import as_negatives

    negatives = as_negatives(neg)
    if not negatives and words(methods) != ["none"]:
        raise InputError("the methods need a negative prompt: --neg 'blurry, low quality'; or run --methods none")
    scoring = judges.scoring(options.device)
    for name, reason in scoring.skipped.items():
        say(f"{name} will be skipped, its weights are not in {scoring.cache}: {reason}")
    chosen = VideoModel(model, options.device, options.frames, dtype=dtype)
    compared, seeds = methods_of(methods, chosen.preset), range(asked.seed, asked.seed + asked.samples)
    where = options.run(output)
    run = VBenchRun(chosen, compared, negatives, scoring, asked.choice, seeds, options.counts, where)
    with job_progress({"videos": len(run.mine), "scores": run.number_of_scores}) as bar:
        outcome = run.run(bar)
    say_made(outcome.videos)
    for name, reason in outcome.scores.failed.items():
        say(f"{name} failed: {reason}")
    if outcome.results is None:
        left_to_others(where.shard, len(outcome.videos.missing) or outcome.scores.missing, output, options.as_json)
    else:
        for note in outcome.results.notes:
            say(f"note: {note}")
        finish(outcome.results, output, options.as_json)
    if outcome.scores.failed:
        raise typer.Exit(1)


def _say_weights(dimensions: Sequence[str], cache: Path) -> None:
    from nasa_video.evaluation.benchmarks.vbench.weights import dimensions as needed_by

    say(f"weights, looked for in {cache}:")
    for name in dimensions:
        for one in needed_by()[name]:
            say(f"  {name}: {'here' if one.present(cache) else 'MISSING'}: {one.describe()}")
        if not needed_by()[name]:
            say(f"  {name}: needs none")
