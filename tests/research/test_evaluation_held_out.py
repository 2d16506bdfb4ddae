"""Held-out captions: the kernel distance, and what is asked of a model under a guidance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nasa_video.evaluation.samples import Method
from nasa_video.files.frames import frames_from_tensor
from nasa_video.guidance.methods import Nasa
from nasa_video.sprites.world import sample_scenes
from nasa_video.train.lists import content_words
from research.sprites.held_out import Observer, held_out, kernel_distance, rendered_world
from research.sprites.renderer import render


def normal(n: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    return mean + torch.randn(n, 24, generator=torch.Generator().manual_seed(seed))


def test_the_kernel_distance_has_no_bias_and_sees_a_shift() -> None:
    small = [kernel_distance(normal(12, 2 * i), normal(300, 2 * i + 1)) for i in range(80)]
    mean, error = np.mean(small), np.std(small) / len(small) ** 0.5
    assert abs(mean) < 3 * error
    assert kernel_distance(normal(60, 1, 0.5), normal(300, 2)) > 10 * error
    assert kernel_distance(normal(60, 1, 1.0), normal(300, 2)) > kernel_distance(normal(60, 1, 0.5), normal(300, 2))


def test_no_feature_decides_by_its_unit() -> None:
    scale = torch.logspace(-3, 3, 24)
    a, b = normal(40, 1, 0.4), normal(90, 2)
    assert kernel_distance(a * scale, b * scale) == pytest.approx(kernel_distance(a, b), rel=1e-4)


def test_one_sample_has_no_distance() -> None:
    with pytest.raises(ValueError, match="two samples"):
        kernel_distance(normal(1, 1), normal(9, 2))


class _Shows:
    """Stands for a pipeline: shows given videos (B, F, H, W, 3) and remembers what it was asked for."""

    def __init__(self, videos: np.ndarray[Any, Any]) -> None:
        self.videos, self.asked = videos, []

    def stream_batch(self, prompts: Sequence[str], *, seeds: Sequence[int], **options: Any) -> Iterator[Any]:
        self.asked.append((prompts, options["negatives"]))
        frames = self.videos[list(seeds)]
        for part, share in ((frames[:, :9], 0.0), (frames[:, 9:], 0.5)):
            yield SimpleNamespace(frames=part, out_of_range=[share] * len(seeds))


def test_held_out_captions_are_asked_with_negatives_that_name_nothing_of_them() -> None:
    observer = Observer()
    world = rendered_world(observer, 40, 21)
    scenes = sample_scenes(24, torch.Generator().manual_seed(5))
    rendered = _Shows(np.stack([frames_from_tensor(video) for video in render(scenes, 21)]))
    noise = _Shows(np.random.default_rng(0).integers(0, 256, rendered.videos.shape, dtype=np.uint8))
    ours = held_out(rendered, Method("nasa", Nasa(1.0)), 4, 24, observer, world, batch=16)
    theirs = held_out(noise, Method("none", None), 4, 24, observer, world, batch=16)
    assert [len(prompts) for prompts, _ in rendered.asked] == [16, 8]
    for prompts, negatives in rendered.asked:
        assert all(negatives)
        for prompt, negative in zip(prompts, negatives, strict=True):
            assert not content_words(prompt) & content_words(negative)
    assert all(negatives is None for _, negatives in noise.asked)
    assert theirs.distance > 5 * abs(ours.distance)
    assert ours.out_of_range == pytest.approx(0.25)
    assert 0 < ours.accuracy < 1  # scenes of other captions: right by chance
    assert ours.n == 24
