"""Where pixels are and how far they lie from a shape's edge.

Shape legend: H height, W width.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from nasa_video.sprites.world import SHAPES
from research.sprites.scenes import FRAME_SIZE

SDF_SIZE = 96
"""Samples of a distance field along each axis."""
SDF_EXTENT = 1.6
"""A distance field spans [-1.6, 1.6] sprite radii."""


def pixel_grid(device: torch.device) -> tuple[Tensor, Tensor]:
    """x (1, W) and y (H, 1) of the pixels' centres."""
    axis = torch.arange(FRAME_SIZE, device=device, dtype=torch.float32) + 0.5
    return axis[None, :], axis[:, None]


def _polygon_sdf(x: Tensor, y: Tensor, points: list[tuple[float, float]]) -> Tensor:
    """Signed distance to a polygon, negative inside (even-odd rule)."""
    nearest = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ay != by:
            crosses = ((ay > y) != (by > y)) & (x < ex * (y - ay) / (by - ay) + ax)
            inside = inside ^ crosses
    return torch.where(inside, -nearest.sqrt(), nearest.sqrt())


def _star(corners: int, inner: float, outer: float) -> list[tuple[float, float]]:
    turns = [math.pi * i / corners - math.pi / 2 for i in range(2 * corners)]
    radii = [outer if i % 2 == 0 else inner for i in range(2 * corners)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, turns, strict=True)]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 48 for i in range(48)]
    curve = [
        (16 * math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)))
        for a in turns
    ]
    return [(x / 15.5, (y - 2.5) / 15.5) for x, y in curve]


@lru_cache(maxsize=4)
def shape_fields(device: torch.device) -> Tensor:
    """Signed distances (shapes, 1, 96, 96) over [-1.6, 1.6]^2, in units of the sprite's radius."""
    axis = torch.linspace(-SDF_EXTENT, SDF_EXTENT, SDF_SIZE)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    distance = (x * x + y * y).sqrt()
    triangle = [(0.0, -1.1), (1.1, 0.85), (-1.1, 0.85)]
    by_name = {
        "circle": distance - 0.95,
        "square": torch.maximum(x.abs(), y.abs()) - 0.86,
        "triangle": _polygon_sdf(x, y, triangle),
        "star": _polygon_sdf(x, y, _star(5, 0.5, 1.22)),
        "heart": _polygon_sdf(x, y, _heart()),
        "ring": (distance - 0.74).abs() - 0.28,
    }
    return torch.stack([by_name[name] for name in SHAPES])[:, None].to(device)
