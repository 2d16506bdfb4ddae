"""Schedulers of image presets: made from a base's, with nothing left to chance, and the one that diffusers lacks."""

# B batch, C channels, H W latent height and width

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from nasa_video.errors import InputError
from nasa_video.images.presets import SchedulerSettings

_STATED: dict[str, Any] = {
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "rescale_betas_zero_snr": False,
    "variance_type": "fixed_small",
    "set_alpha_to_one": True,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
}
"""What a scheduler is told that the base's config does not say. Left out, DDPM would clamp its latents to [-1, 1]."""


def make_scheduler(settings: SchedulerSettings, base: Any) -> Any:
    """A preset's scheduler, from that of its base pipeline where the settings say so.

    Raises:
        InputError: a key that neither the base's config nor the settings state: it would take the class's default.
    """
    cls = StraightFlowScheduler if settings.name == "StraightFlowScheduler" else getattr(diffusers, settings.name)
    if not settings.from_base:
        return cls(**settings.changes)
    wanted = set(inspect.signature(cls.__init__).parameters) - {"self"}
    # Not from_config: that drops what the base itself took by default, and the class would take its own instead.
    known = {key: value for key, value in {**_STATED, **base.config, **settings.changes}.items() if key in wanted}
    if left := wanted - set(known):
        raise InputError(
            f"a {settings.name} made from a {type(base).__name__} is not told its {', '.join(sorted(left))}; state "
            "them in the preset, under scheduler: changes"
        )
    return cls(**known)


class StraightFlowScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """InstaFlow's (arXiv 2309.06380): Euler steps along a flow whose model predicts data minus noise, ``x += v / n``.

    Time runs from 1000 (noise) down; a step i of n asks the model at 1000 (1 - i / n).
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.timesteps = torch.tensor([float(num_train_timesteps)])

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Divide the way into equal steps."""
        share = 1 - torch.arange(num_inference_steps) / num_inference_steps
        self.timesteps = (self.config.num_train_timesteps * share).to(device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Nothing to scale."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> tuple[Tensor]:
        """(B, C, H, W) one step nearer to the data."""
        return (sample + model_output / len(self.timesteps),)
