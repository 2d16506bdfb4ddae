"""The world of the shipped model: what a clip can contain, and how scenes are drawn at random.

A scene is a row of small integers, one per attribute, plus continuous jitter; `research.sprites.renderer.render` turns
scenes into frames, `nasa_video.sprites.captions` into sentences.

Shape legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SIZES = ("small", "big")
TEXTURES = ("plain", "striped", "dotted")
COUNTS = ("one", "two")
MOTIONS = ("left", "right", "up", "down", "bouncing", "spinning", "pulsing", "still")
BACKGROUNDS = ("dark", "light", "gradient", "striped", "checkered", "starry")
WEATHERS = ("none", "snow", "rain")
FLAWS = ("blurry", "noisy", "dim", "flickering", "pixelated", "watermark", "border")

ATTRIBUTES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "shape": SHAPES,
        "colour": COLOURS,
        "size": SIZES,
        "texture": TEXTURES,
        "count": COUNTS,
        "motion": MOTIONS,
        "background": BACKGROUNDS,
        "weather": WEATHERS,
        **{flaw: ("no", flaw) for flaw in FLAWS},
    }
)
"""Every attribute with its values, in the order of the integers in `Scenes`."""

FAVOURITE_COLOUR = (4, 0, 3, 2, 5, 1)
"""Index of the colour that each shape likes: blue circle, red square, green triangle, yellow star, purple heart."""
FAVOURITE_SHARE = 0.4
FLAW_SHARE: Mapping[str, float] = MappingProxyType(
    {
        "blurry": 0.11,
        "noisy": 0.09,
        "dim": 0.11,
        "flickering": 0.08,
        "pixelated": 0.08,
        "watermark": 0.09,
        "border": 0.11,
    }
)
VALUE_SHARE: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "size": (0.45, 0.55),
        "texture": (0.7, 0.15, 0.15),
        "count": (0.87, 0.13),
        "motion": (0.13, 0.13, 0.12, 0.12, 0.14, 0.12, 0.12, 0.12),
        "background": (0.18, 0.18, 0.16, 0.16, 0.16, 0.16),
        "weather": (0.76, 0.12, 0.12),
    }
)
NUM_JITTERS = 16


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes: int64 tensors (B,) that index `ATTRIBUTES`, and `jitter` (B, 16), uniform in [0, 1).

    `shape2` and `colour2` are the second object's; they mean something only where `count` is 1 ("two").
    """

    shape: Tensor
    colour: Tensor
    shape2: Tensor
    colour2: Tensor
    size: Tensor
    texture: Tensor
    count: Tensor
    motion: Tensor
    background: Tensor
    weather: Tensor
    blurry: Tensor
    noisy: Tensor
    dim: Tensor
    flickering: Tensor
    pixelated: Tensor
    watermark: Tensor
    border: Tensor
    jitter: Tensor

    def __len__(self) -> int:
        return self.shape.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Scenes:
        return Scenes(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Scenes:
        """The same scenes on another device."""
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def replace(self, **values: int) -> Scenes:
        """The same scenes with some attributes set to one value for the whole batch."""
        changed = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            changed[name] = torch.full_like(changed[name], value)
        return Scenes(**changed)

    def row(self, index: int) -> dict[str, int]:
        """The integers of one scene by attribute name."""
        return {f.name: int(getattr(self, f.name)[index]) for f in fields(self) if f.name != "jitter"}


def _draw(shares: tuple[float, ...], n: int, generator: torch.Generator) -> Tensor:
    return torch.multinomial(torch.tensor(shares), n, replacement=True, generator=generator)


def _draw_colours(shape_B: Tensor, generator: torch.Generator) -> Tensor:
    n = shape_B.shape[0]
    # a uniform draw hits the favourite too, so the extra share is a little below FAVOURITE_SHARE
    extra = (FAVOURITE_SHARE - 1 / len(COLOURS)) / (1 - 1 / len(COLOURS))
    uniform = torch.randint(len(COLOURS), (n,), generator=generator)
    favourite = torch.tensor(FAVOURITE_COLOUR)[shape_B]
    return torch.where(torch.rand(n, generator=generator) < extra, favourite, uniform)


def sample_scenes(n: int, generator: torch.Generator) -> Scenes:
    """n scenes drawn from the world's distribution.

    Args:
        n: number of scenes.
        generator: a CPU generator; its state alone decides the scenes.

    Two objects are always small, and differ in shape and in colour.
    """
    shape = torch.randint(len(SHAPES), (n,), generator=generator)
    shape2 = (shape + torch.randint(1, len(SHAPES), (n,), generator=generator)) % len(SHAPES)
    colour = _draw_colours(shape, generator)
    colour2 = (colour + torch.randint(1, len(COLOURS), (n,), generator=generator)) % len(COLOURS)
    drawn = {name: _draw(shares, n, generator) for name, shares in VALUE_SHARE.items()}
    drawn["size"] = torch.where(drawn["count"] == 1, torch.zeros_like(drawn["size"]), drawn["size"])
    flaws = {name: (torch.rand(n, generator=generator) < share).long() for name, share in FLAW_SHARE.items()}
    jitter = torch.rand(n, NUM_JITTERS, generator=generator)
    return Scenes(shape=shape, colour=colour, shape2=shape2, colour2=colour2, **drawn, **flaws, jitter=jitter)


def colours_of_shapes() -> Tensor:
    """(shapes, colours): how often a shape has a colour."""
    other = (1 - FAVOURITE_SHARE) / (len(COLOURS) - 1)
    table = torch.full((len(SHAPES), len(COLOURS)), other)
    table[torch.arange(len(SHAPES)), torch.tensor(FAVOURITE_COLOUR)] = FAVOURITE_SHARE
    return table


def decide(scenes: Scenes, left_open: Mapping[str, Tensor], pick: Callable[[str, Tensor], Tensor]) -> Scenes:
    """Scenes with what is left open picked anew, one attribute after the other, as the world has it.

    Args:
        scenes: B scenes.
        left_open: whether an attribute is open, (B,) by name, of every attribute and of the second object's.
        pick: from a name and shares (B, values) to values (B,). Where it draws by these shares, the scenes are
            distributed as `sample_scenes` draws them, given what is not open.
    """
    values = {name: getattr(scenes, name) for name in left_open}
    of_shapes = colours_of_shapes()
    one, two = VALUE_SHARE["count"]
    small, big = VALUE_SHARE["size"]
    sizes_counts = torch.tensor([[one * small, two], [one * big, 0.0]])
    others = 1 - torch.eye(len(SHAPES))

    def given(name: str, if_known: Tensor, if_open: Tensor) -> Tensor:
        return torch.where(left_open[name][:, None], if_open.expand(len(scenes), -1), if_known)

    def settle(name: str, shares: Tensor) -> None:
        shares = (shares / shares.sum(1, keepdim=True)).expand(len(scenes), -1)
        values[name] = torch.where(left_open[name], pick(name, shares), values[name])

    settle("shape", given("colour", of_shapes[:, values["colour"]].T, torch.ones(len(SHAPES))))
    settle("colour", of_shapes[values["shape"]])
    settle("count", given("size", sizes_counts[values["size"]], sizes_counts.sum(0)))
    settle("size", sizes_counts[:, values["count"]].T)
    settle("shape2", others[values["shape"]])
    settle("colour2", others[values["colour"]])
    for name in ("texture", "motion", "background", "weather"):
        settle(name, torch.tensor([VALUE_SHARE[name]]))
    for name, share in FLAW_SHARE.items():
        settle(name, torch.tensor([[1 - share, share]]))
    return replace(scenes, **values)
