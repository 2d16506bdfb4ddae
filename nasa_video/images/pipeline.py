"""From an image preset to a diffusers pipeline, and from a prompt to images."""

# B images, H W height and width in pixels

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from PIL import Image

from causvid_adapter.checkpoint import read_state_dict
from causvid_adapter.errors import CheckpointError
from nasa_video.errors import InputError, NasaVideoError
from nasa_video.guidance.methods import ClassifierFree, Guidance, parse_guidance
from nasa_video.guidance.state import Effect
from nasa_video.guidance.terms import Negatives, as_negatives
from nasa_video.images.presets import ImagePreset, Weights, find_image_preset
from nasa_video.images.schedulers import make_scheduler
from nasa_video.integrations.diffusers.guided import guided
from nasa_video.models.presets import Source
from nasa_video.models.stored import find_repository

FAMILIES: dict[str, tuple[Any, str, Any]] = {
    "pixart": (diffusers.PixArtAlphaPipeline, "transformer", diffusers.PixArtTransformer2DModel),
    "sd": (diffusers.StableDiffusionPipeline, "unet", diffusers.UNet2DConditionModel),
    "sdxl": (diffusers.StableDiffusionXLPipeline, "unet", diffusers.UNet2DConditionModel),
    "flux": (diffusers.FluxPipeline, "transformer", diffusers.FluxTransformer2DModel),
}
"""Of each family the pipeline, and its denoiser's name and class."""


@dataclass(frozen=True)
class Drawn:
    """Images of one call, and what guidance did to them (None when nothing was guided)."""

    images: list[Image.Image]
    effect: Effect | None


