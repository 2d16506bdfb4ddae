"""Encoded clips of the sprites world with fresh captions.

Shape legend: B batch, T latent frames, C channels, h w latent height and width.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as nn_f
from diffusers import AutoencoderKLWan
from torch import Tensor

from causvid_adapter.vae_stream import normalize
from nasa_video.sprites.captions import random_caption
from nasa_video.sprites.renderer import render_with_mask
from nasa_video.sprites.world import Scenes, concatenate, sample_scenes
from nasa_video.training.autoencoder import autocast
from nasa_video.training.checkpoint import load_state, save_state
from nasa_video.training.parallel import Team

SHARD_CLIPS = 256


@dataclass(frozen=True)
class ClipBatch:
    """Clean latents (B, T, C, h, w), the sprites' coverage of each latent cell (B, T, 1, h, w), and captions."""

    latents: Tensor
    coverage: Tensor
    captions: list[str]


class LatentClips:
    """Clips held in memory as float16 latents.

    Args:
        latents: (N, T, C, h, w), normalised.
        coverage: (N, T, 1, h, w) in [0, 1].
        scenes: the N scenes that the captions speak of.
    """

    def __init__(self, latents: Tensor, coverage: Tensor, scenes: Scenes) -> None:
        self.latents, self.coverage, self.scenes = latents, coverage, scenes
        self.rows = [scenes.row(i) for i in range(len(scenes))]

    def __len__(self) -> int:
        return self.latents.shape[0]

    def batch(self, size: int, seed: int) -> ClipBatch:
        """A batch that follows from the seed alone."""
        rng = random.Random(seed)
        index = [rng.randrange(len(self)) for _ in range(size)]
        captions = [random_caption(self.rows[i], rng).text for i in index]
        return ClipBatch(self.latents[index].float(), self.coverage[index].float(), captions)


def _coverage(mask: Tensor, latent_frames: int, cells: int) -> Tensor:
    """Pixels' coverage (B, F, 1, H, W) → the largest in each latent cell (B, T, 1, h, w)."""
    spatial = nn_f.adaptive_max_pool2d(mask.flatten(0, 1), cells).unflatten(0, mask.shape[:2])
    stride = (mask.shape[1] - 1) // (latent_frames - 1)
    later = spatial[:, 1:].unflatten(1, (latent_frames - 1, stride)).amax(2)
    return torch.cat((spatial[:, :1], later), 1)


@torch.no_grad()
def _encode_shard(vae: AutoencoderKLWan, seed: int, device: torch.device, batch: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(SHARD_CLIPS, generator)
    latents, coverage = [], []
    for start in range(0, SHARD_CLIPS, batch):
        frames, mask = render_with_mask(scenes[slice(start, start + batch)].to(device))
        with autocast(device):
            raw = vae.encode(frames.transpose(1, 2)).latent_dist.mean.float()
        clean = normalize(vae, raw.transpose(1, 2))
        latents.append(clean.half().cpu())
        coverage.append(_coverage(mask, clean.shape[1], clean.shape[-1]).half().cpu())
    columns = {f.name: getattr(scenes, f.name) for f in fields(scenes)}
    return {"latents": torch.cat(latents), "coverage": torch.cat(coverage), **columns}


def encode_clips(
    vae: AutoencoderKLWan,
    clips: int,
    folder: Path,
    seed: int,
    device: torch.device,
    team: Team,
    report: Callable[[int, int], None] | None = None,
) -> LatentClips:
    """Renders and encodes clips in shards under `folder`, a share of them in each process of the team.

    Shards that are there already are read back.
    """
    vae = vae.to(device).eval()
    total = -(-clips // SHARD_CLIPS)
    paths = [folder / f"clips-{number:04d}.pt" for number in range(total)]
    for number in range(team.rank, total, team.size):
        if not paths[number].exists():
            save_state(paths[number], _encode_shard(vae, seed * 1_000_003 + number, device))
        if report is not None and team.leads:
            report(min(number + team.size, total), total)
    team.wait()
    shards = [shard for path in paths if (shard := load_state(path)) is not None]
    names = [f.name for f in fields(Scenes)]
    return LatentClips(
        torch.cat([s["latents"] for s in shards]),
        torch.cat([s["coverage"] for s in shards]),
        concatenate([Scenes(**{n: s[n] for n in names}) for s in shards]),
    )
