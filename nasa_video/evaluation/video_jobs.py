"""Jobs that make videos: planned from prompts, seeds and methods, done by a pipeline."""

# F frames, H W height and width in pixels

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from pydantic import JsonValue

from nasa_video import __version__
from nasa_video.errors import InputError
from nasa_video.evaluation.identity import checkpoint_hash
from nasa_video.evaluation.quality import quality
from nasa_video.evaluation.removal import Method, parse_methods
from nasa_video.files.ffmpeg_sink import FfmpegSink
from nasa_video.guidance.terms import Negative
from nasa_video.jobs.store import GenerationJob, Measured
from nasa_video.models.loading import choose_device
from nasa_video.models.presets import SamplerSettings, VideoPreset
from nasa_video.video.pipeline import VideoPipeline
from nasa_video.video.recipe import restore_guidance, restore_negatives, store_guidance, store_negatives

DTYPES = ("float32", "bfloat16", "float16")
VIDEO_CRF = 10
"""Of H.264: visually lossless, so that a score is the model's and not the encoder's."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of a benchmark.

    Attributes:
        text: as the benchmark has it, by which its scores are named.
        extended: what the model is given instead, where prompts are extended.
        tags: for tables, such as its dimensions.
    """

    text: str
    extended: str | None = None
    tags: dict[str, JsonValue] = dataclasses.field(default_factory=dict)


def methods_of(text: str, preset: VideoPreset) -> list[Method]:
    """``none,nasa:0.8`` as methods with the preset's settings, without loading the model.

    Raises:
        InputError: as ``parse_methods``.
    """
    return parse_methods(text, cast(VideoPipeline, _Settings(preset)))


class _Settings:
    """The part of a pipeline that methods are made from: its preset."""

    guidance = VideoPipeline.guidance

    def __init__(self, preset: VideoPreset) -> None:
        self.preset = preset


def plan_videos(
    preset: VideoPreset,
    prompts: Iterable[Prompt],
    methods: Sequence[Method],
    negatives: Sequence[Negative],
    *,
    seeds: Sequence[int],
    steps: int | None = None,
    frames: int | None = None,
    dtype: str,
) -> list[GenerationJob]:
    """One job for each prompt, seed and method; the methods of one prompt and seed follow each other.

    So what a run leaves when it is stopped compares all methods on the same prompts. The unguided jobs carry no
    negatives: they are the same whatever the others avoid.

    Args:
        dtype: of the model, such as "float32"; it changes pixels, so it is part of a job.
    """
    video, sampler = preset.video, preset.sampler
    count = sampler.default_steps if steps is None else steps
    sampler.timesteps(count)
    settings: dict[str, JsonValue] = {
        "sampler": stored_sampler(sampler),
        "dtype": dtype,
        "fps": video.fps,
        "crf": VIDEO_CRF,
    }
    checkpoint = checkpoint_hash(preset)
    return [
        GenerationJob(
            prompt=prompt.text,
            text=prompt.extended,
            seed=seed,
            model=preset.name,
            checkpoint=checkpoint,
            steps=count,
            frames=video.frames if frames is None else frames,
            width=video.width,
            height=video.height,
            version=__version__,
            label=method.label,
            negatives=store_negatives(tuple(negatives)) if method.guidance else (),
            guidance=store_guidance(method.guidance),
            settings=settings,
            tags=prompt.tags,
        )
        for prompt in prompts
        for seed in seeds
        for method in methods
    ]


def stored_sampler(sampler: SamplerSettings) -> JsonValue:
    """The loop as a job's settings hold it, under "sampler"."""
    stored: JsonValue = sampler.model_dump(mode="json", exclude_none=True)
    return stored


def with_sampler_of(settings: Mapping[str, JsonValue], pipeline: VideoPipeline) -> VideoPipeline:
    """The pipeline with the loop of a job's settings, which need not be the preset's own."""
    return pipeline.with_sampler(SamplerSettings.model_validate(settings["sampler"]))


class VideoWorker:
    """Makes the videos of jobs with one loaded model, and measures them before they are encoded.

    Args:
        model: preset, folder or hub id, as in ``VideoPipeline.from_pretrained``.
        dtype: as planned; a machine of a cluster must not take another of its own accord.
    """

    def __init__(self, model: str, device: str | None = None, dtype: str | None = None) -> None:
        wanted = None if dtype is None else check_dtype(dtype)
        self._pipeline = VideoPipeline.from_pretrained(model, device, wanted)

    def __call__(self, job: GenerationJob, path: Path) -> Measured:
        """Write the video as MP4; measured are ``quality`` (see Quality), ``out_of_range`` and, guided, ``effect``."""
        chunks = list(
            with_sampler_of(job.settings, self._pipeline).stream(
                job.text or job.prompt,
                negative=restore_negatives(job.negatives) or None,
                guidance=restore_guidance(job.guidance),
                seed=job.seed,
                frames=job.frames,
                steps=job.steps,
                width=job.width,
                height=job.height,
            )
        )
        frames = np.concatenate([chunk.frames for chunk in chunks])
        fps = cast(float, job.settings["fps"])
        with FfmpegSink(path, fps, {"job": job.model_dump(mode="json")}, crf=cast(int, job.settings["crf"])) as sink:
            sink.write(frames)
        measured: Measured = {
            "quality": dataclasses.asdict(quality(frames)),
            "out_of_range": float(np.mean([chunk.out_of_range for chunk in chunks])),
        }
        effect = chunks[-1].effect
        if effect is not None:
            measured["effect"] = dataclasses.asdict(effect)
        return measured


def check_dtype(name: str) -> torch.dtype:
    """A dtype by name.

    Raises:
        InputError: models do not run in it.
    """
    if name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    found: torch.dtype = getattr(torch, name)
    return found


def model_dtype(device: str | None, dtype: str | None = None) -> str:
    """The dtype asked for, or the one that a pipeline takes on a device by itself.

    Raises:
        InputError: there is no such device or dtype.
    """
    if dtype is not None:
        check_dtype(dtype)
        return dtype
    return "bfloat16" if choose_device(device).type == "cuda" else "float32"
