"""Samples of a benchmark, and the jobs that make them with a video or an image model, method by method.

model = model_of("sdxl-dmd2")                           # or "sprites", a preset file, a folder
plan = model.plan(samples, model.methods("none,nasa"), steps=(4,))
run_jobs([one.job for one in plan], Store(folder, model.suffix), model.new_worker)
"""

# F frames, H W height and width in pixels

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from pydantic import JsonValue

from nasa_video import __version__
from nasa_video.errors import InputError
from nasa_video.evaluation.identity import digest_of, tell_download
from nasa_video.evaluation.quality import quality
from nasa_video.evaluation.removal import Method, parse_methods
from nasa_video.evaluation.results import Arm
from nasa_video.evaluation.video_jobs import Prompt, VideoWorker, methods_of, model_dtype, plan_videos
from nasa_video.files.frames import Frames
from nasa_video.guidance.methods import Guidance
from nasa_video.guidance.terms import Negative
from nasa_video.jobs.store import GenerationJob, Measured, Worker
from nasa_video.models.presets import Source, find_preset
from nasa_video.video.recipe import restore_guidance, restore_negatives, store_guidance, store_negatives

if TYPE_CHECKING:
    from nasa_video.images.presets import ImagePreset

# The paper's, for HPSv2 (section 6 of arXiv 2412.02687).
QUALITY_NEGATIVE = "worst quality, low quality, ugly, duplicate, out of frame, deformed, blurry, bad anatomy, watermark"


@dataclass(frozen=True)
class Sample:
    """A picture or video to be made by every method.

    Attributes:
        id: unique in a benchmark; it names the prompt and the seed.
        negative: what the guided methods avoid.
        group: a style or kind, for tables.
    """

    id: str
    prompt: str
    negative: str
    seed: int
    group: str = ""


@dataclass(frozen=True)
class Planned:
    """A sample under one arm, and the job that makes it."""

    sample: Sample
    arm: Arm
    job: GenerationJob


class Model(Protocol):
    """A video or image model that jobs can be planned for without loading it."""

    name: str
    suffix: str
    new_worker: Callable[[], Worker]

    def methods(self, text: str) -> list[Method]:
        """``none,nasa:0.8`` with the model's own settings; InputError for what it cannot take."""
        ...

    def plan(self, samples: Sequence[Sample], methods: Sequence[Method], steps: Sequence[int | None]) -> list[Planned]:
        """One job for each sample, step count and method; what one sample needs follows each other."""
        ...


class VideoModel:
    """A causal video model; ``frames`` is the length of a video, None the model's own.

    ``first_steps`` as in ``SamplerSettings``.
    """

    suffix = ".mp4"

    def __init__(
        self, model: str, device: str | None = None, frames: int | None = None, first_steps: int | None = None
    ) -> None:
        preset = find_preset(model)
        self.preset = preset.model_copy(update={"sampler": preset.sampler.with_first_chunk_steps(first_steps)})
        self.name = self.preset.name
        self._frames = frames
        self._dtype = model_dtype(device)
        self.new_worker: Callable[[], Worker] = partial(VideoWorker, model, device, self._dtype)

    def methods(self, text: str) -> list[Method]:
        return methods_of(text, self.preset)

    def plan(self, samples: Sequence[Sample], methods: Sequence[Method], steps: Sequence[int | None]) -> list[Planned]:
        counts = [self.preset.sampler.default_steps if count is None else count for count in steps]
        planned = []
        for sample in samples:
            negatives = _negatives(sample, methods)
            for count in counts:
                jobs = plan_videos(
                    self.preset, [Prompt(sample.prompt)], methods, negatives, seeds=[sample.seed], steps=count,
                    frames=self._frames, dtype=self._dtype,
                )  # fmt: skip
                for method, job in zip(methods, jobs, strict=True):
                    planned.append(Planned(sample, arm_of(method, count, len(counts) > 1), job))
        return planned


