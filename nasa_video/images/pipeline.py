"""From an image preset to a diffusers pipeline, and from a prompt to images."""

# B images, H W height and width in pixels

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from PIL import Image

from nasa_video.errors import InputError, NasaVideoError
from nasa_video.guidance.methods import ClassifierFree, Guidance
from nasa_video.guidance.state import Effect
from nasa_video.guidance.terms import Negative
from nasa_video.images.presets import ImagePreset, Weights
from nasa_video.images.schedulers import make_scheduler
from nasa_video.integrations.diffusers.guided import guided
from nasa_video.models.presets import Source
from nasa_video.models.stored import find_repository

PIPELINES: dict[str, Any] = {
    "pixart": diffusers.PixArtAlphaPipeline,
    "sd": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "flux": diffusers.FluxPipeline,
}
DENOISERS: dict[str, tuple[str, Any]] = {
    "pixart": ("transformer", diffusers.PixArtTransformer2DModel),
    "sd": ("unet", diffusers.UNet2DConditionModel),
    "sdxl": ("unet", diffusers.UNet2DConditionModel),
    "flux": ("transformer", diffusers.FluxTransformer2DModel),
}


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
        preset: ImagePreset,
        *,
        base: Path | None = None,
        weights: Path | None = None,
        device: torch.device | str | None = None,
    ) -> ImagePipeline:
        """Load a model.

        Args:
            base: folder in diffusers' layout, instead of the preset's repository.
            weights: the preset's own weights on this machine: a folder of the denoiser, a state dict or a LoRA.
            device: CUDA if there is one by default; on a CPU everything runs in float32.

        Raises:
            InputError: a part is missing and cannot be downloaded; the message says where it comes from and what to do.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.float32 if device.type == "cpu" else getattr(torch, preset.dtype)
        if preset.weights is not None and preset.weights.repo is None and weights is None:
            raise InputError(
                f"the model {preset.name} needs your own weights, because no public checkpoint is known "
                f"({preset.weights.missing}): give them with --weights FOLDER (diffusers' layout) or FILE"
                f"{_noted(preset)}"
            )
        source = _Base(preset, base)
        parts: dict[str, Any] = {}
        if preset.weights is not None and preset.weights.kind != "lora":
            name, _ = DENOISERS[preset.family]
            parts[name] = _load_denoiser(preset, preset.weights, source, weights, dtype)
        with _explained(f"the pipeline {source.place} of {preset.name}", preset, source.place):
            pipe = PIPELINES[preset.family].from_pretrained(source.place, dtype=dtype, **source.options, **parts)
        if preset.weights is not None and preset.weights.kind == "lora":
            _load_lora(pipe, preset, preset.weights, weights)
        if preset.scheduler is not None:
            pipe.scheduler = make_scheduler(preset.scheduler, pipe.scheduler)
        return cls(preset, pipe.to(device))

    def draw(
        self,
        prompt: str,
        negatives: Sequence[Negative] = (),
        guidance: Guidance | None = None,
        *,
        seed: int = 0,
        count: int = 1,
        steps: int | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> Drawn:
        """``count`` images with the seeds from ``seed`` on; each is what its seed alone gives.

        Raises:
            InputError: the model was made for other step counts, or the negatives cannot act.
            NasaVideoError: there is not enough memory.
        """
        call = self._call(seed, count, steps, width, height)
        if guidance is None or not negatives or not guidance.active:
            return Drawn(self._run(prompt, call), None)
        if isinstance(guidance, ClassifierFree):
            scale = "true_cfg_scale" if self.preset.family == "flux" else "guidance_scale"
            call |= {"negative_prompt": ", ".join(negative.text for negative in negatives), scale: guidance.scale}
            return Drawn(self._run(prompt, call), None)
        with guided(self.pipe, list(negatives), guidance) as scope:
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


class _Base:
    """Where the parts that are not the preset's own come from."""

    def __init__(self, preset: ImagePreset, folder: Path | None) -> None:
        self.place = str(folder) if folder is not None else _place(preset.base.repo)
        self.options = {} if folder is not None or preset.base.variant is None else {"variant": preset.base.variant}
        if folder is not None and not (folder / "model_index.json").is_file():
            raise InputError(f"{folder} is no pipeline in diffusers' layout: it has no model_index.json")


def _place(repo: str) -> str:
    """Where to load a repository from: NASA_VIDEO_MODELS if it has it, otherwise the hub or its cache."""
    return str(find_repository(repo) or repo)


def _load_denoiser(preset: ImagePreset, own: Weights, base: _Base, given: Path | None, dtype: torch.dtype) -> Any:
    name, model = DENOISERS[preset.family]
    if given is not None and not given.exists():
        raise InputError(f"{given} does not exist; --weights takes a folder of the {name} or a file with its tensors")
    if (given is not None and given.is_dir()) or (given is None and own.kind == "folder"):
        place = str(given) if given is not None else _place(str(own.repo))
        variant = {"variant": own.variant} if given is None and own.variant else {}
        with _explained(f"the weights {own.description} of {preset.name}", preset, place):
            return model.from_pretrained(
                place, subfolder=own.subfolder if given is None else None, dtype=dtype, **variant
            )
    path = given if given is not None else _download(preset, own)
    with _explained(f"the {name} config of {base.place}", preset, base.place):
        config = model.load_config(base.place, subfolder=name)
    tensors = _read_tensors(path)
    with init_empty_weights(include_buffers=False):
        denoiser = model.from_config(config)
    wanted, there = set(denoiser.state_dict()), set(tensors)
    if wanted != there:
        raise InputError(
            f"{path} is not a {name} of {base.place}: {len(wanted - there)} tensors are missing (such as "
            f"{min(wanted - there, default='none')}), {len(there - wanted)} are unknown (such as "
            f"{min(there - wanted, default='none')})"
        )
    try:
        denoiser.load_state_dict({key: value.to(dtype) for key, value in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise InputError(f"{path} has tensors of other sizes than a {name} of {base.place}: {error}") from error
    return denoiser.eval()


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A state dict; pickles are read without running them."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return dict(load_file(path))
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many unrelated types for a broken file
        raise InputError(f"{path} cannot be read as a state dict: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise InputError(f"{path} holds no plain state dict")
    return tensors


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
