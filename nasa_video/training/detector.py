"""Trains the detector on rendered clips, some of them passed through the autoencoder.

Shape legend: B batch, F frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as nn_f
from diffusers import AutoencoderKLWan
from torch import Tensor

from nasa_video.sprites.detectors import Detector, DetectorNetwork, targets, truth
from nasa_video.sprites.renderer import render
from nasa_video.sprites.world import ATTRIBUTES, Scenes, concatenate, sample_scenes
from nasa_video.training.autoencoder import autocast
from nasa_video.training.checkpoint import Average, load_state, save_state
from nasa_video.training.journal import Journal
from nasa_video.training.optimiser import MatrixOptimiser, inner_convolution, warm_then_linear


@dataclass(frozen=True)
class DetectorTraining:
    """Settings of the detector's training; `decoded_clips` are encoded and decoded once and used in every batch."""

    iterations: int = 1200
    batch_size: int = 24
    decoded_clips: int = 768
    decoded_share: float = 0.4
    matrix_rate: float = 2e-3
    other_rate: float = 1e-3
    empty_share: float = 0.03
    average_decay: float = 0.995
    checkpoint_every: int = 200


def draw_scenes(n: int, empty_share: float, generator: torch.Generator) -> Scenes:
    """Scenes of the world, a few of them without a sprite, flaws and weather more frequent than in the data."""
    scenes = sample_scenes(n, generator)
    empty = torch.rand(n, generator=generator) < empty_share
    count = torch.where(empty, torch.full_like(scenes.count, -1), scenes.count)
    return Scenes(**{**scenes.__dict__, "count": count})


@torch.no_grad()
def decode_clips(vae: AutoencoderKLWan, scenes: Scenes, device: torch.device, batch: int = 16) -> Tensor:
    """Rendered clips after encoding and decoding, uint8 (B, F, 3, H, W)."""
    parts = []
    for start in range(0, len(scenes), batch):
        frames = render(scenes[slice(start, start + batch)].to(device))
        with autocast(device):
            decoded = vae.decode(vae.encode(frames.transpose(1, 2)).latent_dist.mean).sample
        parts.append(((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte().transpose(1, 2).cpu())
    return torch.cat(parts)


def _augment(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Small changes of gain and level, and a touch of noise, a clip each."""
    draw = torch.rand(frames.shape[0], 3, generator=generator).to(frames.device)[:, :, None, None, None, None]
    noise = torch.randn(frames.shape, generator=generator).to(frames.device)
    return (frames * (0.95 + 0.1 * draw[:, 0]) + 0.1 * (draw[:, 1] - 0.5) + 0.05 * draw[:, 2] * noise).clamp(-1, 1)


def detector_loss(logits: dict[str, Tensor], goal: dict[str, Tensor]) -> Tensor:
    """Sum of cross-entropies over the attributes."""
    total = torch.zeros((), device=logits["flaws"].device)
    for name, value in goal.items():
        if value.dtype.is_floating_point:
            total = total + 3 * nn_f.binary_cross_entropy_with_logits(logits[name], value)
        else:
            total = total + nn_f.cross_entropy(logits[name], value)
    return total


def train_detector(
    settings: DetectorTraining, vae: AutoencoderKLWan, folder: Path, seed: int, device: torch.device, journal: Journal
) -> Detector:
    """Trains and returns the averaged detector; resumes from `folder`/detector.pt."""
    torch.manual_seed(seed)
    pool_scenes = draw_scenes(settings.decoded_clips, settings.empty_share, torch.Generator().manual_seed(seed + 77))
    pool = (load_state(folder / "decoded.pt") or {}).get("clips")
    if pool is None:
        pool = decode_clips(vae, pool_scenes, device)
        save_state(folder / "decoded.pt", {"clips": pool})
    network = DetectorNetwork().to(device)
    optimiser = MatrixOptimiser(network, inner_convolution, settings.matrix_rate, settings.other_rate)
    average, start = Average(network, settings.average_decay), 0
    if (state := load_state(folder / "detector.pt")) is not None:
        network.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average.load_state_dict(state["average"])
        start = int(state["step"])
    for step in range(start + 1, settings.iterations + 1):
        generator = torch.Generator().manual_seed(seed * 3_000_017 + step)
        old = round(settings.batch_size * settings.decoded_share)
        scenes = draw_scenes(settings.batch_size - old, settings.empty_share, generator)
        chosen = torch.randint(len(pool), (old,), generator=generator)
        decoded = pool[chosen].to(device).float() / 127.5 - 1
        frames = _augment(torch.cat((render(scenes.to(device)), decoded)), generator)
        goal = targets(concatenate([scenes, pool_scenes[chosen]]).to(device))
        with autocast(device):
            logits = network(frames)
        loss = detector_loss({n: v.float() for n, v in logits.items()}, goal)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step(warm_then_linear(step / settings.iterations))
        average.update(network)
        journal.record(step, settings.iterations, {"loss": float(loss.detach())})
        if step % settings.checkpoint_every == 0 or step == settings.iterations:
            state = {"step": step, "model": network.state_dict(), "optimiser": optimiser.state_dict()}
            save_state(folder / "detector.pt", {**state, "average": average.state_dict()})
    average.copy_to(network)
    return Detector(network)


def detector_accuracy(detector: Detector, frames: Tensor, scenes: Scenes) -> dict[str, float]:
    """Share of right labels by attribute on clips (B, F, 3, H, W) in [-1, 1]."""
    found, right = detector.detect(frames), truth(scenes)
    return {
        name: sum(a == b for a, b in zip(found[name], right[name], strict=True)) / len(scenes) for name in ATTRIBUTES
    }
