"""``nasa-video eval removal``."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from nasa_video.cli.console import emit_json, say, shown_warnings
from nasa_video.cli.eval_options import (
    BaseOption,
    EngineOption,
    ShardOption,
    WeightsOption,
    check_engine,
    job_progress,
    left_to_others,
    run_benchmark,
    whole_numbers,
    words,
)
from nasa_video.cli.options import FirstStepsOption

if TYPE_CHECKING:
    from nasa_video.evaluation.cases import CaseKind, Split
    from nasa_video.evaluation.removal import Cell
    from nasa_video.evaluation.removal_jobs import Draw
    from nasa_video.jobs.store import Record


def removal(
    model: Annotated[str, typer.Option(help="A sprites model; with another --judge and --prompts any model.")] = (
        "sprites"
    ),
    methods: Annotated[
        str, typer.Option(help="Comma list of METHOD[:SCALE]; the model's own scale where none is given.")
    ] = "none,cfg,nasa,nag,vsf",
    steps: Annotated[str | None, typer.Option(help="Comma list of step counts.", show_default="the model's")] = None,
    first_steps: FirstStepsOption = None,
    cases: Annotated[str, typer.Option(help="Comma list of unmentioned, stated, conflict.")] = (
        "unmentioned,stated,conflict"
    ),
    attributes: Annotated[str | None, typer.Option(help="Comma list of attributes.", show_default="all")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Videos a cell.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the draw of prompts and of the videos.")] = 0,
    split: Annotated[str, typer.Option(help="report, or choose: the set on which settings are tuned.")] = "report",
    judge: Annotated[
        str, typer.Option(help="sprites, clip[:ARCHITECTURE:WEIGHTS], command:PROGRAM, or http://HOST/v1#MODEL.")
    ] = "sprites",
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts with the feature that must go, in NegGenBench's format, for models but sprites."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="With --prompts: pictures of a prompt, from --seed on.")] = 1,
    frames: Annotated[int | None, typer.Option(help="Length of a video.", show_default="the model's")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Videos made at once.")] = 16,
    base: BaseOption = None,
    weights: WeightsOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for table, report and outputs; a rerun resumes there.")
    ] = None,
    shard: ShardOption = None,
    engine: EngineOption = "local",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")] = False,
) -> None:
    """How often the unwanted feature is gone, and everything asked for still there (table 2 of the paper)."""
    from nasa_video.errors import InputError
    from nasa_video.evaluation.removal import KINDS

    kinds = words(cases)
    if not kinds or not set(kinds) <= set(KINDS):
        raise InputError(f"cases must be among {', '.join(KINDS)}, got {cases}")
    if split not in ("choose", "report"):
        raise InputError(f"split must be choose or report, got {split}")
    asked = _Asked(
        model, methods, steps, first_steps, cast("list[CaseKind]", kinds),
        words(attributes) if attributes else None, n, seed, cast("Split", split),
        frames, batch, device, output, shard, engine, as_json,
    )  # fmt: skip
    if judge == "sprites" and prompts is None:
        asked.with_detectors()
    else:
        asked.with_judge(judge, prompts, seeds, base, weights)


@dataclass(frozen=True)
class _Asked:
    """What was asked for."""

    model: str
    methods: str
    steps: str | None
    first_steps: int | None
    kinds: list[CaseKind]
    attributes: list[str] | None
    n: int
    seed: int
    split: Split
    frames: int | None
    batch: int
    device: str | None
    output: Path | None
    shard: str | None
    engine: str
    as_json: bool

    def with_detectors(self) -> None:
        """The sprites table, in the folder that was given or in one that is gone afterwards."""
        if self.output is not None:
            self._table(self.output)
            return
        with tempfile.TemporaryDirectory(prefix="nasa-video-removal-") as folder:
            self._table(Path(folder))

    def with_judge(self, judge: str, prompts: Path | None, seeds: int, base: Path | None, weights: Path | None) -> None:
        """Prompts of a file, or the sprites' cases, before any judge."""
        from nasa_video.errors import InputError
        from nasa_video.evaluation.judges import parse_judge
        from nasa_video.evaluation.picture_scores import feature_removal, sprites_removal
        from nasa_video.evaluation.prompt_files import removal_prompts
        from nasa_video.evaluation.sampling import VideoModel, model_of
        from nasa_video.files.atomic import file_sha256

        if self.output is None:
            raise InputError("give a folder with -o: what is judged is kept there, and a rerun goes on there")
        model = model_of(self.model, self.device, self.frames, base, weights, self.first_steps)
        model.methods(self.methods)
        if prompts is not None:
            entries = removal_prompts(prompts)
            source = f"{prompts.name}, SHA-256 {file_sha256(prompts)}, {len(entries)} prompts"
            numbers = range(self.seed, self.seed + seeds)
            chosen = parse_judge(judge, self.device)
            benchmark = feature_removal(entries, numbers, chosen, judge, self.device, source)
        elif isinstance(model, VideoModel) and model.preset.vocabulary == "sprites":
            chosen = parse_judge(judge, self.device)
            benchmark = sprites_removal(
                self.kinds, self.attributes, self.n, self.split, self.seed, chosen, judge, self.device
            )
        else:
            raise InputError(
                f"{self.model} is no sprites model: give prompts with --prompts FILE (NegGenBench's format)"
            )
        run_benchmark(benchmark, model, self.methods, self.steps, self.output, self.shard, self.engine, self.as_json)

    def _table(self, folder: Path) -> None:
        from nasa_video.errors import InputError
        from nasa_video.evaluation.removal import cells
        from nasa_video.evaluation.removal_jobs import CellWorker, Draw, plan_cells
        from nasa_video.evaluation.video_jobs import methods_of, model_dtype
        from nasa_video.jobs.processes import Shard
        from nasa_video.jobs.store import Store, run_jobs, write_manifest
        from nasa_video.models.presets import find_preset

        preset = find_preset(self.model)
        if preset.vocabulary != "sprites":
            raise InputError(
                f"eval removal judges with the sprites detectors; {self.model} is no sprites model. Give another judge "
                "with --judge, and prompts with --prompts"
            )
        counts = whole_numbers(self.steps, "steps") if self.steps else [preset.sampler.default_steps]
        for count in counts:
            preset.sampler.timesteps(count)
        preset.sampler.with_first_chunk_steps(self.first_steps)
        table = cells(methods_of(self.methods, preset), counts, self.kinds, self.attributes, self.first_steps)
        draw = Draw(self.n, self.split, self.seed, self.frames or preset.video.frames)
        dtype = model_dtype(self.device)
        planned = plan_cells(preset, list(table), draw, dtype)
        part = Shard.choose(self.shard)
        write_manifest(folder / "manifest.jsonl", [job for _, job in planned])
        with shown_warnings(), job_progress(len(part.of(planned))) as bar:
            done = run_jobs(
                [job for _, job in planned],
                Store(folder / "cells", ".png"),
                partial(CellWorker, self.model, self.device, self.batch, dtype),
                shard=part,
                engine=check_engine(self.engine),
                tell=bar("cells"),
            )
        if done.missing:
            left_to_others(part, len(done.missing), folder, self.as_json)
            return
        self._finish(folder, list(zip((cell for cell, _ in planned), done.records, strict=True)), draw)

    def _finish(self, folder: Path, done: list[tuple[Cell, Record]], draw: Draw) -> None:
        from nasa_video.evaluation.page import write_report
        from nasa_video.evaluation.removal_jobs import removal_results, rows_of
        from nasa_video.evaluation.report import markdown, plot
        from nasa_video.models.presets import find_preset

        rows = rows_of(done)
        if self.output is not None:
            (folder / "removal.md").write_text(markdown(rows), encoding="utf-8")
            plot(rows, folder / "removal.png")
            results = removal_results(find_preset(self.model), done, draw, folder)
            results.write(folder)
            page, _ = write_report(results, folder)
            say(f"{folder}/removal.md, {folder}/removal.png, {page}")
        if self.as_json:
            emit_json({"rows": rows})
        else:
            typer.echo(markdown(rows))


def add_removal(evaluate: typer.Typer) -> None:
    """Register the command."""
    evaluate.command()(removal)