class ImageModel:
    """A few-step image model; ``base`` and ``weights`` as in ``nasa-video image``."""

    suffix = ".png"

    def __init__(
        self, preset: ImagePreset, device: str | None = None, base: Path | None = None, weights: Path | None = None
    ) -> None:
        self.preset = preset
        self.name = preset.name
        self._device, self._base, self._weights = device, base, weights
        self.new_worker: Callable[[], Worker] = partial(ImageWorker, preset, device, base, weights)

    def methods(self, text: str) -> list[Method]:
        return parse_methods(text, _ImageGuides(self.preset))

    def plan(self, samples: Sequence[Sample], methods: Sequence[Method], steps: Sequence[int | None]) -> list[Planned]:
        sampling = self.preset.sampling
        checkpoint = image_checkpoint(self.preset, self._base, self._weights)
        scheduler = self.preset.scheduler
        settings: dict[str, JsonValue] = {
            "sampling": sampling.model_dump(mode="json"),
            "scheduler": scheduler.model_dump(mode="json") if scheduler else None,
            "dtype": _image_dtype(self.preset, self._device),
        }
        counts = [sampling.steps if count is None else count for count in steps]
        return [
            Planned(
                sample,
                arm_of(method, count, len(counts) > 1),
                GenerationJob(
                    prompt=sample.prompt, seed=sample.seed, model=self.preset.name, checkpoint=checkpoint, steps=count,
                    frames=1, width=sampling.width, height=sampling.height, version=__version__, label=method.label,
                    negatives=store_negatives(_negatives(sample, methods)) if method.guidance else (),
                    guidance=store_guidance(method.guidance), settings=settings,
                ),
            )
            for sample in samples
            for count in counts
            for method in methods
        ]  # fmt: skip


class ImageWorker:
    """Draws the pictures of jobs with one loaded model."""

    def __init__(self, preset: ImagePreset, device: str | None, base: Path | None, weights: Path | None) -> None:
        from nasa_video.images.pipeline import ImagePipeline

        self._pipeline = ImagePipeline.from_preset(preset, base=base, weights=weights, device=device)

    def __call__(self, job: GenerationJob, path: Path) -> Measured:
        """Write the picture as PNG; measured are ``quality`` (see Quality) and, guided, ``effect``."""
        from nasa_video.files.images import save_image

        steps = None if job.steps == self._pipeline.preset.sampling.steps else job.steps
        drawn = self._pipeline.draw(
            job.prompt, restore_negatives(job.negatives), restore_guidance(job.guidance), seed=job.seed, steps=steps
        )
        picture = drawn.images[0].convert("RGB")
        save_image(picture, path, {"nasa_video_job": job.model_dump(mode="json")})
        measured: Measured = {"quality": dataclasses.asdict(quality(np.asarray(picture)[None]))}
        if drawn.effect is not None:
            measured["effect"] = dataclasses.asdict(drawn.effect)
        return measured


class _ImageGuides:
    """What methods are made from."""

    def __init__(self, preset: ImagePreset) -> None:
        self._preset = preset

    def guidance(self, method: str = "nasa", scale: float | None = None) -> Guidance:
        return self._preset.make_guidance(method, scale)


def model_of(
    model: str,
    device: str | None = None,
    frames: int | None = None,
    base: Path | None = None,
    weights: Path | None = None,
    first_steps: int | None = None,
) -> Model:
    """A video or image model by name, preset file, folder or hub id.

    Raises:
        InputError: there is none, or an option is for the other kind.
    """
    from nasa_video.images.presets import find_image_preset, image_presets
    from nasa_video.models.presets import read_yaml, video_presets

    path = Path(model)
    is_file = path.suffix in (".yaml", ".yml") and path.is_file()
    if model in image_presets() or (is_file and read_yaml(path).get("kind") == "image"):
        if frames is not None or first_steps is not None:
            raise InputError(f"{model} draws pictures; leave out --frames and --first-steps")
        return ImageModel(find_image_preset(model), device, base, weights)
    if base is not None or weights is not None:
        raise InputError(f"--base and --weights are for image models, and {model} is none")
    if model not in video_presets() and not is_file and not path.is_dir() and "/" not in model:
        raise InputError(
            f"unknown model {model!r}; there are {', '.join((*video_presets(), *image_presets()))}, or give a folder, "
            "a preset file or a hub id"
        )
    return VideoModel(model, device, frames, first_steps)


