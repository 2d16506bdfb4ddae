"""Draws scenes: a batched, anti-aliased renderer in plain torch, on any device.

Positions lie on a grid of eight pixels at every fourth frame, and everything that moves has come to a whole cell, or
through a whole quarter of its period, by then: a small autoencoder with strides of four frames and eight pixels, and a
small transformer on its latents, see few patterns instead of a continuum.

Shape legend: B batch, F frames, H height, W width, P polygon points.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nn_f
from torch import Tensor

from nasa_video.sprites.world import MOTIONS, Scenes
from research.sprites.flaws import apply_flaws
from research.sprites.geometry import SDF_EXTENT, pixel_grid, shape_fields
from research.sprites.scenes import CLIP_FRAMES, FRAME_SIZE

RADIUS = (12.0, 20.0)
"""Radius of a small and of a big sprite in pixels."""
CELL = 8
"""Pixels of the grid that positions lie on."""
SPEED = CELL / 4
"""Pixels a frame of the four straight motions."""
PERIOD = 16
"""Frames in which a sprite bounces, turns or pulses once."""
_PALETTE = (
    (0.90, 0.16, 0.17),
    (0.98, 0.55, 0.10),
    (0.97, 0.87, 0.17),
    (0.16, 0.70, 0.30),
    (0.18, 0.42, 0.93),
    (0.62, 0.25, 0.80),
)


def render(scenes: Scenes, num_frames: int = CLIP_FRAMES, first_frame: int = 0) -> Tensor:
    """Frames (B, F, 3, 64, 64) in [-1, 1], on the scenes' device."""
    return render_with_mask(scenes, num_frames, first_frame)[0]


def render_with_mask(scenes: Scenes, num_frames: int = CLIP_FRAMES, first_frame: int = 0) -> tuple[Tensor, Tensor]:
    """Frames (B, F, 3, 64, 64) in [-1, 1] and the sprites' coverage (B, F, 1, 64, 64) in [0, 1].

    A scene whose `count` is -1 shows its background alone.
    """
    time_F = torch.arange(first_frame, first_frame + num_frames, device=scenes.shape.device, dtype=torch.float32)
    picture = _background(scenes)[:, None].expand(-1, num_frames, -1, -1, -1)
    first, mask = _sprite(scenes, time_F, second=False)
    mask = mask * (scenes.count >= 0)[:, None, None, None, None]
    picture = torch.lerp(picture, first, mask)
    two = scenes.count == 1
    if two.any():
        second, mask2 = _sprite(scenes[two], time_F, second=True)
        picture, mask = picture.clone(), mask.clone()
        picture[two] = torch.lerp(picture[two], second, mask2)
        mask[two] = torch.maximum(mask[two], mask2)
    picture = apply_flaws(_weather(picture.contiguous(), scenes, time_F), scenes, time_F)
    return picture.clamp(0, 1) * 2 - 1, mask


def render_switched(
    scenes: Scenes, later: Scenes, cut_B: Tensor, num_frames: int = CLIP_FRAMES, first_frame: int = 0
) -> tuple[Tensor, Tensor]:
    """As `render_with_mask`, but from frame `cut_B` of a clip on, its row of `later` is shown; 0 never switches."""
    frames, mask = render_with_mask(scenes, num_frames, first_frame)
    index = (cut_B > 0).nonzero()[:, 0]
    if len(index):
        frames2, mask2 = render_with_mask(later[index], num_frames, first_frame)
        after = (torch.arange(num_frames, device=cut_B.device) >= cut_B[index, None])[:, :, None, None, None]
        frames[index] = torch.where(after, frames2, frames[index])
        mask[index] = torch.where(after, mask2, mask[index])
    return frames, mask


# --- sprites ---------------------------------------------------------------------------------------------------------


