"""Samples of a benchmark, and the jobs that make them with a video or an image model, method by method.

model = model_of("dmd2-sdxl-4step")                     # or "sprites", a preset file, a folder
plan = model.plan(samples, methods_of("none,nasa", model.preset), steps=(4,))
run_jobs([one.job for one in plan], Store(folder, model.suffix), model.new_worker)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from pydantic import JsonValue

from nasa_video import __version__
from nasa_video.errors import InputError
from nasa_video.evaluation.assets import checkpoint_hash, digest_of, tell_download
from nasa_video.evaluation.metrics import measure
from nasa_video.evaluation.results import Arm
from nasa_video.guidance.methods import Guidance, Settings, did_you_mean, parse_methods
from nasa_video.guidance.terms import Negative
from nasa_video.jobs.store import GenerationJob, Measured, Worker
from nasa_video.models.presets import SamplerSettings, Source, VideoPreset, find_preset
from nasa_video.video.request import VideoRequest, spell_fully

if TYPE_CHECKING:
    import torch

    from nasa_video.images.presets import ImagePreset
    from nasa_video.video.pipeline import VideoPipeline

# The paper's, for HPSv2 (section 6 of arXiv 2412.02687).
QUALITY_NEGATIVE = "worst quality, low quality, ugly, duplicate, out of frame, deformed, blurry, bad anatomy, watermark"
DTYPES = ("float32", "bfloat16", "float16")
VIDEO_CRF = 10
"""Of H.264: visually lossless, so that a score is the model's and not the encoder's."""


# --- what is compared


@dataclass(frozen=True)
class Method:
    """One way of guiding: a label such as "nasa:0.8" and its settings; None is unguided."""

    label: str
    guidance: Guidance | None

    @property
    def name(self) -> str:
        """The method's name without its scale."""
        return self.guidance.name if self.guidance else "none"

    @property
    def scale(self) -> float | None:
        """The method's scale."""
        return self.guidance.scale if self.guidance else None

    @property
    def spelling(self) -> str:
        """With every setting, whatever the model's own are."""
        return spell_fully(self.guidance) if self.guidance else "none"


class HasGuidance(Protocol):
    """A video or image preset."""

    @property
    def guidance(self) -> Settings:
        """By method, the model's own settings."""
        ...


def methods_of(text: str, preset: HasGuidance) -> list[Method]:
    """``none,nasa:0.8`` as methods with a model's settings; InputError as :func:`parse_methods`."""
    return [Method(label, guidance) for label, guidance in parse_methods(text, preset.guidance).items()]


def arm_of(method: Method, steps: int | None, several_steps: bool, first_steps: int | None = None) -> Arm:
    """The arm of a method at a step count, which is named where there are several, and that of the first chunk."""
    label = method.label
    if several_steps:
        label += f", {steps} steps" + (f", first {first_steps}" if first_steps is not None else "")
    # As JSON has them: a schedule holds tuples.
    settings = json.loads(json.dumps(method.guidance.values())) if method.guidance else {}
    if first_steps is not None:
        settings["first_steps"] = first_steps
    return Arm(label=label, method=method.name, scale=method.scale, steps=steps, settings=settings)


@dataclass(frozen=True)
class Sample:
    """A still or video to be made by every method.

    Attributes:
        id: unique in a benchmark; it names the prompt and the seed.
        negatives: what the guided methods avoid: one text, commas and all, or several.
        group: a style or kind, for tables.
        extended: what the model is given instead of the prompt, where prompts are extended.
        tags: for tables and judges, such as the prompt's dimensions.
    """

    id: str
    prompt: str
    negatives: str | tuple[Negative, ...]
    seed: int
    group: str = ""
    extended: str | None = None
    tags: Mapping[str, JsonValue] = dataclasses.field(default_factory=dict)

    @property
    def negative(self) -> str:
        """For people."""
        return self.negatives if isinstance(self.negatives, str) else ", ".join(one.text for one in self.negatives)

    def terms(self, method: Method) -> tuple[Negative, ...]:
        """The negatives under a method: unguided jobs carry none, so they are the same whatever the others avoid."""
        if method.guidance is None:
            return ()
        return (Negative(self.negatives),) if isinstance(self.negatives, str) else self.negatives


