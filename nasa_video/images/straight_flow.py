"""The scheduler of InstaFlow (arXiv 2309.06380), which diffusers does not have."""

# B batch, C channels, H W latent height and width

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor


class StraightFlowScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Euler steps along a rectified flow whose model predicts data minus noise: ``x += v / n``.

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
