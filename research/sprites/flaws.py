"""What a bad camera and a bad player do to a picture.

Shape legend: B batch, F frames, H height, W width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as nn_f
from torch import Tensor

from nasa_video.sprites.world import Scenes
from research.sprites.geometry import pixel_grid
from research.sprites.scenes import FRAME_SIZE


@lru_cache(maxsize=4)
def _blur_matrix(sigma: float, device: torch.device) -> Tensor:
    """Matrix (H, H) of a one-dimensional Gaussian blur with replicated edges."""
    reach = int(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    taps = taps / taps.sum()
    matrix = torch.zeros(FRAME_SIZE, FRAME_SIZE)
    for offset, tap in zip(range(-reach, reach + 1), taps, strict=True):
        source = (torch.arange(FRAME_SIZE) + offset).clamp(0, FRAME_SIZE - 1)
        matrix[torch.arange(FRAME_SIZE), source] += tap
    return matrix.to(device)


def _blur(picture: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (..., H, W) with replicated edges."""
    matrix = _blur_matrix(sigma, picture.device)
    return matrix @ picture @ matrix.T


@lru_cache(maxsize=4)
def _grain_tile(device: torch.device) -> Tensor:
    """One fixed tile (3, 16, 16) of coarse grain with mean zero."""
    generator = torch.Generator().manual_seed(20241203)
    cells = torch.rand(3, 8, 8, generator=generator) * 0.6 + torch.rand(1, 8, 8, generator=generator) * 1.4
    tile = (cells - cells.mean((1, 2), keepdim=True)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return tile.to(device)


def _grain(time_F: Tensor) -> Tensor:
    """Dancing grain (F, 3, H, W): the tile jumps to four places in turn, every four frames the same."""
    device = time_F.device
    tile = _grain_tile(device)
    offset = torch.tensor(((0, 0), (6, 10), (12, 4), (2, 14)), device=device)[time_F.long() % 4]
    axis = torch.arange(FRAME_SIZE, device=device)
    rows = (axis[None, :] + offset[:, 0:1]) % 16
    columns = (axis[None, :] + offset[:, 1:2]) % 16
    return tile[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)


def _watermark(device: torch.device) -> Tensor:
    """Two planes (2, H, W): where the mark's plate is, and where its letters are."""
    x, y = pixel_grid(device)
    plate = ((x > 36) & (x < 61) & (y > 48) & (y < 60)).float()
    along, up = x - 36, y - 48
    letters = ((along % 8 > 2.6) & (along % 8 < 5) & (up > 2.5) & (up < 9.5) & (along < 24)).float()
    bars = (((up > 2.5) & (up < 4.9)) & (along % 8 > 2.6) & (along < 22.5)).float()
    return torch.stack((plate, torch.maximum(letters, bars) * plate))


def apply_flaws(picture: Tensor, scenes: Scenes, time_F: Tensor) -> Tensor:
    """Applies the flaws, in the order in which a bad camera and a bad player would."""
    device = picture.device
    x, y = pixel_grid(device)
    if (index := scenes.blurry.nonzero()[:, 0]).numel():
        picture[index] = _blur(picture[index], 2.6)
    if (index := scenes.pixelated.nonzero()[:, 0]).numel():
        small = nn_f.avg_pool2d(picture[index].flatten(0, 1), 4)
        blocks = nn_f.interpolate(small, scale_factor=4.0, mode="nearest").view_as(picture[index])
        picture[index] = blocks * torch.where((x.floor() % 4 == 3) | (y.floor() % 4 == 3), 0.75, 1.0)
    if (index := scenes.noisy.nonzero()[:, 0]).numel():
        picture[index] = picture[index] + 0.24 * _grain(time_F)
    if (index := scenes.dim.nonzero()[:, 0]).numel():
        picture[index] = picture[index] * 0.4
    if (index := scenes.flickering.nonzero()[:, 0]).numel():
        beat = torch.tensor((1.0, 0.45, 0.45, 1.0), device=device)[time_F.long() % 4]
        picture[index] = picture[index].clamp(0, 1) * beat[None, :, None, None, None]
    edge = torch.minimum(torch.minimum(x, FRAME_SIZE - x), torch.minimum(y, FRAME_SIZE - y))
    if (index := scenes.border.nonzero()[:, 0]).numel():
        frame = torch.where(edge < 3, 0.02, 0.98)
        picture[index] = torch.where(edge < 5, frame, picture[index])
    if (index := scenes.watermark.nonzero()[:, 0]).numel():
        plate, letters = _watermark(device)
        picture[index] = picture[index] * (1 - 0.7 * plate) + 0.7 * plate * (0.92 - 0.85 * letters)
    return picture
