"""Frames and tensors; also the clip that the other video tests use."""

import numpy as np
import pytest
import torch

from nasa_video.files.frames import check_frames, enlarge, frames_from_tensor, tensor_from_frames


def make_clip(num_frames: int, height: int = 64, width: int = 64, first: int = 0) -> np.ndarray:
    """Smooth, coloured, and every frame known by its brightness: 6 levels more than the one before, for 30 frames."""
    y, x = np.mgrid[:height, :width]
    shade = np.stack([x * 60 // width, y * 60 // height, np.full_like(x, 20)], -1)
    levels = 6 * (np.arange(first, first + num_frames) % 30)
    return (levels[:, None, None, None] + shade).astype(np.uint8)


def assert_same_frames(got: np.ndarray, expected: np.ndarray, tolerance: float = 3) -> None:
    """Near-equal, and each frame's brightness nearer to its own than to a neighbour's (6 levels off).

    decord turns YUV into RGB without rounding, which alone makes pictures 1 to 1.5 levels darker.
    """
    assert got.shape == expected.shape
    differences = got.astype(int) - expected
    assert np.abs(differences).mean(axis=(1, 2, 3)).max() < tolerance
    assert np.abs(differences.mean(axis=(1, 2, 3))).max() < 2.9


def test_tensor_ends_and_middle() -> None:
    video = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    assert frames_from_tensor(video).ravel().tolist() == [0, 128, 255]


def test_overshoot_is_clamped_not_wrapped() -> None:
    assert frames_from_tensor(torch.tensor([-1.3, 1.004, 7.0]).view(1, 3, 1, 1)).ravel().tolist() == [0, 255, 255]


def test_every_byte_survives_the_way_there_and_back() -> None:
    frames = np.arange(256 * 3, dtype=np.int64).astype(np.uint8).reshape(4, 8, 8, 3)
    frames.flags.writeable = False
    tensor = tensor_from_frames(frames)
    assert tensor.shape == (4, 3, 8, 8)
    assert tensor.min() == -1
    assert tensor.max() == 1
    assert np.array_equal(frames_from_tensor(tensor), frames)
    assert np.array_equal(frames_from_tensor(tensor.bfloat16().float()).shape, frames.shape)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_models_are_not_hidden(bad: float) -> None:
    video = torch.zeros(2, 3, 4, 4)
    video[1, 2, 3, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        frames_from_tensor(video)


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (3, 4, 4)])
def test_wrong_layout_of_a_tensor(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(F, 3, H, W\)"):
        frames_from_tensor(torch.zeros(shape))


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, 4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((1, 3, 4, 4), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
    ],
)
def test_wrong_frames(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="frames must be uint8"):
        check_frames(frames)


def test_enlarging_keeps_the_picture() -> None:
    clip = make_clip(2, 8, 6)
    assert enlarge(clip, 1) is clip
    assert np.array_equal(enlarge(clip, 3, "nearest")[:, ::3, ::3], clip)
    smooth = enlarge(clip, 3)
    assert smooth.shape == (2, 24, 18, 3)
    assert abs(smooth.mean() - clip.mean()) < 1