@dataclass(frozen=True)
class Planned:
    """A sample under one arm, and the job that makes it."""

    sample: Sample
    arm: Arm
    job: GenerationJob


class Model(Protocol):
    """A video or image model that jobs can be planned for without loading it."""

    preset: Any
    name: str
    suffix: str
    new_worker: Callable[[], Worker]

    def plan(self, samples: Sequence[Sample], methods: Sequence[Method], steps: Sequence[int | None]) -> list[Planned]:
        """One job for each sample, step count and method; the methods of one sample follow each other.

        So what a run leaves when it is stopped compares all methods on the same samples.
        """
        ...


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
            raise InputError(f"{model} makes stills; leave out --frames and --first-chunk-steps")
        return ImageModel(find_image_preset(model), device, base, weights)
    if base is not None or weights is not None:
        raise InputError(f"--base and --weights are for image models, and {model} is none")
    if model not in video_presets() and not is_file and not path.is_dir() and "/" not in model:
        known = [*video_presets(), *image_presets()]
        raise InputError(
            f"unknown model {model!r}{did_you_mean(model, known)}; there are {', '.join(known)}, or give a folder, a "
            "preset file or a hub id"
        )
    return VideoModel(model, device, frames, first_steps)


# --- videos


class VideoModel:
    """A causal video model; ``frames`` is the length of a video, None the model's own.

    Args:
        first_steps: as in ``SamplerSettings``.
        dtype: of the model, such as "float32"; it changes pixels, so it is part of a job.
    """

    suffix = ".mp4"

    def __init__(
        self,
        model: str,
        device: str | None = None,
        frames: int | None = None,
        first_steps: int | None = None,
        dtype: str | None = None,
    ) -> None:
        preset = find_preset(model)
        self.preset: VideoPreset = preset.model_copy(
            update={"sampler": preset.sampler.with_first_chunk_steps(first_steps)}
        )
        self.source, self.name = model, preset.name
        self.dtype = model_dtype(device, dtype)
        self.new_worker: Callable[[], Worker] = partial(VideoWorker, model, device, self.dtype)
        self._frames = frames

    def plan(self, samples: Sequence[Sample], methods: Sequence[Method], steps: Sequence[int | None]) -> list[Planned]:
        """See :class:`Model`."""
        video, sampler = self.preset.video, self.preset.sampler
        counts = [sampler.default_steps if count is None else count for count in steps]
        for count in counts:
            sampler.timesteps(count)
        settings = {
            "sampler": stored_sampler(sampler), "dtype": self.dtype, "fps": video.fps, "crf": VIDEO_CRF
        }  # fmt: skip
        size = {"width": video.width, "height": video.height}
        frames = video.frames if self._frames is None else self._frames
        make = partial(_job, self.name, checkpoint_hash(self.preset), size | {"frames": frames}, settings)
        return _plan(samples, methods, counts, make)


class VideoWorker:
    """Makes the videos of jobs with one loaded model, and measures them before they are encoded.

    Args:
        model: preset, folder or hub id, as in ``VideoPipeline.from_pretrained``.
        dtype: as planned; a machine of a cluster must not take another of its own accord.
    """

    def __init__(self, model: str, device: str | None = None, dtype: str | None = None) -> None:
        from nasa_video.video.pipeline import VideoPipeline

        self._pipeline = VideoPipeline.from_pretrained(model, device, None if dtype is None else check_dtype(dtype))

    def __call__(self, job: GenerationJob, path: Path) -> Measured:
        """Write the video as MP4; measured are ``quality`` (``measure``), ``out_of_range`` and, guided, ``effect``."""
        from nasa_video.files.ffmpeg_sink import FfmpegSink

        chunks = list(with_sampler_of(job.settings, self._pipeline).stream(job.request))
        frames = np.concatenate([chunk.frames for chunk in chunks])
        fps = cast(float, job.settings["fps"])
        with FfmpegSink(path, fps, {"job": job.model_dump(mode="json")}, crf=cast(int, job.settings["crf"])) as sink:
            sink.write(frames)
        shares = [chunk.out_of_range for chunk in chunks]
        return _measured(measure(frames), chunks[-1].effect) | {"out_of_range": float(np.mean(shares))}