class ImagePipeline:
    """A preset's model, ready to draw."""

    def __init__(self, preset: ImagePreset, pipe: Any) -> None:
        self.preset = preset
        self.pipe = pipe
        pipe.set_progress_bar_config(disable=True)

    @classmethod
    def from_preset(
        cls,
        preset: ImagePreset | str,
        *,
        base: Path | None = None,
        weights: Path | None = None,
        device: torch.device | str | None = None,
    ) -> ImagePipeline:
        """Load a model.

        Args:
            preset: or its name, or a preset file.
            base: folder in diffusers' layout, instead of the preset's repository.
            weights: the preset's own weights on this machine: a folder of the denoiser, a state dict or a LoRA.
            device: CUDA if there is one by default; on a CPU everything runs in float32.

        Raises:
            InputError: a part is missing and cannot be downloaded; the message says where it comes from and what to do.
        """
        preset = find_image_preset(preset) if isinstance(preset, str) else preset
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.float32 if device.type == "cpu" else getattr(torch, preset.dtype)
        if preset.weights is not None and preset.weights.repo is None and weights is None:
            raise InputError(
                f"the model {preset.name} needs your own weights, because no public checkpoint is known "
                f"({preset.weights.missing}): give them with --weights FOLDER (diffusers' layout) or FILE"
                f"{_noted(preset)}"
            )
        if base is not None and not (base / "model_index.json").is_file():
            raise InputError(f"{base} is no pipeline in diffusers' layout: it has no model_index.json")
        place = str(base or find_repository(preset.base.repo) or preset.base.repo)
        parts: dict[str, Any] = {} if base or preset.base.variant is None else {"variant": preset.base.variant}
        pipeline, name, _ = FAMILIES[preset.family]
        if preset.weights is not None and preset.weights.kind != "lora":
            parts[name] = _load_denoiser(preset, preset.weights, place, weights, dtype)
        with _explained(f"the pipeline {place} of {preset.name}", preset, place):
            pipe = pipeline.from_pretrained(place, dtype=dtype, **parts)
        if preset.weights is not None and preset.weights.kind == "lora":
            _load_lora(pipe, preset, preset.weights, weights)
        if preset.scheduler is not None:
            pipe.scheduler = make_scheduler(preset.scheduler, pipe.scheduler)
        return cls(preset, pipe.to(device))

    def draw(
        self,
        prompt: str,
        negatives: Negatives = (),
        guidance: Guidance | str | None = None,
        *,
        seed: int = 0,
        count: int = 1,
        steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> Drawn:
        """``count`` images with the seeds from ``seed`` on; each is what its seed alone gives.

        Args:
            negatives: texts (by their grammar) or :class:`~nasa_video.Negative`.
            guidance: a method, or its spelling such as "nasa:0.5", with what it leaves open from the preset.

        Raises:
            InputError: the model was made for other step counts, or the negatives cannot act.
            NasaVideoError: there is not enough memory.
        """
        call = self._call(seed, count, steps, width, height)
        negatives, guidance = as_negatives(negatives), parse_guidance(guidance, self.preset.guidance)
        if guidance is None or not negatives or not guidance.active:
            return Drawn(self._run(prompt, call), None)
        if isinstance(guidance, ClassifierFree):
            scale = "true_cfg_scale" if self.preset.family == "flux" else "guidance_scale"
            call |= {"negative_prompt": ", ".join(one.text for one in negatives), scale: guidance.scale}
            return Drawn(self._run(prompt, call), None)
        with guided(self.pipe, negatives, guidance) as scope:
            images = self._run(prompt, call)
        return Drawn(images, scope.effect)

    def _run(self, prompt: str, call: dict[str, Any]) -> list[Image.Image]:
        try:
            images: list[Image.Image] = self.pipe(prompt, **call).images
        except torch.OutOfMemoryError as error:
            raise NasaVideoError(
                f"not enough memory for {call['num_images_per_prompt']} images of {call['width']} x "
                f"{call['height']}; draw fewer at once (--count) or smaller ones (--width, --height)"
            ) from error
        return images

    def _call(self, seed: int, count: int, steps: int | None, width: int | None, height: int | None) -> dict[str, Any]:
        sampling = self.preset.sampling
        call: dict[str, Any] = {
            # Generators on the CPU, one an image: a seed gives one image whatever the device and the batch.
            "generator": [torch.Generator().manual_seed(seed + index) for index in range(count)],
            "num_images_per_prompt": count,
            "guidance_scale": sampling.guidance_scale,
            "width": width or sampling.width,
            "height": height or sampling.height,
            **sampling.call,
        }
        if sampling.timesteps is None:
            call["num_inference_steps"] = steps or sampling.steps
        elif steps in (None, sampling.steps):
            call |= {"timesteps": list(sampling.timesteps), "num_inference_steps": sampling.steps}
        else:
            raise InputError(
                f"{self.preset.name} was made for the timesteps {list(sampling.timesteps)}: it runs in "
                f"{sampling.steps} steps, got {steps}"
            )
        return call


def _load_denoiser(preset: ImagePreset, own: Weights, base: str, given: Path | None, dtype: torch.dtype) -> Any:
    """The preset's denoiser: a folder in diffusers' layout, or a state dict whose config is the base's."""
    _, name, model = FAMILIES[preset.family]
    if given is not None and not given.exists():
        raise InputError(f"{given} does not exist; --weights takes a folder of the {name} or a file with its tensors")
    if own.kind == "folder" if given is None else given.is_dir():
        place = str(given or find_repository(str(own.repo)) or own.repo)
        inside = {"subfolder": own.subfolder, "variant": own.variant} if given is None else {}
        with _explained(f"the weights {own.description} of {preset.name}", preset, place):
            return model.from_pretrained(place, dtype=dtype, **{key: value for key, value in inside.items() if value})
    path = given if given is not None else _download(preset, own)
    with _explained(f"the {name} config of {base}", preset, base):
        config = model.load_config(base, subfolder=name)
    try:
        tensors = read_state_dict(path)
    except CheckpointError as error:
        raise InputError(str(error)) from error
    with init_empty_weights(include_buffers=False):
        denoiser = model.from_config(config)
    wanted, there = set(denoiser.state_dict()), set(tensors)
    if wanted != there:
        raise InputError(
            f"{path} is not a {name} of {base}: {len(wanted - there)} tensors are missing (such as "
            f"{min(wanted - there, default='none')}), {len(there - wanted)} are unknown (such as "
            f"{min(there - wanted, default='none')})"
        )
    try:
        denoiser.load_state_dict({key: value.to(dtype) for key, value in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise InputError(f"{path} has tensors of other sizes than a {name} of {base}: {error}") from error
    return denoiser.eval()


def _load_lora(pipe: Any, preset: ImagePreset, own: Weights, given: Path | None) -> None:
    if given is not None and not given.exists():
        raise InputError(f"{given} does not exist; --weights takes the LoRA's file")
    path = given if given is not None else _download(preset, own)
    try:
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    except Exception as error:  # the loaders raise many unrelated types for a wrong file
        raise InputError(f"{path} is not a LoRA of {preset.base.repo}: {' '.join(str(error).split())[:300]}") from error
    if not pipe.get_active_adapters():
        raise InputError(f"{path} has no tensor that fits {preset.base.repo}; it would do nothing")
    pipe.fuse_lora()


def _download(preset: ImagePreset, own: Weights) -> Path:
    assert own.repo is not None
    assert own.file is not None
    here = Source(repo=own.repo, file=own.file).find()
    if here is not None:
        return here
    with _explained(f"the weights {own.description} of {preset.name}", preset, own.repo):
        return Path(hf_hub_download(own.repo, own.file))


@contextmanager
def _explained(what: str, preset: ImagePreset, place: str) -> Iterator[None]:
    """Turn a loader's error into one that says what is missing and how to bring it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the hub client and the loaders raise many unrelated types
        online = (
            ""
            if Path(place).exists()
            else (
                "; download it where there is a network and set HF_HOME, or NASA_VIDEO_MODELS to a folder of "
                "owner/name, or give folders with --base and --weights"
            )
        )
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{what} could not be loaded{online} ({type(error).__name__}: {reason}){_noted(preset) if online else ''}"
        ) from error


def _noted(preset: ImagePreset) -> str:
    """What a person should know of a preset, behind the message that it cannot be loaded."""
    return f" (of this model: {preset.note})" if preset.note else ""
