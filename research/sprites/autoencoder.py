"""Trains the small Wan autoencoder of the sprites world.

Shape legend: B batch, F frames, C channels, H height, W width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nn_f
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor

from nasa_video.sprites.world import sample_scenes
from nasa_video.train.curves import save_sheet
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.run import Report
from nasa_video.train.state import TrainState
from research.sprites.renderer import render_switched, render_with_mask
from research.sprites.scenes import sample_switches
from research.sprites.stage import autocast, convolution_optimisers, matrix_optimiser, run_steps


@dataclass(frozen=True)
class AutoencoderTraining:
    """Settings of the autoencoder's training.

    `model` holds arguments of diffusers' `AutoencoderKLWan`; the means and deviations of its latents are measured at
    the end. `phases` are (share of the run, frames of a clip, clips a process): short clips first, which are cheaper;
    whole ones last, since colours drift where a clip is longer than those in training. `sprite_weight` and
    `edge_weight` are what a pixel of a sprite, or at a full-contrast edge, counts more. `switched_share` of the clips
    turn into another scene between two latent frames.
    """

    model: dict[str, Any] = field(default_factory=dict)
    iterations: int = 2000
    phases: tuple[tuple[float, int, int], ...] = ((0.36, 5, 4), (0.32, 9, 4), (0.32, 33, 1))
    matrix_rate: float = 3e-3
    other_rate: float = 2e-3
    average_decay: float = 0.995
    kl_weight: float = 5e-4
    sprite_weight: float = 3.0
    edge_weight: float = 3.0
    switched_share: float = 0.15
    checkpoint_every: int = 100
    sheet_every: int = 400
    measure_clips: int = 192


def new_autoencoder(model: dict[str, Any]) -> AutoencoderKLWan:
    """An autoencoder whose latents are not normalised yet, with convolutions in channels-last order (faster on CPU)."""
    z_dim = int(model["z_dim"])
    vae = AutoencoderKLWan(**model, latents_mean=[0.0] * z_dim, latents_std=[1.0] * z_dim)
    for parameter in vae.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    return vae


def pixel_weights(frames: Tensor, mask: Tensor, settings: AutoencoderTraining) -> Tensor:
    """Weights (B, F, 1, H, W) with mean one: more on sprites and where neighbouring pixels differ."""
    grey = frames.mean(2, keepdim=True)
    across = nn_f.pad((grey[..., :, 1:] - grey[..., :, :-1]).abs(), (0, 1))
    down = nn_f.pad((grey[..., 1:, :] - grey[..., :-1, :]).abs(), (0, 0, 0, 1))
    weights = 1 + settings.sprite_weight * mask + settings.edge_weight * (across + down).clamp(max=1)
    return weights / weights.mean()


def _phase(settings: AutoencoderTraining, step: int) -> tuple[int, int]:
    """Frames of a clip and clips a process at this step."""
    end = 0.0
    for share, frames, batch in settings.phases:
        end += share * settings.iterations
        if step <= round(end):
            return frames, batch
    return settings.phases[-1][1:]


def _loss(
    vae: AutoencoderKLWan, settings: AutoencoderTraining, step: int, seed: int, device: torch.device
) -> tuple[Tensor, dict[str, float]]:
    generator = torch.Generator().manual_seed(seed)
    num_frames, batch = _phase(settings, step)
    scenes = sample_scenes(batch, generator)
    later, chunk = sample_switches(scenes, settings.switched_share, generator)
    cut = (chunk > 0).long() * (1 + 4 * torch.randint((num_frames - 1) // 4, (batch,), generator=generator))
    # whole groups of four frames from the clip's start, so that what repeats every four frames keeps its phase
    first = 4 * int(torch.randint(7, (1,), generator=generator))
    frames, mask = render_switched(scenes.to(device), later.to(device), cut.to(device), num_frames, first)
    with autocast(device):
        posterior = vae.encode(frames.transpose(1, 2)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample.transpose(1, 2).float()
    error = decoded - frames
    weights = pixel_weights(frames, mask, settings)
    reconstruction = (weights * (error.abs() + 2 * error.square())).mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    psnr = 10 * math.log10(4 / float(error.detach().square().mean()))
    values = {"reconstruction": float(reconstruction.detach()), "divergence": float(divergence.detach()), "psnr": psnr}
    return reconstruction + settings.kl_weight * divergence, values


def train_autoencoder(
    settings: AutoencoderTraining,
    folder: Path,
    seed: int,
    context: DistributedContext,
    report: Report | None = None,
    start_from: Path | None = None,
) -> AutoencoderKLWan:
    """Trains, measures the latents, and returns the averaged autoencoder; resumes from `folder`/autoencoder.pt.

    `start_from` is a safetensors file of weights to begin with, in place of fresh ones.
    """
    torch.manual_seed(seed)
    device = context.device
    vae = new_autoencoder(settings.model).to(device)
    if start_from is not None:
        vae.load_state_dict(load_file(start_from))
    optimiser = matrix_optimiser(settings.matrix_rate, settings.other_rate)
    state = TrainState(vae, optimiser, context, settings.average_decay, convolution_optimisers)

    def iterate(step: int, _: object) -> dict[str, float]:
        loss, values = _loss(vae, settings, step, seed * 1_000_003 + context.stream(step), device)
        loss.backward()  # type: ignore[no-untyped-call]
        state.step(step / settings.iterations)
        return values

    def show(step: int) -> None:
        write_sheet(vae, folder / "sheets" / f"autoencoder-{step:05d}.png", device)

    run_steps({"state": state}, iterate, settings, folder / "autoencoder.pt", context, report, show=show)
    state.copy_average_to(vae)
    vae.eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.data = parameter.data.contiguous()  # as files want it
    measure_latents(vae, settings.measure_clips, seed + 1, device)
    return vae


@torch.no_grad()
def measure_latents(vae: AutoencoderKLWan, clips: int, seed: int, device: torch.device) -> None:
    """Sets the configuration's latents_mean and latents_std from rendered clips."""
    generator = torch.Generator().manual_seed(seed)
    raw = []
    for _ in range(0, clips, 16):
        frames, _ = render_with_mask(sample_scenes(16, generator).to(device))
        with autocast(device):
            raw.append(vae.encode(frames.transpose(1, 2)).latent_dist.mean.float())
    latents = torch.cat(raw).transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())


@torch.no_grad()
def write_sheet(vae: AutoencoderKLWan, path: Path, device: torch.device) -> None:
    """Twelve clips, each above its reconstruction."""
    frames, _ = render_with_mask(sample_scenes(12, torch.Generator().manual_seed(7)).to(device))
    with autocast(device):
        decoded = vae.decode(vae.encode(frames.transpose(1, 2)).latent_dist.mean).sample.transpose(1, 2)
    labels = [f"clip {i}{what}" for i in range(len(frames)) for what in ("", ", decoded")]
    save_sheet(torch.stack((frames, decoded.float()), 1).flatten(0, 1), labels, path)
