"""Presets: which weights a model is made of, how its loop runs, and whether they are here."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, model_validator

from causvid_adapter.errors import ShapeError
from causvid_adapter.window import OnChange as Change
from causvid_adapter.window import Window, read_on_change
from nasa_video.errors import InputError
from nasa_video.guidance.methods import check_settings, did_you_mean, find_method
from nasa_video.models.sources import Source as Source
from nasa_video.models.sources import Strict as Strict
from nasa_video.models.sources import package_root
from nasa_video.models.stored import WEIGHT_SUFFIXES

if TYPE_CHECKING:
    from causvid_adapter import FlowMatchSchedule

DEFAULT_MODEL = "sprites"
# Keys as presets and stored jobs of 0.1 have them.
_ALSO_ALONE = AliasChoices("without_history", "alone")
_ALSO_FIRST_STEPS = AliasChoices("first_chunk_steps", "first_steps")


class WordLlamaText(Strict):
    """The offline text encoder of the shipped model."""

    kind: Literal["wordllama"]
    max_tokens: int = Field(gt=0)


class Umt5Text(Source):
    """UMT5, Wan's text encoder, in transformers' layout."""

    kind: Literal["umt5"]
    tokenizer_folder: str = "tokenizer"
    tokenizer_also: tuple[str, ...] = ()
    max_tokens: int = Field(default=512, gt=0)

    @property
    def tokenizer(self) -> tuple[Source, ...]:
        """The tokenizer's source, where it is in a repository; else it lies beside the encoder."""
        if self.repo is None:
            return ()
        return (Source(repo=self.repo, folder=self.tokenizer_folder, also=self.tokenizer_also),)


class LoraSource(Source):
    """A LoRA that is part of a published model."""

    scale: float = 1.0


class TinyDecoderSource(Source):
    """A tiny decoder, and the scale of the latents that it was trained on."""

    latents: Literal["normalized", "raw"] = "normalized"


