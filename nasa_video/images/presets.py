"""Presets of one-step and few-step image models: what each is made of, how it is called, how strongly it is guided."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from nasa_video.errors import InputError, format_bytes
from nasa_video.guidance.methods import METHODS, Guidance, check_settings, did_you_mean, parse_guidance
from nasa_video.models.presets import Source, Strict, configs_dir, read_yaml

Family = Literal["pixart", "sd", "sdxl", "flux"]
DEFAULT_IMAGE_MODEL = "dmd2-sdxl-4step"


class HubFolder(Strict):
    """A hub repository in diffusers' layout; ``variant`` is that of its files."""

    repo: str
    variant: str | None = None


class Weights(Strict):
    """What makes the base model fast.

    Attributes:
        kind: ``folder``: the denoiser in diffusers' layout; ``state_dict``: its tensors in one file, the config being
            the base's; ``lora``: an adapter of the base's denoiser.
        repo: hub repository; without one, ``missing`` says why there is no public checkpoint; a person gives a path.
        file: file in the repository (state_dict, lora); ``subfolder`` and ``variant`` are those of a folder.
        bytes: size of the download, where its source states it.
    """

    kind: Literal["folder", "state_dict", "lora"]
    repo: str | None = None
    file: str | None = None
    subfolder: str | None = None
    variant: str | None = None
    bytes: int | None = None
    missing: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Weights:
        if (self.repo is None) == (self.missing is None):
            raise ValueError("give either repo or missing (why there is none)")
        if self.repo is not None and (self.kind == "folder") == (self.file is not None):
            raise ValueError("a state_dict or lora of a repo needs a file, a folder has none")
        return self

    @property
    def description(self) -> str:
        """The place, for people."""
        if self.repo is None:
            return f"no public checkpoint ({self.missing}); give --weights PATH"
        size = f" ({format_bytes(self.bytes)})" if self.bytes else ""
        return "/".join(part for part in (self.repo, self.subfolder, self.file) if part) + size


class SchedulerSettings(Strict):
    """The scheduler, made from the base's config with these changes (``from_base``) or from them alone."""

    name: Literal["LCMScheduler", "DDPMScheduler", "FlowMatchEulerDiscreteScheduler", "StraightFlowScheduler"]
    from_base: bool = True
    changes: dict[str, bool | int | float | str] = Field(default_factory=dict)


class Sampling(Strict):
    """How the pipeline is called; ``timesteps`` where the model was made for particular ones."""

    steps: int = Field(gt=0)
    timesteps: tuple[int, ...] | None = None
    guidance_scale: float
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    call: dict[str, bool | int | float | str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _steps_fit(self) -> Sampling:
        if self.timesteps is not None and len(self.timesteps) != self.steps:
            raise ValueError(f"steps is {self.steps}, but there are {len(self.timesteps)} timesteps")
        return self


class ImagePreset(Strict):
    """A complete image model.

    Attributes:
        weights: None where the base is the model.
        guidance: settings by method; ``guidance_source`` says where they come from.
        source: where the facts of this preset were read.
        note: what a person should know before using it.
    """

    name: str
    kind: Literal["image"]
    title: str
    family: Family
    licence: str
    source: str
    note: str | None = None
    base: HubFolder
    weights: Weights | None = None
    scheduler: SchedulerSettings | None = None
    sampling: Sampling
    dtype: Literal["float16", "bfloat16"]
    guidance: Annotated[dict[str, dict[str, Any]], AfterValidator(check_settings)]
    guidance_source: str

    @property
    def needs(self) -> list[str]:
        """What must be here, for people."""
        return [self.base.repo, *([] if self.weights is None else [self.weights.description])]

    @property
    def missing(self) -> list[str]:
        """The parts that are not on this machine, for people."""
        absent = []
        if Source(repo=self.base.repo, file="model_index.json").find() is None:
            absent.append(self.base.repo)
        own = self.weights
        if own is not None:
            inside = f"{own.subfolder}/" if own.subfolder else ""
            if own.repo is None or Source(repo=own.repo, file=own.file or f"{inside}config.json").find() is None:
                absent.append(own.description)
        return absent

    @property
    def present(self) -> bool:
        """Whether its files are on this machine."""
        return not self.missing

    def make_guidance(self, method: str = "nasa", scale: float | None = None) -> Guidance:
        """A method with this model's settings.

        Raises:
            InputError: there is no such method, or the scale is not one of its.
        """
        found = parse_guidance(method, self.guidance)
        if found is None:
            raise InputError(f"guidance must be one of {', '.join(METHODS)}, got {method!r}")
        return found if scale is None else dataclasses.replace(found, scale=scale)

    def sweep(self, method: str = "nasa") -> tuple[float, ...]:
        """Scales from unguided to twice the model's own."""
        own = self.make_guidance(method)
        return tuple(round(own.scaled(share).scale, 4) for share in (0, 0.5, 1, 1.5, 2))


def parse_image_preset(path: Path) -> ImagePreset:
    """Read and validate one preset file.

    Raises:
        InputError: an unknown key or a wrong value; the message names each.
    """
    return ImagePreset.validated(read_yaml(path), f"{path.name} is not a valid image preset")


@cache
def image_presets() -> dict[str, ImagePreset]:
    """All shipped image presets by name."""
    presets = [parse_image_preset(path) for path in sorted((configs_dir() / "image").glob("*.yaml"))]
    return {preset.name: preset for preset in presets}


def find_image_preset(model: str) -> ImagePreset:
    """The preset of a name or of a preset file.

    Raises:
        InputError: it is neither; the message lists what there is.
    """
    presets = image_presets()
    if model in presets:
        return presets[model]
    path = Path(model)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return parse_image_preset(path)
    raise InputError(
        f"there is no image model {model!r}{did_you_mean(model, list(presets))}; there are {', '.join(presets)}. "
        "Another model: copy one of configs/image and give the file with --model"
    )
