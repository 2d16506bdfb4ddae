"""One run of ``generate``: from what was asked for to a finished file and what to say about it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.progress import Progress

from causvid_adapter.accelerate.parallel import parallelise
from nasa_video import __version__
from nasa_video.cli.writing import guarded, report, take_part, write
from nasa_video.errors import InputError
from nasa_video.files.metadata import read_metadata
from nasa_video.guidance.attention import AttentionError, Backend
from nasa_video.guidance.methods import Guidance
from nasa_video.guidance.schedule import ScaleSchedule
from nasa_video.jobs.processes import Processes
from nasa_video.models.loading import DecoderKind, choose_device, default_dtype
from nasa_video.models.memory_plan import PlanRequest, check_plan, make_plan
from nasa_video.models.placement import Placement, WeightKind
from nasa_video.models.presets import DEFAULT_MODEL, OnChange, find_preset
from nasa_video.video.controller import PromptWarning
from nasa_video.video.inputs import Start, StoredStart, read_start
from nasa_video.video.pipeline import Chunk, CompileKind, VideoPipeline
from nasa_video.video.recipe import (
    Recipe,
    StoredLora,
    StoredWindow,
    parse_lora,
    restore_guidance,
    restore_negatives,
    store_guidance,
    store_negatives,
)
from nasa_video.video.resume import ResumeLog
from nasa_video.video.timeline import Cue, CueOf, Timeline, parse_negative


@dataclass(frozen=True)
class Request:
    """The options of ``generate``; None means "not given"."""

    prompt: str | None = None
    negatives: tuple[str, ...] = ()
    scale: float | None = None
    guidance: str | None = None
    model: str | None = None
    seed: int | None = None
    steps: int | None = None
    first_steps: int | None = None
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    device: str | None = None
    timeline: Path | None = None
    on_change: OnChange | None = None
    compare: bool = False
    source: Path | None = None
    start: StoredStart | None = None
    loras: tuple[str, ...] = ()
    guide_steps: tuple[float, float] = (0.0, 1.0)
    guide_layers: tuple[float, float] = (0.0, 1.0)
    guide_clean: bool = True
    scale_steps: tuple[float, ...] = ()
    scale_layers: tuple[float, ...] = ()
    neg_padding: bool | None = None
    fold: bool | None = None
    attention: str = "sdpa"
    decoder: str | None = None
    resume: bool = False
    memory: str | None = None
    weights: str | None = None
    offload: bool | None = None
    decode_ahead: int = 0
    compiled: str = "off"
    rollout: int | None = None
    window: StoredWindow = field(default_factory=StoredWindow)
    split: bool = False
    extend_prompt: bool = False
    rank: int = 0
    """Of a split run, whose processes all make the video; the first writes it."""


Watch = Callable[
    [VideoPipeline, Recipe, Iterator[Chunk], Iterator[Chunk] | None], tuple[Iterator[Chunk], Iterator[Chunk] | None]
]
"""Looks at the guided and the unguided chunks as they pass (see serve.preview)."""


def run(
    request: Request,
    output: str,
    make_progress: Callable[[], Progress],
    say: Callable[[str], None],
    watch: Watch | None = None,
    load: Callable[..., VideoPipeline] = VideoPipeline.from_pretrained,
) -> dict[str, Any]:
    """Generate and write; returns what ``--json`` prints.

    Raises:
        NasaVideoError: something that was asked for cannot be done; before anything is generated wherever it can be
            known before.
    """
    stored = Recipe.of_metadata(read_metadata(request.source), str(request.source)) if request.source else None
    given = Timeline.read(request.timeline) if request.timeline else None
    timeline = given or (stored.timeline if stored else None)
    if request.fps is not None and not (math.isfinite(request.fps) and 0 < request.fps <= 240):
        raise InputError(f"fps must be above 0 and at most 240, got {request.fps}")
    name = str(_first(request.model, given and given.model, stored and stored.model, DEFAULT_MODEL))
    if request.extend_prompt and find_preset(name).vocabulary != "sprites":
        raise InputError(
            f"--extend-prompt knows the words of the sprites model, not those of {name}; have a language model write "
            "the details into the prompt, as Wan's own tools do"
        )
    loras = tuple(parse_lora(text) for text in request.loras) or (stored.loras if stored else ())
    placement = _placement(request, stored, timeline, name, say)
    window = request.window.over(stored.window if stored else StoredWindow())
    pipeline = _load(request, stored, name, loras, placement, load)
    pipeline = pipeline.with_sampler(window.of(pipeline.preset.sampler))
    recipe = _resolve(request, stored, timeline, name, pipeline)
    pipeline = pipeline.opening_in(recipe.first_steps)
    recipe = recipe.model_copy(update={"loras": loras, "placement": placement, "window": window})
    if request.extend_prompt:
        recipe = _with_extended_prompts(recipe, pipeline)
        say(f"prompt: {recipe.prompt}")
    start = None
    if recipe.start is not None:
        start = read_start(recipe.start, pipeline, recipe.width, recipe.height)
        recipe = recipe.model_copy(update={"frames": start.frames})
    log = None
    if request.resume:
        log, start = _resumed(output, recipe, start)
    cues = _cues(recipe, pipeline)
    warn_of_unknown_words(pipeline, recipe)
    chunks = guarded(_stream(pipeline, recipe, cues, start), recipe)
    unguided = None
    if recipe.compare:
        unguided = guarded(_stream(pipeline, recipe, lambda chunk: cues(chunk).unguided, start), recipe)
    if watch is not None:
        chunks, unguided = watch(pipeline, recipe, chunks, unguided)
    if request.rank > 0:
        return take_part(chunks, unguided, recipe)
    written = write(chunks, unguided, recipe, pipeline, output, make_progress, start, log)
    if log is not None:
        log.close()
    report(written, recipe, say)
    return {
        "output": written.output,
        "frames": written.frames,
        "fps": recipe.fps,
        "seconds": round(written.seconds, 3),
        "seed": recipe.seed,
        "model": recipe.model,
        "guidance": recipe.guidance.method if recipe.guidance and recipe.anything_negative else "none",
        "effect": dataclasses.asdict(written.effect) if written.effect else None,
        "contact_sheet": written.contact_sheet,
    }


def _load(
    request: Request,
    stored: Recipe | None,
    name: str,
    loras: tuple[StoredLora, ...],
    placement: Placement,
    load: Callable[..., VideoPipeline],
) -> VideoPipeline:
    try:
        pipeline = load(
            name,
            request.device,
            attention=cast(Backend, request.attention),
            fold_padding=_fold(request, stored),
            loras=[(Path(lora.path), lora.scale) for lora in loras],
            decoder=_decoder(request, stored),
            placement=placement,
            decode_ahead=request.decode_ahead,
            compiled=cast(CompileKind, request.compiled),
        )
    except (AttentionError, ValueError) as error:
        raise InputError(str(error)) from error
    if request.split:
        parallelise(pipeline.model)
    return pipeline


def _placement(
    request: Request, stored: Recipe | None, timeline: Timeline | None, name: str, say: Callable[[str], None]
) -> Placement:
    """How the model is placed, planned before anything of it is downloaded; says what it takes.

    Raises:
        InputError: the run does not fit.
    """
    preset, device = find_preset(name), choose_device(request.device)
    window = request.window.over(stored.window if stored else StoredWindow())
    preset = preset.model_copy(update={"sampler": window.of(preset.sampler)})
    start = request.start or (stored.start if stored else None)
    guidance = request.guidance or (stored.guidance.method if stored and stored.guidance else None)
    compare = request.compare or bool(stored and stored.compare)
    plan = make_plan(
        preset, device, default_dtype(device),
        PlanRequest(
            width=stored.width if request.width is None and stored else request.width,
            height=stored.height if request.height is None and stored else request.height,
            frames=(start.planned_frames(preset.sampler.frames_per_chunk) if start else None)
            or request.frames
            or (timeline.frames if timeline else None)
            or (stored.frames if stored else None),
            memory=request.memory,
            weights=cast(WeightKind | None, request.weights),
            offload=request.offload,
            tiny_decoder=_decoder(request, stored) == "tiny",
            processes=Processes.of_environment().world if request.split else 1,
            prompts=_texts(request, stored, timeline),
            overlapped=request.decode_ahead > 0,
            rollout=request.rollout if request.rollout is not None or stored is None else stored.rollout,
            branches=(2 if guidance == "cfg" else 1) + compare,
            videos=2 if compare else 1,
        ),
        stored.placement if stored and request.memory is None else None,
    )  # fmt: skip
    if plan is None:
        return Placement(cast(WeightKind, request.weights or "plain"), offload=bool(request.offload))
    return check_plan(plan, request.memory, say if request.rank == 0 else lambda line: None)


def _texts(request: Request, stored: Recipe | None, timeline: Timeline | None) -> list[str]:
    """Every prompt and negative that the run will encode."""
    texts = [text for text in (request.prompt or (stored.prompt if stored else None),) if text is not None]
    texts += [parse_negative(text).text for text in request.negatives]
    if stored and not request.negatives:
        texts += [negative.text for negative in stored.negatives]
    for entry in timeline.timeline if timeline else ():
        texts += [entry.prompt] if entry.prompt is not None else []
        texts += [parse_negative(text).text for text in entry.negatives or ()]
    return list(dict.fromkeys(texts)) or [""]


def _resolve(
    request: Request, stored: Recipe | None, timeline: Timeline | None, name: str, pipeline: VideoPipeline
) -> Recipe:
    preset = pipeline.preset
    replayed = timeline if request.timeline else None
    first = timeline.timeline[0] if timeline else None
    given = (request.prompt, stored.prompt if stored else None, first.prompt if first else None)
    prompt = next((text for text in given if text is not None), None)
    if prompt is None:
        raise InputError('say what the video should show: nasa-video generate "a red ball bouncing"')
    negatives = tuple(parse_negative(text) for text in request.negatives)
    if not negatives and stored:
        negatives = restore_negatives(stored.negatives)
    recipe = Recipe(
        prompt=_without_surrogates(prompt),
        negatives=store_negatives(negatives),
        model=name,
        seed=_first(request.seed, replayed and replayed.seed, stored and stored.seed, 0),
        steps=_first(request.steps, replayed and replayed.steps, stored and stored.steps, preset.sampler.default_steps),
        first_steps=next((s.first_steps for s in (request, replayed, stored) if s and s.first_steps is not None), None),
        frames=_first(request.frames, replayed and replayed.frames, stored and stored.frames, preset.video.frames),
        width=_first(request.width, stored and stored.width, preset.video.width),
        height=_first(request.height, stored and stored.height, preset.video.height),
        fps=_first(request.fps, stored and stored.fps, preset.video.fps),
        timeline=timeline,
        on_change=_first(request.on_change, stored and stored.on_change, preset.sampler.on_change),
        fold_padding=_fold(request, stored),
        decoder=_decoder(request, stored),
        compare=request.compare or bool(stored and stored.compare),
        rollout=request.rollout if request.rollout is not None or stored is None else stored.rollout,
        start=request.start or (stored.start if stored else None),
        version=__version__,
    )
    return recipe.model_copy(update={"guidance": store_guidance(_guidance(request, stored, recipe, pipeline))})


def _with_extended_prompts(recipe: Recipe, pipeline: VideoPipeline) -> Recipe:
    """The recipe with what its prompts leave open written into them; all of them by the video's seed."""
    from nasa_video.sprites.prompt_extension import extend_prompt

    def extended(prompt: str | None) -> str | None:
        return None if prompt is None else extend_prompt(prompt, recipe.seed, pipeline.text_encoder)

    timeline = recipe.timeline
    if timeline is not None:
        entries = tuple(e.model_copy(update={"prompt": extended(e.prompt)}) for e in timeline.timeline)
        timeline = timeline.model_copy(update={"timeline": entries})
    return recipe.model_copy(update={"prompt": extended(recipe.prompt), "timeline": timeline})


