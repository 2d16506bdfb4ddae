from __future__ import annotations

import pytest
import torch

from causvid_adapter import GivenNoise, SeededNoise, ShapeError

SHAPE = (2, 3, 4)


def test_a_frame_has_its_noise_whatever_chunk_it_is_drawn_in() -> None:
    noise = SeededNoise([7], SHAPE)
    whole = noise(range(6), 2)
    assert torch.equal(whole, torch.cat([noise(range(2), 2), noise(range(2, 5), 2), noise(range(5, 6), 2)], dim=1))


def test_a_sample_has_its_noise_whatever_batch_it_is_in() -> None:
    both = SeededNoise([7, 8], SHAPE)(range(3), 0)
    assert torch.equal(both[:1], SeededNoise([7], SHAPE)(range(3), 0))
    assert torch.equal(both[1:], SeededNoise([8], SHAPE)(range(3), 0))


def test_no_two_of_seed_frame_and_step_share_their_noise() -> None:
    drawn = [
        SeededNoise([seed], SHAPE)(range(frame, frame + 1), step)
        for seed in (0, 1, 10, -1)
        for frame in (0, 1, 10)
        for step in (0, 1)
    ]
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == len(drawn)


def test_noise_is_standard_normal_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    drawn = SeededNoise([0], (16, 16, 16))(range(4), 0)
    assert torch.equal(torch.randn(4), expected)
    assert abs(float(drawn.mean())) < 0.03
    assert abs(float(drawn.std()) - 1) < 0.03


def test_noise_of_another_dtype_is_the_same_draw() -> None:
    half = SeededNoise([1], SHAPE, dtype=torch.bfloat16)(range(2), 0)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, SeededNoise([1], SHAPE)(range(2), 0).bfloat16())


def test_given_noise_starts_at_its_first_frame() -> None:
    start = torch.randn(2, 4, *SHAPE)
    noise = GivenNoise(start, first_frame=3)
    assert torch.equal(noise(range(4, 6), 0), start[:, 1:3])
    assert torch.equal(noise(range(4, 6), 1), SeededNoise([0, 1], SHAPE)(range(4, 6), 1))


@pytest.mark.parametrize("frames", [range(2, 4), range(6, 8)])
def test_given_noise_says_which_frames_it_has(frames: range) -> None:
    with pytest.raises(ShapeError, match="covers latent frames 3 to 6"):
        GivenNoise(torch.zeros(1, 4, *SHAPE), first_frame=3)(frames, 0)
