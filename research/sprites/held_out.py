"""Held-out captions of the sprites world under any guidance: are they followed, and do the pictures look right?"""

# B batch, F frames, H W picture height and width, N M samples, D features

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nasa_video.evaluation.metrics import Quality, quality
from nasa_video.evaluation.samples import Method
from nasa_video.files.frames import Frames, frames_from_tensor, tensor_from_frames
from nasa_video.sprites.detectors import Detector
from nasa_video.sprites.world import sample_scenes
from nasa_video.train.lists import draw_negative_for, make_texts
from nasa_video.train.settings import SpritesList
from nasa_video.video.pipeline import VideoPipeline
from research.sprites.assessment import HeldOutPrompt, held_out_prompts
from research.sprites.renderer import render

# Seeds of what is asked and of what it is compared with; training draws from others.
PROMPTS_SEED, NEGATIVES_SEED, WORLD_SEED = 20261123, 1, 20261124


@dataclass(frozen=True)
class HeldOut:
    """Means over n videos.

    Attributes:
        accuracy: share of the stated attributes that the detector finds.
        distance: kernel distance to rendered clips in the detector's features; 0 is none, lower is better.
        out_of_range: share of colour values beyond black or white.
        sharpness, flicker: see :class:`~nasa_video.evaluation.metrics.Quality`.
    """

    n: int
    accuracy: float
    distance: float
    out_of_range: float
    sharpness: float
    flicker: float

    def row(self) -> dict[str, float]:
        """As a mapping."""
        return asdict(self)


@dataclass(frozen=True)
class World:
    """Rendered clips to compare with: their features (N, D), and their own measures."""

    features_ND: Tensor
    sharpness: float
    flicker: float


class Observer:
    """The sprites' detector with its features, the layer below its answers."""

    def __init__(self, weights: Path | None = None) -> None:
        self.detector = Detector.load(weights)

    def __call__(self, videos: Tensor) -> tuple[dict[str, list[str]], Tensor]:
        """Labels by attribute and features (B, D) of videos (B, F, 3, H, W) in [-1, 1]."""
        with _inputs_of(self.detector.network.heads["flaws"]) as seen:
            labels = self.detector.detect(videos)
        return labels, torch.cat(seen)


@contextmanager
def _inputs_of(layer: torch.nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().float().cpu()))
    try:
        yield seen
    finally:
        handle.remove()


def kernel_distance(own_ND: Tensor, other_MD: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under ``(x . y / D + 1)^3`` (KID; arXiv 1801.01401, section 4).

    Every feature is first divided by its deviation in ``other_MD``, so that none of them decides alone. Unlike a
    Frechet distance it has no bias that depends on the number of samples; it can come out slightly below 0.

    Raises:
        ValueError: fewer than two samples of either.
    """
    n, m = len(own_ND), len(other_MD)
    if min(n, m) < 2:
        raise ValueError(f"a kernel distance needs two samples of each, got {n} and {m}")
    scale = other_MD.double().std(0).clamp_min(1e-6)
    middle = other_MD.double().mean(0)
    x, y = ((part.double() - middle) / scale for part in (own_ND, other_MD))

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    within_x, within_y = kernel(x, x), kernel(y, y)
    same_x = (within_x.sum() - within_x.diagonal().sum()) / (n * (n - 1))
    same_y = (within_y.sum() - within_y.diagonal().sum()) / (m * (m - 1))
    return float(same_x + same_y - 2 * kernel(x, y).mean())


def rendered_world(observer: Observer, clips: int, frames: int) -> World:
    """Clips of scenes drawn from the world's distribution, as the renderer shows them."""
    scenes = sample_scenes(clips, torch.Generator().manual_seed(WORLD_SEED))
    features, measured = [], []
    for start in range(0, clips, 32):
        videos = render(scenes[slice(start, start + 32)], frames)
        features.append(observer(videos)[1])
        measured += [quality(frames_from_tensor(video)) for video in videos]
    mean = _mean(measured)
    return World(torch.cat(features), mean.sharpness, mean.flicker)


def held_out(
    pipeline: VideoPipeline, method: Method, steps: int, n: int, observer: Observer, world: World, batch: int = 16
) -> HeldOut:
    """n captions that training never saw, each with a negative that names nothing of it.

    Where the method is not "none" the negative acts, and should change nothing that is stated.

    Args:
        n: at least 2.
    """
    cases = held_out_prompts(n, PROMPTS_SEED)
    rng = random.Random(NEGATIVES_SEED)
    phrases = make_texts(SpritesList(kind="sprites", seed=NEGATIVES_SEED, count=400), negatives=True)
    negatives = [draw_negative_for(case.text, phrases, rng, avoid_overlap=True) for case in cases]
    right = stated = 0
    features, measured, beyond = [], [], []
    for start in range(0, n, batch):
        part, seeds = cases[start : start + batch], list(range(start, min(start + batch, n)))
        videos, shares = _videos(pipeline, method, steps, part, negatives[start : start + batch], seeds)
        labels, seen = observer(torch.stack([tensor_from_frames(video) for video in videos]))
        features.append(seen)
        measured += [quality(video) for video in videos]
        beyond += shares
        for index, case in enumerate(part):
            right += sum(labels[name][index] == value for name, value in case.stated.items())
            stated += len(case.stated)
    mean = _mean(measured)
    return HeldOut(
        n=n, accuracy=right / stated, distance=kernel_distance(torch.cat(features), world.features_ND),
        out_of_range=float(np.mean(beyond)), sharpness=mean.sharpness, flicker=mean.flicker,
    )  # fmt: skip


def _videos(
    pipeline: VideoPipeline,
    method: Method,
    steps: int,
    cases: Sequence[HeldOutPrompt],
    negatives: Sequence[str],
    seeds: Sequence[int],
) -> tuple[list[Frames], list[float]]:
    """A batch of videos (F, H, W, 3), and each one's share of values out of range."""
    chunks = list(
        pipeline.stream_batch(
            [case.text for case in cases],
            seeds=seeds,
            negatives=negatives if method.guidance else None,
            guidance=method.guidance,
            steps=steps,
        )
    )
    videos = np.concatenate([chunk.frames for chunk in chunks], axis=1)
    return list(videos), np.mean([chunk.out_of_range for chunk in chunks], axis=0).tolist()


def _mean(rows: list[Quality]) -> Quality:
    """The mean of several videos' measures."""
    return Quality(
        **{field.name: float(np.mean([getattr(row, field.name) for row in rows])) for field in fields(Quality)}
    )
