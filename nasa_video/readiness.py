"""Whether a preset's files are here, and whether this machine can run it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from nasa_video.errors import InputError
from nasa_video.memory import Estimate, Run, available, estimate, fitting_sizes
from nasa_video.models import VideoPreset


@dataclass(frozen=True)
class Readiness:
    """The answer.

    Attributes:
        missing: parts that are not on the machine; ``remedies`` says how to bring them.
        device: where it would run.
        memory: what it takes there; None where the model's sizes are not known before it is downloaded.
        free: free bytes of the device, None where unknown.
        fits: width and height that fit when the wanted ones do not.
    """

    preset: VideoPreset
    missing: tuple[str, ...]
    remedies: tuple[str, ...]
    device: str
    dtype: str
    width: int
    height: int
    frames: int
    memory: Estimate | None
    free: int | None
    fits: tuple[int, int] | None

    @property
    def enough(self) -> bool | None:
        """Whether the run fits; None where that is not known."""
        if self.memory is None or self.free is None:
            return None
        return self.memory.total <= self.free

    def lines(self) -> list[str]:
        """For people."""
        rows = [f"{self.preset.name}: {self.preset.title}", f"licence: {self.preset.licence}"]
        rows += [f"missing: {part}" for part in self.missing] or ["all files are here"]
        rows += [f"{remedy}" for remedy in self.remedies]
        what = f"{self.width} x {self.height}, {self.frames} frames, {self.dtype} on {self.device}"
        if self.memory is None:
            return [*rows, f"{what}: memory is not known before the weights are here"]
        parts = {field.name: getattr(self.memory, field.name) for field in dataclasses.fields(self.memory)}
        rows.append(f"{what}: {_gb(self.memory.total)} (" + ", ".join(f"{n} {_gb(b)}" for n, b in parts.items()) + ")")
        if self.free is not None:
            rows.append(f"free: {_gb(self.free)}, " + ("enough" if self.enough else "NOT enough"))
        if self.enough is False:
            way = f"--width {self.fits[0]} --height {self.fits[1]}" if self.fits else "no size of this model"
            rows.append(f"what fits: {way}")
        return rows

    def to_json(self) -> dict[str, Any]:
        """For machines; sizes in bytes."""
        return {
            "name": self.preset.name,
            "missing": list(self.missing),
            "device": self.device,
            "memory": dataclasses.asdict(self.memory) | {"total": self.memory.total} if self.memory else None,
            "free": self.free,
            "enough": self.enough,
            "fits": self.fits,
        }


def readiness(
    preset: VideoPreset, width: int | None, height: int | None, frames: int | None, device: str | None
) -> Readiness:
    """Look at the files and at the device; nothing is loaded or downloaded."""
    from nasa_video.loading import choose_device

    place = choose_device(device)
    dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    video = preset.video
    width, height, frames = width or video.width, height or video.height, frames or video.frames
    absent = [source for source in preset.components.sources if source.find() is None]
    remedies = []
    if any(source.repo for source in absent):
        remedies.append(f"bring them with: nasa-video models pull {preset.name}")
    if any(source.package for source in absent):
        remedies.append("train them with: python scripts/train_sprites.py")
    transformer, vae = _transformer_config(preset), _vae_config(preset)
    memory, fits, free = None, None, available(place)
    if transformer is not None:
        latent_frames = (frames - 1) // int(vae["scale_factor_temporal"]) + 1
        run = Run(transformer, vae, preset.sampler, width, height, latent_frames, dtype)
        unit_width, unit_height = run.units
        if width % unit_width or height % unit_height:
            raise InputError(
                f"sizes of {preset.name} are multiples of {unit_width} x {unit_height}, got {width} x {height}"
            )
        memory = estimate(run)
        if free is not None and memory.total > free:
            fits = fitting_sizes(run, free, loaded=False).size
    name = str(dtype).removeprefix("torch.")
    missing = tuple(source.description for source in absent)
    return Readiness(preset, missing, tuple(remedies), str(place), name, width, height, frames, memory, free, fits)


def _transformer_config(preset: VideoPreset) -> dict[str, Any] | None:
    if preset.components.config is not None:
        return preset.components.config
    return _read_config(preset.components.transformer.find())


def _vae_config(preset: VideoPreset) -> dict[str, Any]:
    found = _read_config(preset.components.vae.find())
    if found is not None:
        return found
    with torch.device("meta"):
        return dict(AutoencoderKLWan().config)  # the published one


def _read_config(folder: Path | None) -> dict[str, Any] | None:
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        loaded: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/config.json is damaged ({error}); remove it and bring it again") from error
    return loaded


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
