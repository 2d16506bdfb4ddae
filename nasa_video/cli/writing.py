"""What becomes of a run's chunks: a file, a stream or a folder, a contact sheet, and a word about them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress

from nasa_video.errors import NasaVideoError
from nasa_video.files.frames import Frames
from nasa_video.files.sheets import Excerpt, comparison_labels, contact_sheet, save_sheet, sheet_path, side_by_side
from nasa_video.files.sinks import open_sink
from nasa_video.guidance.state import Effect
from nasa_video.video.inputs import Start
from nasa_video.video.pipeline import Chunk, VideoPipeline
from nasa_video.video.recipe import Recipe, restore_guidance, restore_negatives
from nasa_video.video.resume import ResumeLog


@dataclass(frozen=True)
class Written:
    """What a run left behind."""

    output: str
    frames: int
    seconds: float
    effect: Effect | None
    contact_sheet: str | None


def write(
    chunks: Iterator[Chunk],
    unguided: Iterator[Chunk] | None,
    recipe: Recipe,
    pipeline: VideoPipeline,
    output: str,
    make_progress: Callable[[], Progress],
    start: Start | None,
    log: ResumeLog | None,
) -> Written:
    """Write the chunks as they come, beside the unguided ones where there are any; then the contact sheet."""
    sheet = (Excerpt(), Excerpt())
    place = None
    if unguided is not None and output != "-":
        place = sheet_path(output)
    size = pipeline.preset.sampler.frames_per_chunk
    total = pipeline.check_frames(recipe.frames) // size
    if start is not None and start.prefix is not None:
        total -= (start.prefix.shape[1] - start.shown_prefix) // size
    upscale = pipeline.preset.video.upscale
    labels = _labels(recipe)

    def beside(plain: Frames, guided: Frames) -> Frames:
        sheet[0].add(plain)
        sheet[1].add(guided)
        return side_by_side([plain, guided], labels, scale=upscale)

    effect: Effect | None = None
    began = time.perf_counter()
    # Videos side by side are enlarged before their labels are drawn, not after.
    with (
        open_sink(output, recipe.fps, recipe.to_metadata(), scale=1 if unguided is not None else upscale) as sink,
        make_progress() as progress,
    ):
        task = progress.add_task("generating", total=total, fps=0.0)
        if start is not None and len(start.lead):
            sink.write(start.lead if unguided is None else beside(start.lead, start.lead))
        for chunk in chunks:
            sink.write(chunk.frames if unguided is None else beside(next(unguided).frames, chunk.frames))
            effect = chunk.effect
            if log is not None:
                log.add(chunk.index, chunk.latents)
            progress.update(task, advance=1, fps=sink.num_frames / (time.perf_counter() - began))
        if effect is not None:
            sink.metadata["effect"] = dataclasses.asdict(effect)
    seconds = time.perf_counter() - began
    if place is not None:
        rows = zip(labels, (excerpt.frames for excerpt in sheet), strict=True)
        labelled = [(f"{recipe.prompt}   |   {label}", frames) for label, frames in rows]
        save_sheet(contact_sheet(labelled, numbers=sheet[0].numbers), place)
    return Written(output, sink.num_frames, seconds, effect, str(place) if place else None)


def guarded(chunks: Iterator[Chunk], recipe: Recipe) -> Iterator[Chunk]:
    """The chunks, with running out of memory turned into an error that says what to change."""
    try:
        yield from chunks
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise NasaVideoError(_no_memory(recipe)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise NasaVideoError(_no_memory(recipe)) from error


def _no_memory(recipe: Recipe) -> str:
    return (
        f"not enough memory for {recipe.width} x {recipe.height}; half of each side takes about a quarter: "
        f"--width {recipe.width // 2} --height {recipe.height // 2}; fewer --frames help a model without a window"
    )


def _labels(recipe: Recipe) -> tuple[str, str]:
    guidance = restore_guidance(recipe.guidance) if recipe.anything_negative else None
    return comparison_labels(guidance, restore_negatives(recipe.negatives))


def report(written: Written, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Say what was made, how fast, and what the negative did."""
    rate = written.frames / written.seconds if written.seconds else math.inf
    say(f"{written.output}: {written.frames} frames in {written.seconds:.1f} s ({rate:.1f} FPS), seed {recipe.seed}")
    if written.contact_sheet:
        say(f"{written.contact_sheet}: contact sheet")
    if written.effect is not None:
        say(
            f"effect of the negative: attention changed by {written.effect.relative_change:.0%}, "
            f"negative share {written.effect.negative_share:.1%}"
        )


def take_part(chunks: Iterator[Chunk], unguided: Iterator[Chunk] | None, recipe: Recipe) -> dict[str, Any]:
    """Make the same calls as the process that writes, in the same order."""
    for _ in chunks:
        if unguided is not None:
            next(unguided)
    return {}
