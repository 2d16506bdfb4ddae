"""A detector that reads latents: what conditions the student while it is distilled, and what noise is read with.

Distribution matching alone teaches the student what clips look like; which of them a prompt asks for it learns only as
well as its teacher knows it, and a small teacher knows shapes badly. The gradient of this detector says so directly. It
is never used to measure: the shipped detector, trained apart on pictures, does that.

Shape legend: B batch, T latent frames, C channels, h w latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as nn_f
from torch import Tensor, nn

from nasa_video.sprites.detectors import HEADS, over_time
from nasa_video.sprites.world import FLAWS, Scenes
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.run import Report
from nasa_video.train.state import TrainState
from research.sprites.dataset import LatentClips
from research.sprites.detector import detector_loss, targets
from research.sprites.stage import autocast, convolution_optimisers, matrix_optimiser, run_steps


@dataclass(frozen=True)
class LatentDetectorTraining:
    """Settings of its training; `batch_size` is that of one process, `noise` the most that it learns to see through."""

    iterations: int = 1500
    batch_size: int = 48
    width: int = 96
    noise: float = 0.3
    matrix_rate: float = 2e-3
    other_rate: float = 1e-3
    average_decay: float = 0.995
    checkpoint_every: int = 100


class LatentDetector(nn.Module):
    """Latents (B, T, C, h, w) → logits by attribute, as `DetectorNetwork` has them."""

    def __init__(self, channels: int, width: int = 96) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, 1, 1)
        self.spatial = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in range(3))
        self.temporal = nn.ModuleList(nn.Conv1d(width, width, 3, 1, 1) for _ in range(3))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(4))
        self.heads = nn.ModuleDict({name: nn.Linear(3 * width, size) for name, size in HEADS.items()})

    def forward(self, latents: Tensor) -> dict[str, Tensor]:
        batch = latents.shape[0]
        x = self.norms[0](nn_f.silu(self.first(latents.flatten(0, 1))))
        for spatial, temporal, norm in zip(self.spatial, self.temporal, list(self.norms)[1:], strict=True):
            x = x + nn_f.silu(spatial(x))
            x = x + over_time(temporal, x, batch)
            x = norm(x)
        volume = x.unflatten(0, (batch, -1))
        pooled = torch.cat((volume.mean((1, 3, 4)), volume.amax((1, 3, 4)), volume.mean((3, 4)).amax(1)), 1)
        return {name: head(pooled) for name, head in self.heads.items()}


def blurred_by_noise(latents: Tensor, most: float, generator: torch.Generator) -> Tensor:
    """Latents with a noise level between 0 and `most`, one a clip, as the denoiser sees them."""
    shape = (latents.shape[0], 1, 1, 1, 1)
    level = most * torch.rand(shape, generator=generator, device=generator.device).to(latents)
    noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(latents)
    return (1 - level) * latents + level * noise


HIDDEN = frozenset({"shape", "texture"})


def visible_targets(conditioned: Sequence[frozenset[str]], scenes: Scenes) -> list[frozenset[str]]:
    """What clips are conditioned to show, without the details that a flaw of theirs hides.

    A clip that is asked for its shape loses the blur that makes shapes hard to read, although it is asked for that too.
    """
    hides = ((scenes.blurry == 1) | (scenes.pixelated == 1)).tolist()
    return [words - HIDDEN if hidden else words for words, hidden in zip(conditioned, hides, strict=True)]


def stated_loss(logits: dict[str, Tensor], scenes: Scenes, stated: Sequence[frozenset[str]]) -> Tensor:
    """Sum over the clips of the cross-entropies of the attributes in `stated`; nothing else counts."""
    goal = targets(scenes)
    device = logits["flaws"].device
    total = torch.zeros((), device=device)
    for name, value in goal.items():
        if name == "flaws":
            counted = torch.tensor([[flaw in words for flaw in FLAWS] for words in stated], device=device)
            errors = nn_f.binary_cross_entropy_with_logits(logits[name], value.to(device), reduction="none")
            total = total + (errors * counted).sum()
            continue
        counted = torch.tensor([name in words for words in stated], device=device)
        if value.dtype.is_floating_point:
            errors = nn_f.binary_cross_entropy_with_logits(logits[name], value.to(device), reduction="none").sum(1)
        else:
            errors = nn_f.cross_entropy(logits[name], value.to(device), reduction="none")
        total = total + (errors * counted).sum()
    return total


def train_latent_detector(
    settings: LatentDetectorTraining,
    clips: Sequence[LatentClips],
    path: Path,
    seed: int,
    context: DistributedContext,
    report: Report | None = None,
) -> LatentDetector:
    """Trains on clips of one length and another in turns; returns the averaged network, resumes from `path`."""
    torch.manual_seed(seed)
    device = context.device
    network = LatentDetector(clips[0].latents.shape[2], settings.width).to(device)
    optimiser = matrix_optimiser(settings.matrix_rate, settings.other_rate)
    state = TrainState(network, optimiser, context, settings.average_decay, convolution_optimisers)
    pools = [(pool.to(device), torch.tensor(pool.whole, device=device)) for pool in clips]

    def iterate(step: int, _: object) -> dict[str, float]:
        generator = torch.Generator(device).manual_seed(seed * 13_000_027 + context.stream(step))
        pool, whole = pools[step % len(pools)]
        chosen = whole[torch.randint(len(whole), (settings.batch_size,), generator=generator, device=device)]
        latents = blurred_by_noise(pool.latents[chosen].float(), settings.noise, generator)
        with autocast(device):
            logits = network(latents)
        loss = detector_loss({n: v.float() for n, v in logits.items()}, targets(pool.scenes[chosen]))
        loss.backward()  # type: ignore[no-untyped-call]
        state.step(step / settings.iterations)
        return {"loss": float(loss.detach())}

    run_steps({"state": state}, iterate, settings, path, context, report)
    state.copy_average_to(network)
    return network.eval().requires_grad_(False)
