"""Trains the detector on rendered clips, some of them passed through the autoencoder.

Shape legend: B batch, F frames, H height, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as nn_f
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor

from nasa_video.sprites.detectors import CHOICES, OF_A_SPRITE, SEVERAL, Detector, DetectorNetwork, read_labels
from nasa_video.sprites.world import ATTRIBUTES, FLAWS, Scenes, sample_scenes
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.run import Report
from nasa_video.train.state import TrainState, load_state, save_state
from research.sprites.renderer import render
from research.sprites.scenes import concatenate
from research.sprites.stage import autocast, convolution_optimisers, matrix_optimiser, run_steps


@dataclass(frozen=True)
class DetectorTraining:
    """Settings of the detector's training.

    `rendered_clips` are drawn once, which takes longer than looking at them; `decoded_clips` of them are encoded and
    decoded as well, and make up `decoded_share` of every batch. `batch_size` is that of one process.
    """

    iterations: int = 1200
    batch_size: int = 24
    rendered_clips: int = 4096
    decoded_clips: int = 768
    decoded_share: float = 0.4
    matrix_rate: float = 2e-3
    other_rate: float = 1e-3
    empty_share: float = 0.03
    average_decay: float = 0.995
    checkpoint_every: int = 200


def targets(scenes: Scenes) -> dict[str, Tensor]:
    """What `DetectorNetwork` should say: 0/1 rows for colours, shapes and flaws, integers for the rest.

    A scene whose `count` is -1 shows no sprite; its sprite's attributes are then -100, which the loss leaves out.
    """
    two, there = scenes.count == 1, scenes.count >= 0
    result = {}
    for name, first, second in (("colour", scenes.colour, scenes.colour2), ("shape", scenes.shape, scenes.shape2)):
        row = nn_f.one_hot(first, 6) + nn_f.one_hot(second, 6) * two[:, None].long()
        result[name] = (row.clamp(max=1) * there[:, None].long()).float()
    for name in CHOICES:
        value = getattr(scenes, name)
        result[name] = torch.where(there, value, -100) if name in OF_A_SPRITE else value
    result["count"] = torch.where(there, scenes.count, 2)
    result["flaws"] = torch.stack([getattr(scenes, flaw) for flaw in FLAWS], 1).float()
    return result


def truth(scenes: Scenes) -> dict[str, list[str]]:
    """The labels that a perfect detector gives."""
    goal = targets(scenes)
    logits = {name: (goal[name] * 2 - 1) * 20 for name in (*SEVERAL, "flaws")}
    for name, values in CHOICES.items():
        logits[name] = nn_f.one_hot(goal[name].clamp(min=0), len(values)).float() * 40
    return read_labels(logits)


def draw_scenes(n: int, empty_share: float, generator: torch.Generator) -> Scenes:
    """Scenes of the world, a few of them without a sprite, flaws and weather more frequent than in the data."""
    scenes = sample_scenes(n, generator)
    empty = torch.rand(n, generator=generator) < empty_share
    count = torch.where(empty, torch.full_like(scenes.count, -1), scenes.count)
    return Scenes(**{**scenes.__dict__, "count": count})


@torch.no_grad()
def rendered_clips(scenes: Scenes, vae: AutoencoderKLWan | None, device: torch.device, batch: int = 16) -> Tensor:
    """Rendered clips, after encoding and decoding where there is an autoencoder, uint8 (B, F, 3, H, W)."""
    parts = []
    for start in range(0, len(scenes), batch):
        frames = render(scenes[slice(start, start + batch)].to(device))
        if vae is not None:
            with autocast(device):
                latents = vae.encode(frames.transpose(1, 2)).latent_dist.mean
                frames = vae.decode(latents).sample.float().clamp(-1, 1).transpose(1, 2)
        parts.append(((frames + 1) * 127.5).round().byte().cpu())
    return torch.cat(parts)


class ClipPool:
    """One process's rendered clips and their scenes; some of them decoded as well.

    Args:
        settings: how many, shared out among the processes of the team.
        vae: the autoencoder.
        path: a file that keeps the clips, as long as the run's folder.
        seed: of the scenes; every process needs its own.
        device: where to render.
        processes: how many share the work.
    """

    def __init__(
        self,
        settings: DetectorTraining,
        vae: AutoencoderKLWan,
        path: Path,
        seed: int,
        device: torch.device,
        processes: int = 1,
    ) -> None:
        self.old = round(settings.batch_size * settings.decoded_share)
        self.fresh = settings.batch_size - self.old
        count = settings.rendered_clips // processes
        self.scenes = draw_scenes(count, settings.empty_share, torch.Generator().manual_seed(seed))
        clips = load_state(path)
        if clips is None:
            decoded = self.scenes[slice(settings.decoded_clips // processes)]
            clips = {
                "rendered": rendered_clips(self.scenes, None, device),
                "decoded": rendered_clips(decoded, vae, device),
            }
            save_state(path, clips)
        self.rendered, self.decoded = clips["rendered"], clips["decoded"]

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Scenes]:
        """Clips (B, F, 3, H, W) in [-1, 1] and their scenes, the rendered ones first."""
        first = torch.randint(len(self.rendered), (self.fresh,), generator=generator)
        second = torch.randint(len(self.decoded), (self.old,), generator=generator)
        frames = torch.cat((self.rendered[first], self.decoded[second])).float() / 127.5 - 1
        return frames, concatenate([self.scenes[first], self.scenes[second]])


def _augment(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Small changes of gain and level, and a touch of noise, a clip each."""
    draw = torch.rand(frames.shape[0], 3, generator=generator).to(frames.device)[:, :, None, None, None, None]
    noise = torch.randn(frames.shape, generator=generator).to(frames.device)
    return (frames * (0.95 + 0.1 * draw[:, 0]) + 0.1 * (draw[:, 1] - 0.5) + 0.05 * draw[:, 2] * noise).clamp(-1, 1)