class Components(Strict):
    """The parts of a video model; ``config`` is the transformer's, for checkpoints that carry none."""

    transformer: Source
    vae: Source
    text_encoder: Annotated[WordLlamaText | Umt5Text, Field(discriminator="kind")]
    config: dict[str, Any] | None = None
    loras: tuple[LoraSource, ...] = ()
    tiny_decoder: TinyDecoderSource | None = None

    @property
    def extras(self) -> tuple[Source, ...]:
        """What an option needs (``--decoder tiny``)."""
        return () if self.tiny_decoder is None else (self.tiny_decoder,)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Everything that has to be on the machine."""
        encoder: tuple[Source, ...] = ()
        if isinstance(self.text_encoder, Umt5Text):
            encoder = (self.text_encoder, *self.text_encoder.tokenizer)
        return (self.transformer, *self.loras, self.vae, *encoder)


OnChange = Annotated[Change, BeforeValidator(lambda value: read_on_change(value) if isinstance(value, str) else value)]
"""As causvid_adapter.OnChange; names of 0.1 are read too."""


class FirstChunkSteps(Strict):
    """Steps of a chunk with nothing before it: see ``FlowMatchSchedule``."""

    timesteps: tuple[float, ...]
    euler_steps: int = Field(default=0, ge=0)


class SamplerSettings(Strict):
    """The chunk loop; see causvid_adapter.ChunkSampler, FlowMatchSchedule and rollouts.

    ``rollout_frames`` are latent frames: a longer video is made in rollouts of that length, which overlap by a chunk.
    ``on_change``: what becomes of the window where prompt, negatives or guidance change, unless somebody says.
    ``first_chunk_steps``: the number of steps of a scene's first chunks (the first, and those that show something new)
    where it is another than the rest's, as in Causal-Forcing's models of one and two steps.
    ``without_history``: by the number of steps, the timesteps of chunks with nothing before them where they differ.
    """

    shift: float = Field(gt=0)
    warp: bool = False
    steps: dict[int, tuple[float, ...]] | Literal["any"]
    without_history: dict[int, FirstChunkSteps] | None = Field(default=None, validation_alias=_ALSO_ALONE)
    default_steps: int = Field(gt=0)
    first_chunk_steps: int | None = Field(default=None, gt=0, validation_alias=_ALSO_FIRST_STEPS)
    frames_per_chunk: int = Field(gt=0)
    window_frames: int | None = None
    sink_frames: int = 0
    rollout_frames: int | None = Field(default=None, gt=0)
    rope: Literal["absolute", "window"] = "absolute"
    on_change: OnChange = "keep"

    @model_validator(mode="after")
    def _steps_fit(self) -> SamplerSettings:
        rollout, chunk = self.rollout_frames, self.frames_per_chunk
        if rollout is not None and (rollout <= chunk or rollout % chunk):
            raise ValueError(f"rollout_frames must be a multiple of {chunk} and more than one chunk, got {rollout}")
        if self.steps != "any":
            if self.default_steps not in self.steps:
                raise ValueError(f"default_steps {self.default_steps} is not among steps {sorted(self.steps)}")
            for count, timesteps in self.steps.items():
                if count != len(timesteps):
                    raise ValueError(f"steps: {count} lists {len(timesteps)} timesteps")
            for count, own in (self.without_history or {}).items():
                if count not in self.steps:
                    raise ValueError(f"without_history: {count} is not among steps {sorted(self.steps)}")
                if count != len(own.timesteps):
                    raise ValueError(f"without_history: {count} lists {len(own.timesteps)} timesteps")
                if own.euler_steps >= count:
                    raise ValueError(
                        f"without_history: {count} steps cannot have {own.euler_steps} Euler steps, give fewer"
                    )
            if self.first_chunk_steps is not None and self.first_chunk_steps not in self.steps:
                raise ValueError(f"first_chunk_steps {self.first_chunk_steps} is not among steps {sorted(self.steps)}")
        return self

    @property
    def window(self) -> Window:
        """What a chunk may look back on."""
        return Window(self.window_frames, self.sink_frames, self.rope)

    def with_window(self, frames: int | None, sink: int | None, rope: str | None) -> SamplerSettings:
        """The same loop with another window and sink in latent frames (a window of 0 is none) or other positions.

        Raises:
            InputError: no such positions, or the window cannot hold its sink and a chunk.
        """
        window = self.window_frames if frames is None else frames or None
        if rope not in (None, "absolute", "window"):
            raise InputError(f"--rope must be absolute or window, got {rope!r}")
        if window is None and sink:
            raise InputError(f"a sink of {sink} latent frames needs a window; give --window too")
        kept = 0 if window is None else self.sink_frames if sink is None else sink
        update = {"window_frames": window, "sink_frames": kept, "rope": rope or self.rope}
        changed = self.model_copy(update=update)
        try:
            changed.window.check(self.frames_per_chunk)
        except ShapeError as error:
            raise InputError(str(error)) from error
        return changed

    def with_first_chunk_steps(self, steps: int | None) -> SamplerSettings:
        """The same loop with another number of steps where a scene opens; None changes nothing.

        Raises:
            InputError: the model was not made for it.
        """
        if steps is None:
            return self
        self.timesteps(steps)
        return self.model_copy(update={"first_chunk_steps": steps})

    def without_end(self, rollout_frames: int | None, window_frames: int) -> SamplerSettings:
        """The same loop for a video without end, whose memory must have one.

        Args:
            rollout_frames: of the video; with rollouts, or a window of its own, nothing changes.
            window_frames: what a loop gets that would remember everything.
        """
        if rollout_frames is not None or self.window_frames is not None:
            return self
        return self.model_copy(update={"window_frames": window_frames})

    def timesteps(self, num_steps: int) -> tuple[float, ...]:
        """The timesteps of a step count.

        Raises:
            InputError: the model was not made for it.
        """
        if self.steps == "any":
            if not 1 <= num_steps <= 200:
                raise InputError(f"steps must be from 1 to 200, got {num_steps}")
            shifted = [
                self.shift * u / (1 + (self.shift - 1) * u) for u in (1 - i / num_steps for i in range(num_steps))
            ]
            return tuple(1000 * sigma for sigma in shifted)
        if num_steps not in self.steps:
            allowed = ", ".join(str(count) for count in sorted(self.steps))
            raise InputError(f"this model runs in {allowed} steps, got {num_steps}")
        return self.steps[num_steps]

    def schedule(self, num_steps: int) -> FlowMatchSchedule:
        """The noise levels of a step count.

        Raises:
            InputError: the model was not made for it.
        """
        from causvid_adapter import FlowMatchSchedule

        own = (self.without_history or {}).get(num_steps)
        first = None if own is None else FlowMatchSchedule(self.shift, own.timesteps, self.warp, own.euler_steps)
        return FlowMatchSchedule(self.shift, self.timesteps(num_steps), self.warp, without_history=first)


class VideoSettings(Strict):
    """Sizes of the pictures that the model was trained on; ``upscale`` is how much larger files are written."""

    width: int = Field(gt=0)
    height: int = Field(gt=0)
    fps: int = Field(gt=0)
    frames: int = Field(gt=0)
    upscale: int = Field(default=1, ge=1, le=16)


class VideoPreset(Strict):
    """A complete video model."""

    name: str
    kind: Literal["video"]
    title: str
    licence: str
    components: Components
    sampler: SamplerSettings
    video: VideoSettings
    guidance: Annotated[dict[str, dict[str, Any]], AfterValidator(check_settings)] = Field(default_factory=dict)
    default_guidance: Annotated[str, AfterValidator(lambda name: find_method(name).name)] = "nasa"
    vocabulary: str | None = None

    @property
    def needs(self) -> list[str]:
        """What must be here, for people."""
        return [source.description for source in self.components.sources]

    @property
    def present(self) -> bool:
        """Whether every part is on this machine."""
        return all(source.find() is not None for source in self.components.sources)


def configs_dir() -> Path:
    """Folder of the presets: inside the wheel, or beside the package in a checkout."""
    packaged = package_root() / "configs"
    return packaged if packaged.is_dir() else package_root().parent / "configs"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a mapping of settings, got {type(data).__name__}")
    return data


def parse_preset(path: Path) -> VideoPreset:
    """Read and validate one preset file.

    Raises:
        InputError: an unknown key or a wrong value; the message names each.
    """
    return VideoPreset.validated(read_yaml(path), f"{path.name} is not a valid preset")


@cache
def video_presets() -> dict[str, VideoPreset]:
    """All shipped video presets by name."""
    presets = [parse_preset(path) for path in sorted((configs_dir() / "video").glob("*.yaml"))]
    return {preset.name: preset for preset in presets}


def find_preset(model: str | os.PathLike[str]) -> VideoPreset:
    """The preset of a name, a preset file, a checkpoint of any causal Wan, a folder in diffusers' layout, or a hub id.

    Raises:
        InputError: it is none of them; the message lists what there is.
    """
    from nasa_video.models.own import preset_of_checkpoint, preset_of_folder, preset_of_repository

    presets = video_presets()
    if str(model) in presets:
        return presets[str(model)]
    path = Path(model).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return parse_preset(path)
    if path.is_dir():
        return preset_of_folder(path)
    if path.suffix in WEIGHT_SUFFIXES and path.is_file():
        return preset_of_checkpoint(path)
    if str(model).count("/") == 1 and path.suffix not in WEIGHT_SUFFIXES and not str(model).startswith((".", "/", "~")):
        return preset_of_repository(str(model))
    if path.suffix in (".yaml", ".yml", *WEIGHT_SUFFIXES) or "/" in str(model):
        raise InputError(f"model {str(model)!r}: no such file or folder")
    raise InputError(
        f"unknown model {str(model)!r}{did_you_mean(str(model), list(presets))}; use a preset ({', '.join(presets)}), "
        "a checkpoint file, a folder, or a hub id owner/name"
    )
