"""Measures of pictures that need no learned weights."""

# F frames, H height, W width; frames are uint8 (F, H, W, 3) RGB

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nasa_video.files.frames import Frames, check_frames

Luma = NDArray[np.float32]
# ITU-R BT.601, as video codecs weigh the channels of standard definition.
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class Quality:
    """Means over a video.

    Attributes:
        luma: brightness, 0 to 255.
        sharpness: standard deviation of the Laplacian over that of the luma, noise taken out of the former; without
            a unit. Unlike the Laplacian's variance it does not fall with brightness or rise with noise.
        noise: standard deviation of additive noise, in grey levels (J. Immerkaer, CVIU 64, 1996).
        colourfulness: Hasler and Suesstrunk, SPIE 5007, 2003; 0 is grey.
        flicker: mean absolute change of a frame's mean luma from frame to frame, in grey levels.
        motion: mean absolute change of a pixel's luma from frame to frame, flicker taken out, in grey levels.
    """

    luma: float
    sharpness: float
    noise: float
    colourfulness: float
    flicker: float
    motion: float


def quality(frames: Frames) -> Quality:
    """Measure a video of at least one frame of at least 3 x 3 pixels."""
    pictures = check_frames(frames).astype(np.float32)
    luma = pictures @ _LUMA
    if min(luma.shape[1:]) < 3:
        raise ValueError(f"frames must be at least 3 x 3 pixels, got {luma.shape[2]} x {luma.shape[1]}")
    noise = _noise(luma)
    means = luma.mean(axis=(1, 2))
    steps = np.diff(luma - means[:, None, None], axis=0)
    return Quality(
        luma=float(luma.mean()),
        sharpness=_sharpness(luma, noise),
        noise=float(noise.mean()),
        colourfulness=_colourfulness(pictures),
        flicker=float(np.abs(np.diff(means)).mean()) if len(means) > 1 else 0.0,
        motion=float(np.abs(steps).mean()) if len(means) > 1 else 0.0,
    )


def mean_quality(rows: list[Quality]) -> Quality:
    """The mean of several videos' measures."""
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in dataclasses.fields(Quality)}
    return Quality(**{name: float(np.mean(values)) for name, values in columns.items()})


def _laplacian(luma: Luma) -> Luma:
    inner = luma[:, 1:-1, 1:-1]
    return luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * inner


def _noise(luma: Luma) -> NDArray[np.float32]:
    """Noise of each frame, (F,): the mean of a kernel that is blind to edges and ramps."""
    vertical = luma[:, :-2] - 2 * luma[:, 1:-1] + luma[:, 2:]
    both = vertical[..., :-2] - 2 * vertical[..., 1:-1] + vertical[..., 2:]
    estimate: NDArray[np.float32] = np.abs(both).mean(axis=(1, 2)) * np.sqrt(np.pi / 2) / 6
    return estimate


def _sharpness(luma: Luma, noise: NDArray[np.float32]) -> float:
    contrast = luma.var(axis=(1, 2))
    # White noise of variance s^2 has a Laplacian of variance 20 s^2 (the sum of the kernel's squares).
    edges = np.maximum(_laplacian(luma).var(axis=(1, 2)) - 20 * noise**2, 0)
    flat = contrast < 1e-3
    return float(np.where(flat, 0, np.sqrt(edges / np.where(flat, 1, contrast))).mean())


def _colourfulness(pictures: NDArray[np.float32]) -> float:
    red, green, blue = np.moveaxis(pictures, -1, 0)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(axis=(1, 2)), yellow_blue.std(axis=(1, 2)))
    offset = np.hypot(red_green.mean(axis=(1, 2)), yellow_blue.mean(axis=(1, 2)))
    return float((spread + 0.3 * offset).mean())
