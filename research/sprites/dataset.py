"""Encoded clips of the sprites world with fresh captions.

Shape legend: B batch, T latent frames, C channels, h w latent height and width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nn_f
from diffusers import AutoencoderKLWan
from numpy.typing import NDArray
from torch import Tensor

from causvid_adapter.vae import normalize
from nasa_video.sprites.captions import random_caption
from nasa_video.sprites.world import ATTRIBUTES, FLAWS, MOTIONS, Scenes, sample_scenes
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.state import load_state, save_state
from research.sprites.captions import switched_captions
from research.sprites.renderer import render_switched
from research.sprites.scenes import CLIP_CHUNKS, CLIP_FRAMES, concatenate, first_frame_of, sample_switches
from research.sprites.stage import autocast

SHARD_CLIPS = 256
CHUNK_FRAMES = 9
"""Frames of a clip's first chunk."""


@dataclass(frozen=True)
class Draw:
    """Which B clips a batch holds and what is said of them: all of it that is made without their latents.

    The captions are one a clip (B), or one a chunk (B * chunks, a clip's side by side) where the clips switch.
    """

    index: list[int]
    captions: list[str]

    def with_some_empty(self, share: float, rng: random.Random) -> Draw:
        """The same clips, the captions of some emptied."""
        per_clip = len(self.captions) // len(self.index)
        dropped = [rng.random() < share for _ in self.index]
        captions = ["" if dropped[i // per_clip] else text for i, text in enumerate(self.captions)]
        return replace(self, captions=captions)


@dataclass(frozen=True)
class ClipBatch:
    """Clean latents (B, T, C, h, w) and the sprites' coverage of each latent cell (B, T, 1, h, w)."""

    latents: Tensor
    coverage: Tensor


def is_easy(row: Mapping[str, int]) -> bool:
    """Whether a scene is one sprite of one colour, with no weather and no flaw: its shape is plain to see."""
    return not any(row[name] for name in ("count", "texture", "weather", *FLAWS))


def is_hard(row: Mapping[str, int]) -> bool:
    """Whether a scene is one that small models draw worst: two small sprites, or one that turns."""
    return row["count"] == ATTRIBUTES["count"].index("two") or row["motion"] == MOTIONS.index("spinning")


class LatentClips:
    """Clips held in memory as float16 latents.

    Args:
        latents: (N, T, C, h, w), normalised.
        coverage: (N, T, 1, h, w) in [0, 1].
        scenes: the N scenes that the captions speak of.
        later: what they turn into.
        chunk: (N,) the first chunk of the later scene, 0 where there is no switch.
    """

    def __init__(self, latents: Tensor, coverage: Tensor, scenes: Scenes, later: Scenes, chunk: Tensor) -> None:
        self.latents, self.coverage, self.scenes = latents, coverage, scenes
        self.rows = [scenes.row(i) for i in range(len(scenes))]
        self.later_rows = [later.row(i) for i in range(len(scenes))]
        self.chunk = chunk.tolist()
        self.whole = [i for i, first in enumerate(self.chunk) if first == 0]
        self.switching = [i for i, first in enumerate(self.chunk) if first > 0]
        self.easy = [i for i in self.whole if is_easy(self.rows[i])]
        self.hard = [i for i in self.whole if is_hard(self.rows[i])]

    def __len__(self) -> int:
        return self.latents.shape[0]

    def to(self, device: torch.device) -> LatentClips:
        """The same clips with what batches are taken from on another device; a CPU's stay where they are."""
        if device.type != "cpu":
            self.latents, self.coverage = self.latents.to(device), self.coverage.to(device)
            self.scenes = self.scenes.to(device)
        return self

    def take(self, draw: Draw) -> ClipBatch:
        """The clips that were drawn, in float32."""
        index = torch.tensor(draw.index, device=self.latents.device)
        return ClipBatch(self.latents[index].float(), self.coverage[index].float())

    def draw(self, size: int, seed: int, switching: bool = False, easy: float = 0.0, hard: float = 0.0) -> Draw:
        """A draw that follows from the seed alone, of clips that switch or of clips that do not.

        Of the latter a share `easy` is drawn from those where `is_easy`, a share `hard` from those where `is_hard`, the
        rest from all. The captions of what was drawn for being hard state everything, so that where a caption leaves
        something open, what there is to see is still distributed as in the data.
        """
        rng = random.Random(seed)
        index = rng.choices(self.switching if switching else self.whole, k=size)
        if easy and self.easy and not switching:
            index = [rng.choice(self.easy) if rng.random() < easy else i for i in index]
        full = [bool(hard and self.hard) and not switching and rng.random() < hard for _ in index]
        index = [rng.choice(self.hard) if told_all else i for told_all, i in zip(full, index, strict=True)]
        if switching:
            return Draw(index, [text for i in index for text in self._switched(i, rng)])
        return Draw(
            index, [random_caption(self.rows[i], rng, all_of_it).text for all_of_it, i in zip(full, index, strict=True)]
        )

    def _switched(self, index: int, rng: random.Random) -> list[str]:
        """A caption for each chunk of one clip."""
        before, after = switched_captions(self.rows[index], self.later_rows[index], rng)
        return [before if chunk < self.chunk[index] else after for chunk in range(CLIP_CHUNKS)]


def text_a_chunk(embeds: NDArray[np.float32], clips: Tensor, whole: bool) -> Tensor:
    """Embeddings of captions on the device of clips (B, T, C, h, w): of whole ones a text a chunk, of first chunks one.

    Blocks are compiled for a number of texts: this way it is the same whether the text changes between chunks or not.
    """
    context = torch.from_numpy(embeds).to(clips.device)
    return context.repeat_interleave(CLIP_CHUNKS, 0) if whole and len(context) == len(clips) else context


def _coverage(mask: Tensor, latent_frames: int, cells: int) -> Tensor:
    """Pixels' coverage (B, F, 1, H, W) → the largest in each latent cell (B, T, 1, h, w)."""
    spatial = nn_f.adaptive_max_pool2d(mask.flatten(0, 1), cells).unflatten(0, mask.shape[:2])
    stride = (mask.shape[1] - 1) // (latent_frames - 1)
    later = spatial[:, 1:].unflatten(1, (latent_frames - 1, stride)).amax(2)
    return torch.cat((spatial[:, :1], later), 1)


@torch.no_grad()
def _encode_shard(
    vae: AutoencoderKLWan, seed: int, switched_share: float, num_frames: int, device: torch.device
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_scenes(SHARD_CLIPS, generator)
    later, chunk = sample_switches(scenes, switched_share, generator)
    latents, coverage = [], []
    batch = 16 if device.type == "cpu" else SHARD_CLIPS  # a CPU's caches are small
    for start in range(0, SHARD_CLIPS, batch):
        part = slice(start, start + batch)
        cut = first_frame_of(chunk[part]).to(device)
        frames, mask = render_switched(scenes[part].to(device), later[part].to(device), cut, num_frames)
        with autocast(device):
            raw = vae.encode(frames.transpose(1, 2)).latent_dist.mean.float()
        clean = normalize(vae, raw.transpose(1, 2))
        latents.append(clean.half().cpu())
        coverage.append(_coverage(mask, clean.shape[1], clean.shape[-1]).half().cpu())
    columns = {f.name: getattr(scenes, f.name) for f in fields(scenes)}
    columns |= {f"later_{f.name}": getattr(later, f.name) for f in fields(later)}
    return {"latents": torch.cat(latents), "coverage": torch.cat(coverage), "chunk": chunk, **columns}


def encode_clips(
    vae: AutoencoderKLWan,
    clips: int,
    switched_share: float,
    folder: Path,
    seed: int,
    context: DistributedContext,
    report: Callable[[int, int], None] | None = None,
    num_frames: int = CLIP_FRAMES,
) -> LatentClips:
    """Renders and encodes clips in shards under `folder`, a share of them in each process.

    Shards that are there already are read back. `num_frames` are the frames of a clip, from its start.
    """
    device = context.device
    vae = vae.to(device).eval()
    total = -(-clips // SHARD_CLIPS)
    paths = [folder / f"clips-{number:04d}.pt" for number in range(total)]
    for number in range(context.rank, total, context.size):
        if not paths[number].exists():
            save_state(paths[number], _encode_shard(vae, seed * 1_000_003 + number, switched_share, num_frames, device))
        if report is not None and context.leads:
            report(min(number + context.size, total), total)
    context.wait()
    shards = [shard for path in paths if (shard := load_state(path)) is not None]
    names = [f.name for f in fields(Scenes)]
    return LatentClips(
        torch.cat([s["latents"] for s in shards]),
        torch.cat([s["coverage"] for s in shards]),
        concatenate([Scenes(**{n: s[n] for n in names}) for s in shards]),
        concatenate([Scenes(**{n: s[f"later_{n}"] for n in names}) for s in shards]),
        torch.cat([s["chunk"] for s in shards]),
    )
