"""``nasa-video eval vbench`` and ``nasa-video eval setup vbench``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nasa_video.cli.console import console, say, shown_warnings
from nasa_video.cli.eval_options import (
    EngineOption,
    FolderOption,
    FramesOption,
    MethodsOption,
    ShardOption,
    check_engine,
    finish,
    left_to_others,
    words,
)
from nasa_video.cli.options import DeviceOption, NegOption, StepsOption

if TYPE_CHECKING:
    from nasa_video.evaluation.vbench_run import VBenchOptions, VBenchOutcome, VBenchRun

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
    from nasa_video.evaluation import vbench_setup, vbench_weights

    folder = venv or vbench_setup.default_venv()
    place = cache or vbench_weights.cache_folder()
    chosen = vbench_weights.check_dimensions(words(weights)) if weights else ()
    steps = vbench_setup.install_steps(folder, python, tuple(torch or vbench_setup.TORCH), constraint)
    say(f"VBench's environment: {folder} ({vbench_setup.SIZE}); VBench is Apache-2.0")
    _say_weights(chosen or vbench_weights.DEFAULT_DIMENSIONS, place)
    if dry_run:
        for step in steps:
            say(f"+ {' '.join(step)}")
        return
    vbench_setup.install(steps, say)
    say(f"VBench {vbench_setup.Environment(folder).version} is ready in {folder}")
    lacking = vbench_weights.missing_weights(chosen, place)
    wanted = list(dict.fromkeys(one for several in lacking.values() for one in several))
    if not wanted:
        return
    total = sum(one.bytes for one in wanted) / 1e9
    if not yes:
        typer.confirm(f"Download {len(wanted)} files, {total:.2f} GB, under the licences above?", abort=True, err=True)
    vbench_weights.download(wanted, place, say)


def vbench(
    output: FolderOption,
    model: Annotated[str, typer.Option(help="Preset, folder, or hub id.")] = "sprites",
    methods: MethodsOption = "none,nasa",
    neg: NegOption = None,
    dimensions: Annotated[str, typer.Option(help="Comma list of VBench's dimensions, or all.")] = (
        "aesthetic_quality,imaging_quality"
    ),
    long: Annotated[bool, typer.Option("--long", help="VBench-Long: clips are scored.")] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="A list in VBench's JSON format.", show_default="VBench's own")
    ] = None,
    extended_prompts: Annotated[
        Path | None, typer.Option(help="What the model is given instead: JSON, or text with --extended-base.")
    ] = None,
    extended_base: Annotated[Path | None, typer.Option(help="The same lines unextended.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts of a dimension.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Videos of a prompt; seeds count up from --seed.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the first sample.")] = 0,
    steps: StepsOption = None,
    frames: FramesOption = None,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16 or float16; say it where this machine has no GPU and a cluster's have.",
            show_default="bfloat16 on CUDA, else float32",
        ),
    ] = None,
    judge_device: Annotated[str | None, typer.Option(help="Of VBench's judges.", show_default="as --device")] = None,
    shard: ShardOption = None,
    engine: EngineOption = "local",
    venv: VenvOption = None,
    cache: CacheOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
) -> None:
    """VBench and VBench-Long: videos of its prompts for every method, scored in an environment of its own."""
    from nasa_video.errors import InputError
    from nasa_video.evaluation.vbench_run import VBenchOptions, VBenchRun
    from nasa_video.evaluation.vbench_setup import default_venv
    from nasa_video.evaluation.vbench_weights import cache_folder
    from nasa_video.guidance.terms import as_negatives
    from nasa_video.jobs.processes import Shard

    negatives = as_negatives(neg)
    if not negatives and words(methods) != ["none"]:
        raise InputError("the methods need a negative prompt: --neg 'blurry, low quality'; or run --methods none")
    options = VBenchOptions(
        model=model,
        methods=methods,
        negatives=negatives,
        dimensions=tuple(words(dimensions)),
        output=output,
        venv=venv or default_venv(),
        cache=cache or cache_folder(),
        mode="long" if long else "standard",
        prompts=prompts,
        extended=extended_prompts,
        extended_base=extended_base,
        limit=limit,
        samples=samples,
        seed=seed,
        steps=steps,
        frames=frames,
        device=device,
        dtype=dtype,
        judge_device=judge_device or device,
        shard=Shard.choose(shard),
        engine=check_engine(engine),
    )
    with shown_warnings():
        run = VBenchRun(options)
        for name, reason in run.skipped.items():
            say(f"{name} will be skipped, its weights are not in {options.cache}: {reason}")
        outcome = _run(run)
    _show(outcome, options, as_json)
    if outcome.scores.failed:
        raise typer.Exit(1)


def add_vbench(commands: typer.Typer) -> None:
    """Add both commands to ``nasa-video eval``."""
    commands.add_typer(setup)
    commands.command()(vbench)


def _run(run: VBenchRun) -> VBenchOutcome:
    from nasa_video.evaluation.vbench import number_of_scores

    with score_progress(len(run.mine), number_of_scores(run.mine, run.scoring)) as (video_made, score_made):
        return run.run(video_made, score_made)


@contextmanager
def score_progress(videos: int, scores: int) -> Iterator[tuple[Callable[..., None], Callable[..., None]]]:
    """Bars of videos and scores; gives what to call with each."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        first, second = progress.add_task("videos", total=videos), progress.add_task("scores", total=scores)
        yield lambda *_: progress.advance(first), lambda *_: progress.advance(second)


def _show(outcome: VBenchOutcome, options: VBenchOptions, as_json: bool) -> None:
    damaged = f" ({outcome.remade} were there, damaged)" if outcome.remade else ""
    say(f"{outcome.made} videos made{damaged}, {outcome.found} found finished")
    for name, reason in outcome.scores.failed.items():
        say(f"{name} failed: {reason}")
    if outcome.results is None:
        left_to_others(options.shard, outcome.missing_videos or outcome.scores.missing, options.output, as_json)
        return
    for note in outcome.results.notes:
        say(f"note: {note}")
    finish(outcome.results, options.output, as_json)


def _say_weights(dimensions: Sequence[str], cache: Path) -> None:
    from nasa_video.evaluation.vbench_weights import DIMENSIONS

    say(f"weights, looked for in {cache}:")
    for name in dimensions:
        for one in DIMENSIONS[name]:
            say(f"  {name}: {'here' if one.present(cache) else 'MISSING'}: {one.describe()}")
        if not DIMENSIONS[name]:
            say(f"  {name}: needs none")