def _guidance(request: Request, stored: Recipe | None, recipe: Recipe, pipeline: VideoPipeline) -> Guidance | None:
    negative = recipe.anything_negative
    if request.guidance == "none":
        if negative:
            raise InputError("--guidance none leaves the negative prompts without effect; leave out one of the two")
        return None
    if request.guidance is None and request.scale is None and stored and stored.guidance:
        guidance = restore_guidance(stored.guidance)
        assert guidance is not None
    else:
        method = request.guidance or (stored.guidance.method if stored and stored.guidance else None)
        guidance = pipeline.guidance(method, request.scale)
    schedule = ScaleSchedule(
        *request.guide_steps, *request.guide_layers, request.guide_clean, request.scale_steps, request.scale_layers
    )
    changes: dict[str, Any] = {}
    if schedule != ScaleSchedule():
        changes["schedule"] = schedule
    if request.neg_padding is not None:
        changes["negative_padding"] = request.neg_padding
    if changes and guidance.name == "cfg":
        raise InputError(f"{', '.join(changes)} is for guidance inside attention, not for cfg")
    if (request.guidance or request.scale is not None) and not negative:
        warnings.warn("no negative prompt was given, so guidance has nothing to do; add --neg TEXT", PromptWarning, 2)
    return dataclasses.replace(guidance, **changes)


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _fold(request: Request, stored: Recipe | None) -> bool:
    return bool(_first(request.fold, stored and stored.fold_padding, True))