# several answers at once count more than one of a choice; shapes are the hardest
_WEIGHT = {"colour": 3.0, "shape": 8.0, "flaws": 5.0}


def detector_loss(logits: dict[str, Tensor], goal: dict[str, Tensor]) -> Tensor:
    """Sum of cross-entropies over the attributes."""
    total = torch.zeros((), device=logits["flaws"].device)
    for name, value in goal.items():
        if value.dtype.is_floating_point:
            total = total + _WEIGHT[name] * nn_f.binary_cross_entropy_with_logits(logits[name], value)
        else:
            total = total + nn_f.cross_entropy(logits[name], value)
    return total


def train_detector(
    settings: DetectorTraining,
    vae: AutoencoderKLWan,
    folder: Path,
    seed: int,
    context: DistributedContext,
    report: Report | None = None,
    start_from: Path | None = None,
) -> Detector:
    """Trains and returns the averaged detector; resumes from `folder`/detector.pt.

    `start_from` is a safetensors file of weights to begin with, in place of fresh ones.
    """
    torch.manual_seed(seed)
    device = context.device
    path = folder / f"detector-clips-{context.rank}.pt"
    pool = ClipPool(settings, vae, path, seed * 1_000 + 77 + context.rank, device, context.size)
    context.wait()
    network = DetectorNetwork().to(device)
    if start_from is not None:
        network.load_state_dict({name: value.float() for name, value in load_file(start_from).items()})
    optimiser = matrix_optimiser(settings.matrix_rate, settings.other_rate)
    state = TrainState(network, optimiser, context, settings.average_decay, convolution_optimisers)

    def iterate(step: int, _: object) -> dict[str, float]:
        generator = torch.Generator().manual_seed(seed * 3_000_017 + context.stream(step))
        clips, scenes = pool.batch(generator)
        frames = _augment(clips.to(device), generator)
        with autocast(device):
            logits = network(frames)
        loss = detector_loss({n: v.float() for n, v in logits.items()}, targets(scenes.to(device)))
        loss.backward()  # type: ignore[no-untyped-call]
        state.step(step / settings.iterations)
        return {"loss": float(loss.detach())}

    run_steps({"state": state}, iterate, settings, folder / "detector.pt", context, report)
    state.copy_average_to(network)
    return Detector(network)


def detector_accuracy(detector: Detector, frames: Tensor, scenes: Scenes) -> dict[str, float]:
    """Share of right labels by attribute on clips (B, F, 3, H, W) in [-1, 1]."""
    found, right = detector.detect(frames), truth(scenes)
    return {
        name: sum(a == b for a, b in zip(found[name], right[name], strict=True)) / len(scenes) for name in ATTRIBUTES
    }