def arm_of(method: Method, steps: int | None, several_steps: bool, first_steps: int | None = None) -> Arm:
    """The arm of a method at a step count, which is named where there are several, and that of the first chunk."""
    stored = store_guidance(method.guidance)
    label = method.label
    if several_steps:
        label += f", {steps} steps" + (f", first {first_steps}" if first_steps is not None else "")
    # As JSON has them: a schedule holds tuples.
    settings: dict[str, JsonValue] = stored.model_dump(mode="json")["settings"] if stored else {}
    if first_steps is not None:
        settings["first_steps"] = first_steps
    return Arm(label=label, method=method.name, scale=method.scale, steps=steps, settings=settings)


def image_checkpoint(preset: ImagePreset, base: Path | None, weights: Path | None) -> str:
    """What an image model is made of: SHA-256 over local files, and over the commits of hub repositories.

    What is missing is named, with size and licence, before it is asked for.

    Raises:
        InputError: a repository is not here and cannot be reached.
    """
    own = preset.weights
    inside = f"{own.subfolder}/" if own is not None and own.subfolder else ""
    probe = (own.file if own is not None else None) or f"{inside}config.json"
    wanted = [] if base is not None else [(preset.base.repo, Source(repo=preset.base.repo, file="model_index.json"))]
    if weights is None and own is not None and own.repo is not None:
        wanted.append((own.description, Source(repo=own.repo, file=probe)))
    for description, source in wanted:
        if source.find() is None:
            tell_download(f"{description} for {preset.name}", preset.licence)
    parts = [_identity(base, preset.base.repo, "model_index.json", preset)]
    if weights is not None:
        parts.append(_identity(weights, None, "", preset))
    elif own is not None:
        parts.append(_identity(None, own.repo, probe, preset))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _identity(path: Path | None, repo: str | None, probe: str, preset: ImagePreset) -> str:
    if path is not None:
        if not path.exists():
            raise InputError(f"{path} does not exist")
        return digest_of((path,))
    if repo is None:
        assert preset.weights is not None
        raise InputError(f"{preset.name}: {preset.weights.description}")
    from huggingface_hub import hf_hub_download

    try:
        found = Path(hf_hub_download(repo, probe))
    except Exception as error:  # the hub client raises many unrelated types
        raise InputError(
            f"{preset.name} needs {', '.join(preset.needs)}; {repo}/{probe} is not here and could not be downloaded "
            f"({type(error).__name__}). Download it where there is a network and set HF_HOME, or give folders with "
            "--base and --weights"
        ) from error
    # A commit of the repository says what every file of it holds.
    parts = found.parts
    commit = parts[len(parts) - 1 - parts[::-1].index("snapshots") + 1] if "snapshots" in parts else digest_of((found,))
    return f"{repo}@{commit}"


def _image_dtype(preset: ImagePreset, device: str | None) -> str:
    return "float32" if model_dtype(device) == "float32" else preset.dtype


def _negatives(sample: Sample, methods: Sequence[Method]) -> tuple[Negative, ...]:
    return (Negative(sample.negative),) if any(method.guidance for method in methods) else ()


def pictures_of(path: Path, count: int | None) -> Frames:
    """Up to ``count`` frames (F, H, W, 3) of a video, evenly spaced (None: all); or the one of an image file.

    Raises:
        InputError: it cannot be read.
    """
    from nasa_video.files.images import is_image, read_image

    if is_image(path):
        return read_image(path)[None]
    from nasa_video.files.source import VideoSource

    frames = VideoSource(path).read()
    if count is None:
        return frames
    wanted = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return np.ascontiguousarray(frames[wanted])