def _decoder(request: Request, stored: Recipe | None) -> DecoderKind:
    return cast(DecoderKind, _first(request.decoder, stored and stored.decoder, "full"))


def _without_surrogates(text: str) -> str:
    # Bytes of the command line that are no UTF-8 arrive as lone surrogates, which neither a tokenizer nor a file takes.
    return text.encode("utf-8", "replace").decode("utf-8")


def _cues(recipe: Recipe, pipeline: VideoPipeline) -> CueOf:
    guidance = restore_guidance(recipe.guidance)
    first = Cue.of(recipe.prompt, restore_negatives(recipe.negatives), guidance)
    if recipe.timeline is None:
        return lambda chunk: first

    return recipe.timeline.cues(first, pipeline.guide, lambda chunk: pipeline.frames_until(chunk) / recipe.fps)


def _resumed(output: str, recipe: Recipe, start: Start | None) -> tuple[ResumeLog, Start | None]:
    """The log of a run that can be resumed, and what it starts from: also what an earlier run finished."""
    if output == "-" or recipe.compare:
        raise InputError("--resume is for a file or folder of one video, not for a stream or --compare")
    log = ResumeLog(output, recipe)
    made = log.open()
    if made is None:
        return log, start
    start = start or Start(np.zeros((0, recipe.height, recipe.width, 3), np.uint8))
    # On the CPU: the latents of hours need not be on the device at once.
    prefix = made if start.prefix is None else torch.cat([start.prefix.cpu(), made], dim=1)
    return log, dataclasses.replace(start, prefix=prefix, shown_prefix=made.shape[1])


