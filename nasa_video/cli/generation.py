"""One run of ``generate``: from a request to a finished file, a contact sheet, and what to say about them."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress

from nasa_video.cli.console import effect_text
from nasa_video.errors import InputError, NasaVideoError
from nasa_video.files.frames import Frames
from nasa_video.files.sheets import Excerpt, comparison_labels, contact_sheet, save_sheet, sheet_path, side_by_side
from nasa_video.files.sinks import open_sink
from nasa_video.guidance.state import Effect
from nasa_video.jobs.processes import Processes
from nasa_video.text.vocabulary import describe_unknown_words, find_vocabulary
from nasa_video.video.engine import InitialLatents
from nasa_video.video.loading import load_pipeline
from nasa_video.video.pipeline import Chunk, VideoPipeline
from nasa_video.video.request import LoadOptions, PromptWarning, VideoRequest
from nasa_video.video.resume import ResumeLog


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out; none of it changes the frames.

    Attributes:
        resume: keep what is needed to go on after a kill, and go on where it is there.
        split: one video on all processes, of which this is number ``rank``; the first writes it.
    """

    load: LoadOptions = field(default_factory=LoadOptions)
    resume: bool = False
    split: bool = False
    rank: int = 0


Watch = Callable[
    [VideoPipeline, VideoRequest, Iterator[Chunk], Iterator[Chunk] | None],
    tuple[Iterator[Chunk], Iterator[Chunk] | None],
]
"""Looks at the guided and the unguided chunks as they pass (see serve.preview)."""


def run(
    request: VideoRequest,
    output: str,
    options: RunOptions,
    make_progress: Callable[[], Progress],
    say: Callable[[str], None],
    watch: Watch | None = None,
    load: Callable[..., VideoPipeline] | None = None,
) -> dict[str, Any]:
    """Generate and write; returns what ``--json`` prints.

    Raises:
        NasaVideoError: something that was asked for cannot be done; before anything is generated wherever it can be
            known before.
    """
    tell = say if options.rank == 0 else _silent
    processes = Processes.of_environment().world if options.split else 1
    pipeline = load_pipeline(request, options.load, tell, load, processes=processes)
    if options.split:
        from causvid_adapter.accelerate.parallel import parallelise

        parallelise(pipeline.model)
    recipe = pipeline.resolve(request)
    if request.extend_prompt:
        say(f"prompt: {recipe.prompt}")
    recipe, start = pipeline.prepared(recipe)
    log = None
    if options.resume:
        log, start = _resumed(output, recipe, start)
    states = pipeline.states(recipe)
    warn_of_unknown_words(pipeline, recipe)
    chunks = guarded(pipeline.stream(recipe, start=start, states=states), recipe)
    unguided = None
    if recipe.compare:
        unguided = guarded(pipeline.stream(recipe, start=start, states=lambda chunk: states(chunk).unguided), recipe)
    if watch is not None:
        chunks, unguided = watch(pipeline, recipe, chunks, unguided)
    if options.rank > 0:
        return drain(chunks, unguided)
    written = _Writing(pipeline, recipe, output, start, log).write(chunks, unguided, make_progress)
    if log is not None:
        log.close()
    report(written, recipe, say)
    method = str(recipe.guidance).partition(":")[0] if recipe.anything_negative else "none"
    return {
        "output": written.output,
        "frames": written.frames,
        "fps": recipe.fps,
        "seconds": round(written.seconds, 3),
        "seed": recipe.seed,
        "model": recipe.model,
        "guidance": method,
        "effect": dataclasses.asdict(written.effect) if written.effect else None,
        "contact_sheet": written.contact_sheet,
    }


def _silent(line: str) -> None:
    """Say nothing."""


def _resumed(
    output: str, recipe: VideoRequest, start: InitialLatents | None
) -> tuple[ResumeLog, InitialLatents | None]:
    """The log of a run that can be resumed, and what it starts from: also what an earlier run finished."""
    if output == "-" or recipe.compare:
        raise InputError("--resume is for a file or folder of one video, not for a stream or --compare")
    log = ResumeLog(output, recipe)
    made = log.open()
    if made is None:
        return log, start
    start = start or InitialLatents()
    # On the CPU: the latents of hours need not be on the device at once.
    context = made if start.context is None else torch.cat([start.context.cpu(), made], dim=1)
    return log, dataclasses.replace(start, context=context, shown_context=made.shape[1])