def stored_sampler(sampler: SamplerSettings) -> JsonValue:
    """The loop as a job's settings hold it, under "sampler"."""
    stored: JsonValue = sampler.model_dump(mode="json", exclude_none=True)
    return stored


def with_sampler_of(settings: Mapping[str, JsonValue], pipeline: VideoPipeline) -> VideoPipeline:
    """The pipeline with the loop of a job's settings, which need not be the preset's own."""
    return pipeline.with_sampler(SamplerSettings.model_validate(settings["sampler"]))


def check_dtype(name: str) -> torch.dtype:
    """A dtype by name.

    Raises:
        InputError: models do not run in it.
    """
    import torch

    if name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    found: torch.dtype = getattr(torch, name)
    return found


def model_dtype(device: str | None, dtype: str | None = None) -> str:
    """The dtype asked for, or the one that a pipeline takes on a device by itself.

    Raises:
        InputError: there is no such device or dtype.
    """
    from nasa_video.models.loading import choose_device

    if dtype is not None:
        check_dtype(dtype)
        return dtype
    return "bfloat16" if choose_device(device).type == "cuda" else "float32"


# --- stills


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

    def plan(self, samples: Sequence[Sample], methods: Sequence[Method], steps: Sequence[int | None]) -> list[Planned]:
        """See :class:`Model`."""
        sampling, scheduler = self.preset.sampling, self.preset.scheduler
        settings: dict[str, JsonValue] = {
            "sampling": sampling.model_dump(mode="json"),
            "scheduler": scheduler.model_dump(mode="json") if scheduler else None,
            "dtype": "float32" if model_dtype(self._device) == "float32" else self.preset.dtype,
        }
        size = {"frames": 1, "width": sampling.width, "height": sampling.height}
        checkpoint = image_checkpoint(self.preset, self._base, self._weights)
        counts = [sampling.steps if count is None else count for count in steps]
        return _plan(samples, methods, counts, partial(_job, self.name, checkpoint, size, settings))


class ImageWorker:
    """Makes the stills of jobs with one loaded model."""

    def __init__(self, preset: ImagePreset, device: str | None, base: Path | None, weights: Path | None) -> None:
        from nasa_video.images.pipeline import ImagePipeline

        self._pipeline = ImagePipeline.from_preset(preset, base=base, weights=weights, device=device)

    def __call__(self, job: GenerationJob, path: Path) -> Measured:
        """Write the still as PNG; measured are ``quality`` (see ``measure``) and, guided, ``effect``."""
        from nasa_video.files.images import save_image

        request, preset = job.request, self._pipeline.preset
        assert request.prompt is not None
        steps = None if request.steps == preset.sampling.steps else request.steps
        drawn = self._pipeline.draw(
            request.prompt, request.negatives or (), request.guidance, seed=request.seed or 0, steps=steps
        )
        still = drawn.images[0].convert("RGB")
        save_image(still, path, {"nasa_video_job": job.model_dump(mode="json")})
        return _measured(measure(np.asarray(still)[None]), drawn.effect)


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
    if weights is not None or own is not None:
        parts.append(_identity(weights, own.repo if own is not None else None, probe, preset))
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


# --- both


def _plan(
    samples: Sequence[Sample],
    methods: Sequence[Method],
    counts: Sequence[int],
    make: Callable[[Sample, Method, int], GenerationJob],
) -> list[Planned]:
    return [
        Planned(sample, arm_of(method, count, len(counts) > 1), make(sample, method, count))
        for sample in samples
        for count in counts
        for method in methods
    ]


def _job(
    model: str,
    checkpoint: str,
    size: Mapping[str, Any],
    settings: dict[str, JsonValue],
    sample: Sample,
    method: Method,
    steps: int,
) -> GenerationJob:
    request = VideoRequest(
        prompt=sample.extended or sample.prompt, negatives=sample.terms(method), guidance=method.spelling, model=model,
        seed=sample.seed, steps=steps, version=__version__, **size,
    )  # fmt: skip
    short = sample.prompt if sample.extended is not None else None
    return GenerationJob(
        request=request, short=short, checkpoint=checkpoint, label=method.label, settings=settings,
        tags=dict(sample.tags),
    )  # fmt: skip


def _measured(quality: dict[str, float], effect: Any) -> Measured:
    return {"quality": quality} | ({} if effect is None else {"effect": dataclasses.asdict(effect)})