def _stream(pipeline: VideoPipeline, recipe: Recipe, cues: CueOf, start: Start | None) -> Iterator[Chunk]:
    return pipeline.stream(
        recipe.prompt,
        cues=cues,
        seed=recipe.seed,
        frames=recipe.frames,
        steps=recipe.steps,
        width=recipe.width,
        height=recipe.height,
        on_change=recipe.on_change,
        prefix=start.prefix if start else None,
        source=start.source if start else None,
        strength=start.strength if start else 1.0,
        shown_prefix=start.shown_prefix if start else 0,
        rollout=recipe.rollout,
    )


def warn_of_unknown_words(pipeline: VideoPipeline, recipe: Recipe) -> None:
    """Say kindly when a prompt has words that a model with a small world cannot know."""
    if pipeline.preset.vocabulary != "sprites":
        return
    from nasa_video.sprites.vocabulary import unknown_words

    texts = [recipe.prompt, *(negative.text for negative in recipe.negatives)]
    unknown = sorted({word for text in texts for word in unknown_words(text)})
    if unknown:
        warnings.warn(
            f"the shipped model lives in a small world of coloured shapes and has never seen {', '.join(unknown)}; "
            'try "a red ball bouncing on a checkered background", or a real model (nasa-video models)',
            PromptWarning,
            stacklevel=2,
        )