def warn_of_unknown_words(pipeline: VideoPipeline, recipe: VideoRequest) -> None:
    """Say kindly when a text has words that a model with a small world cannot know."""
    note = describe_unknown_words(find_vocabulary(pipeline.preset.vocabulary), recipe.texts)
    if note is not None:
        warnings.warn(note, PromptWarning, stacklevel=2)


# --- writing


@dataclass(frozen=True)
class Written:
    """What a run left behind."""

    output: str
    frames: int
    seconds: float
    effect: Effect | None
    contact_sheet: str | None


@dataclass(frozen=True)
class _Writing:
    """A file in the making."""

    pipeline: VideoPipeline
    recipe: VideoRequest
    output: str
    start: InitialLatents | None
    log: ResumeLog | None

    def write(
        self, chunks: Iterator[Chunk], unguided: Iterator[Chunk] | None, make_progress: Callable[[], Progress]
    ) -> Written:
        """Write the chunks as they come, beside the unguided ones where there are any; then the contact sheet."""
        recipe, lead = self.recipe, None if self.start is None else self.start.lead
        place = sheet_path(self.output) if unguided is not None and self.output != "-" else None
        excerpts = (Excerpt(), Excerpt())
        upscale = self.pipeline.preset.video.upscale
        method = self.pipeline.states(recipe)(0).guidance if recipe.anything_negative else None
        labels = comparison_labels(method, recipe.negatives or ())

        def beside(plain: Frames, guided: Frames) -> Frames:
            excerpts[0].add(plain)
            excerpts[1].add(guided)
            return side_by_side([plain, guided], labels, scale=upscale)

        effect: Effect | None = None
        began = time.perf_counter()
        # Videos side by side are enlarged before their labels are drawn, not after.
        with (
            open_sink(
                self.output, recipe.fps or 0, recipe.to_metadata(), scale=1 if unguided is not None else upscale
            ) as sink,
            make_progress() as progress,
        ):
            task = progress.add_task("generating", total=self._num_chunks(), fps=0.0)
            if lead is not None and len(lead):
                sink.write(lead if unguided is None else beside(lead, lead))
            for chunk in chunks:
                sink.write(chunk.frames if unguided is None else beside(next(unguided).frames, chunk.frames))
                effect = chunk.effect
                if self.log is not None:
                    self.log.add(chunk.index, chunk.latents)
                progress.update(task, advance=1, fps=sink.num_frames / (time.perf_counter() - began))
            if effect is not None:
                sink.metadata["effect"] = dataclasses.asdict(effect)
        seconds = time.perf_counter() - began
        if place is not None:
            rows = zip(labels, excerpts, strict=True)
            labelled = [(f"{recipe.prompt}   |   {label}", excerpt.frames) for label, excerpt in rows]
            save_sheet(contact_sheet(labelled, numbers=excerpts[0].numbers), place)
        return Written(self.output, sink.num_frames, seconds, effect, str(place) if place else None)

    def _num_chunks(self) -> int:
        size = self.pipeline.preset.sampler.frames_per_chunk
        start = self.start or InitialLatents()
        return (self.pipeline.check_frames(start.frames or self.recipe.frames) - start.first_made) // size


def guarded(chunks: Iterator[Chunk], recipe: VideoRequest) -> Iterator[Chunk]:
    """The chunks, with running out of memory turned into an error that says what to change."""
    try:
        yield from chunks
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise NasaVideoError(_no_memory(recipe)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "out of memory" not in str(error).lower():
            raise
        raise NasaVideoError(_no_memory(recipe)) from error


def _no_memory(recipe: VideoRequest) -> str:
    width, height = recipe.width or 0, recipe.height or 0
    return (
        f"not enough memory for {width} x {height}; half of each side takes about a quarter: "
        f"--width {width // 2} --height {height // 2}; fewer --frames help a model without a window"
    )


def report(written: Written, recipe: VideoRequest, say: Callable[[str], None]) -> None:
    """Say what was made, how fast, and what the negative did."""
    rate = written.frames / written.seconds if written.seconds else math.inf
    say(f"{written.output}: {written.frames} frames in {written.seconds:.1f} s ({rate:.1f} FPS), seed {recipe.seed}")
    if written.contact_sheet:
        say(f"{written.contact_sheet}: contact sheet")
    if written.effect is not None:
        say(effect_text(written.effect))


def drain(chunks: Iterator[Chunk], unguided: Iterator[Chunk] | None) -> dict[str, Any]:
    """Make the same calls as the process that writes, in the same order."""
    for _ in chunks:
        if unguided is not None:
            next(unguided)
    return {}