def _motion(scenes: Scenes, time_F: Tensor, second: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre x, centre y, angle and scale of a sprite, each (B, F)."""
    jitter, t = scenes.jitter, time_F[None, :]
    radius = torch.tensor(RADIUS, device=t.device)[scenes.size][:, None]
    motion = scenes.motion[:, None]
    is_motion = {name: motion == i for i, name in enumerate(MOTIONS)}
    middle = FRAME_SIZE / 2
    side = torch.where(scenes.count == 1, 16.0 if second else -16.0, 0.0)[:, None]
    sideways = is_motion["left"] | is_motion["right"]
    # one sprite stands in the middle or a cell beside it; two leave each other room
    wander_x = CELL * ((3 * jitter[:, 0:1]).floor() - 1) * (side == 0)
    wander_y = CELL * ((3 * jitter[:, 1:2]).floor() - 1)
    x = middle + torch.where(sideways, 0.0, side + wander_x)
    y = middle + torch.where(sideways, torch.where(side == 0, wander_y, side), wander_y)
    # straight motions: most clips cross the middle, the rest start anywhere and come back in on the other side
    length = FRAME_SIZE + 2 * (radius + CELL)
    anywhere = CELL * (jitter[:, 3:4] * length / CELL).floor()
    start = torch.where(jitter[:, 2:3] < 0.65, -CELL * (3 + (3 * jitter[:, 3:4]).floor()), anywhere)
    travelled = (start + SPEED * t + length / 2) % length - length / 2
    x = torch.where(is_motion["right"], middle + travelled, torch.where(is_motion["left"], middle - travelled, x))
    y = torch.where(is_motion["down"], middle + travelled, torch.where(is_motion["up"], middle - travelled, y))
    phase = (t / PERIOD + (4 * jitter[:, 4:5]).floor() / 4) % 1
    floor = FRAME_SIZE - radius - 3
    height = (FRAME_SIZE - 2 * radius - 6).clamp(max=28)
    y = torch.where(is_motion["bouncing"], floor - height * 4 * phase * (1 - phase), y)
    angle = torch.where(is_motion["spinning"], 2 * math.pi * phase, torch.zeros_like(t))
    scale = torch.where(is_motion["pulsing"], 1 + 0.28 * torch.sin(2 * math.pi * phase), torch.ones_like(t))
    return x, y, angle, scale


def _texture(u: Tensor, v: Tensor, texture_B: Tensor, softness: Tensor) -> Tensor:
    """Share of the second paint (B, F, H, W) on a sprite at (u, v), both in pixels from its centre."""
    stripes = torch.sin(2 * math.pi * v / CELL) / softness
    dots = (torch.cos(2 * math.pi * u / CELL) + torch.cos(2 * math.pi * v / CELL) - 0.75) / softness
    chosen = torch.where((texture_B == 1)[:, None, None, None], stripes, dots)
    return torch.sigmoid(4 * chosen) * (texture_B > 0).float()[:, None, None, None]


def _sprite(scenes: Scenes, time_F: Tensor, second: bool) -> tuple[Tensor, Tensor]:
    """Paint (B, F, 3, H, W) and coverage (B, F, 1, H, W) of one sprite a scene."""
    device = time_F.device
    centre_x, centre_y, angle, scale = (m[:, :, None, None] for m in _motion(scenes, time_F, second))
    radius = torch.tensor(RADIUS, device=device)[scenes.size][:, None, None, None]
    x, y = pixel_grid(device)
    dx, dy = (x - centre_x) / scale, (y - centre_y) / scale
    cos, sin = torch.cos(angle), torch.sin(angle)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    shape = scenes.shape2 if second else scenes.shape
    fields = shape_fields(device)[shape]
    batch, frames = u.shape[:2]
    grid = torch.stack((u / radius, v / radius), -1) / SDF_EXTENT
    distance = nn_f.grid_sample(
        fields, grid.flatten(1, 2), mode="bilinear", padding_mode="border", align_corners=True
    ).view(batch, frames, FRAME_SIZE, FRAME_SIZE)
    coverage = (0.5 - distance * radius * scale).clamp(0, 1)
    colour = torch.tensor(_PALETTE, device=device)[scenes.colour2 if second else scenes.colour]
    colour = colour * (0.95 + 0.1 * scenes.jitter[:, 5:6])
    shade = 1 - 0.32 * torch.sigmoid(6 * (u + v) / radius / 1.414 - 1.2)
    white = _texture(u, v, scenes.texture, torch.ones_like(scale))
    paint = colour[:, None, :, None, None] * shade[:, :, None]
    pale, ink = torch.tensor((0.97, 0.97, 0.95), device=device), torch.tensor((0.13, 0.12, 0.20), device=device)
    accent = torch.where((scenes.background == 1)[:, None], ink, pale)[:, None, :, None, None]
    return torch.lerp(paint, accent.expand_as(paint), white[:, :, None]), coverage[:, :, None]


# --- backgrounds and weather -----------------------------------------------------------------------------------------

_STARS = (
    (3, 5, 1.4), (17, 12, 1.0), (29, 3, 1.2), (44, 9, 1.5), (58, 15, 1.0), (9, 22, 1.1), (25, 27, 1.5), (39, 21, 1.0),
    (53, 30, 1.3), (4, 38, 1.2), (19, 43, 1.0), (33, 39, 1.3), (47, 46, 1.1), (61, 41, 1.4), (12, 55, 1.4),
    (27, 58, 1.1), (41, 60, 1.5), (55, 57, 1.0),
)  # fmt: skip
_FLAKES = ((4, 6, 2.1), (20, 2, 1.7), (12, 17, 1.9), (27, 22, 2.2), (5, 28, 1.6))


def _spots(x: Tensor, y: Tensor, spots: tuple[tuple[float, float, float], ...], period: float) -> Tensor:
    """Coverage of soft round spots that repeat with a period, at pixel coordinates x, y (…, H, W)."""
    cover = torch.zeros_like(x + y)
    for spot_x, spot_y, radius in spots:
        dx = (x - spot_x + period / 2) % period - period / 2
        dy = (y - spot_y + period / 2) % period - period / 2
        cover = torch.maximum(cover, (radius + 0.5 - (dx * dx + dy * dy).sqrt()).clamp(0, 1))
    return cover


def _soft_square(phase: Tensor, sharpness: float) -> Tensor:
    """A square wave of period 1 in [0, 1] with soft edges."""
    return torch.sigmoid(sharpness * torch.sin(2 * math.pi * phase))


def _background(scenes: Scenes) -> Tensor:
    """Backgrounds (B, 3, H, W) in [0, 1]."""
    device, batch = scenes.shape.device, len(scenes)
    x, y = pixel_grid(device)
    jitter = scenes.jitter[:, :, None, None]
    shift_x, shift_y = (CELL * (jitter[:, k] * 2).floor() for k in (6, 7))
    down = (y / FRAME_SIZE).expand(FRAME_SIZE, FRAME_SIZE)[None].expand(batch, -1, -1)
    stripes = _soft_square((x + shift_x) / (2 * CELL), 8.0).expand(batch, FRAME_SIZE, FRAME_SIZE)
    waves = torch.sin(math.pi * (x + shift_x) / CELL) * torch.sin(math.pi * y / CELL)
    checks = torch.sigmoid(14 * waves)
    starry = scenes.background == 5
    stars = torch.zeros(batch, FRAME_SIZE, FRAME_SIZE, device=device)
    if starry.any():
        stars[starry] = _spots(x + 4 * shift_x[starry], y + 4 * shift_y[starry], _STARS, 64)
    flat = torch.zeros_like(stars)
    mix = torch.stack((flat, flat, down, stripes, checks, stars), 1)
    chosen = mix[torch.arange(batch, device=device), scenes.background][:, None]
    low = torch.tensor(
        (
            (0.09, 0.10, 0.14),
            (0.86, 0.85, 0.82),
            (0.15, 0.19, 0.34),
            (0.30, 0.33, 0.37),
            (0.40, 0.36, 0.34),
            (0.04, 0.04, 0.12),
        ),
        device=device,
    )[scenes.background][:, :, None, None]
    high = torch.tensor(
        (
            (0.09, 0.10, 0.14),
            (0.86, 0.85, 0.82),
            (0.72, 0.82, 0.84),
            (0.56, 0.59, 0.63),
            (0.68, 0.63, 0.58),
            (0.95, 0.95, 0.88),
        ),
        device=device,
    )[scenes.background][:, :, None, None]
    return torch.lerp(low, high, chosen) + 0.04 * (jitter[:, 8:9] - 0.5)


def _weather(picture: Tensor, scenes: Scenes, time_F: Tensor) -> Tensor:
    """Adds falling snow (a cell in four frames) or rain (two cells, so it repeats every four frames)."""
    x, y = pixel_grid(time_F.device)
    for name, tile, speed in (("snow", 32.0, SPEED), ("rain", 16.0, 4.0)):
        index = (scenes.weather == (1 if name == "snow" else 2)).nonzero()[:, 0]
        if not len(index):
            continue
        jitter = scenes.jitter[index][:, :, None, None, None]
        fall = y - speed * time_F[None, :, None, None] - CELL * (jitter[:, 9] * tile / CELL).floor()
        across = x + CELL * (jitter[:, 10] * tile / CELL).floor()
        if name == "snow":
            cover, paint = _spots(across + 0 * fall, fall + 0 * across, _FLAKES, tile), (1.0, 1.0, 1.0)
        else:
            cover, paint = _streaks(across + fall / 4, fall), (0.72, 0.84, 0.98)
        colour = torch.tensor(paint, device=picture.device)[None, None, :, None, None]
        picture[index] = torch.lerp(picture[index], colour.expand_as(picture[index]), 0.95 * cover[:, :, None])
    return picture


def _streaks(across: Tensor, fall: Tensor) -> Tensor:
    """Slanted strokes seven pixels long, two in every 16 x 16 tile."""
    cover = torch.zeros_like(across)
    for spot_x, spot_y in ((3.0, 4.0), (11.0, 12.0)):
        dx = ((across - spot_x + 8) % 16 - 8).abs()
        dy = ((fall - spot_y + 8) % 16 - 8).abs()
        cover = torch.maximum(cover, (1.4 - dx).clamp(0, 1) * (4.0 - dy).clamp(0, 1))
    return cover
