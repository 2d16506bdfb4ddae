"""Says what a clip shows: a small convolutional network, trained on rendered clips and independent of the generator.

Shape legend: B batch, F frames, T groups of four frames, C channels, H height, W width.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import torch
import torch.nn.functional as nn_f
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nasa_video.sprites.world import ATTRIBUTES, COLOURS, FLAWS, SHAPES

GROUP = 4
"""Frames that the first convolution reads together, as channels; what flickers repeats with this period."""
UNSURE_BELOW = 0.4
NONE, UNSURE, BETWEEN = "none", "unsure", "+"

SEVERAL = {"colour": COLOURS, "shape": SHAPES}
CHOICES = {
    "count": (*ATTRIBUTES["count"], NONE),
    "size": ATTRIBUTES["size"],
    "texture": ATTRIBUTES["texture"],
    "motion": ATTRIBUTES["motion"],
    "background": ATTRIBUTES["background"],
    "weather": ATTRIBUTES["weather"],
}
HEADS = {name: len(values) for name, values in (SEVERAL | CHOICES).items()} | {"flaws": len(FLAWS)}
"""Answers of a detector by attribute."""
OF_A_SPRITE = ("colour", "shape", "size", "texture", "motion")


class DetectorNetwork(nn.Module):
    """Clips (B, F, 3, H, W) in [-1, 1] → logits by attribute; F is at least 5."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.first = nn.Conv2d(3 * GROUP, 24, 5, 2, 2)
        self.down = nn.ModuleList((nn.Conv2d(24, 48, 3, 2, 1), nn.Conv2d(48, width, 3, 2, 1)))
        self.spatial = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in range(2))
        self.temporal = nn.ModuleList(nn.Conv1d(width, width, 3, 1, 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(3))
        self.heads = nn.ModuleDict({name: nn.Linear(3 * width, size) for name, size in HEADS.items()})

    def forward(self, frames: Tensor) -> dict[str, Tensor]:
        groups = (frames.shape[1] - 1) // GROUP
        batch = frames.shape[0]
        stacked = frames[:, 1 : 1 + groups * GROUP].unflatten(1, (groups, GROUP)).flatten(2, 3).flatten(0, 1)
        x = nn_f.silu(self.first(stacked.contiguous(memory_format=torch.channels_last)))
        for layer in self.down:
            x = nn_f.silu(layer(x))
        x = self.norms[0](x)
        for spatial, temporal, norm in zip(self.spatial, self.temporal, list(self.norms)[1:], strict=True):
            x = x + nn_f.silu(spatial(x))
            x = x + over_time(temporal, x, batch)
            x = norm(x)
        volume = x.unflatten(0, (batch, groups))
        pooled = torch.cat((volume.mean((1, 3, 4)), volume.amax((1, 3, 4)), volume.mean((3, 4)).amax(1)), 1)
        return {name: head(pooled) for name, head in self.heads.items()}


def over_time(layer: nn.Module, x: Tensor, batch: int) -> Tensor:
    """A convolution over the T groups of (B * T, C, H, W), pixel by pixel."""
    volume = x.unflatten(0, (batch, -1))
    lines = volume.permute(0, 3, 4, 2, 1).flatten(0, 2)
    mixed: Tensor = nn_f.silu(layer(lines))
    shape = (batch, volume.shape[3], volume.shape[4], *mixed.shape[1:])
    return mixed.view(shape).permute(0, 4, 3, 1, 2).flatten(0, 1)


class Detector:
    """A trained network with names for its answers."""

    def __init__(self, network: DetectorNetwork) -> None:
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path | None = None) -> Detector:
        """From a safetensors file; the shipped one by default."""
        if path is None:
            with as_file(files("nasa_video.sprites") / "weights" / "detector.safetensors") as shipped:
                return cls.load(shipped)
        network = DetectorNetwork()
        network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return cls(network)

    def save(self, path: Path) -> None:
        """Writes float16 weights."""
        save_file({n: v.half().contiguous() for n, v in self.network.state_dict().items()}, path)

    @torch.no_grad()
    def detect(self, frames: Tensor, batch: int = 64) -> dict[str, list[str]]:
        """Labels by attribute, a list of B strings each.

        Args:
            frames: (B, F, 3, 64, 64) in [-1, 1], F at least 5.
            batch: clips looked at together.

        A flaw's label is "no" or its name. Two objects have labels such as "red+blue". "none" stands where there is no
        sprite (or no weather), "unsure" where no answer reaches a probability of 0.4.
        """
        labels: dict[str, list[str]] = {name: [] for name in ATTRIBUTES}
        device = next(self.network.parameters()).device
        for part in frames.split(batch):
            logits = self.network(part.to(device).float())
            for name, column in read_labels(logits).items():
                labels[name] += column
        return labels


def shows(label: str, value: str) -> bool:
    """Whether a label contains a value ("red+blue" shows "red")."""
    return value in label.split(BETWEEN)


def read_labels(logits: dict[str, Tensor]) -> dict[str, list[str]]:
    """Labels by attribute, a list of B strings each, from a detector's logits."""
    columns: dict[str, list[str]] = {}
    for name, values in CHOICES.items():
        best, index = logits[name].softmax(-1).max(-1)
        columns[name] = [
            values[i] if p >= UNSURE_BELOW else UNSURE for p, i in zip(best.tolist(), index.tolist(), strict=True)
        ]
    for name, values in SEVERAL.items():
        columns[name] = [
            _several(row, values, count)
            for row, count in zip(logits[name].sigmoid().tolist(), columns["count"], strict=True)
        ]
    for name in OF_A_SPRITE:
        columns[name] = [
            NONE if count == NONE else label for label, count in zip(columns[name], columns["count"], strict=True)
        ]
    for i, flaw in enumerate(FLAWS):
        columns[flaw] = [flaw if p > 0 else "no" for p in logits["flaws"][:, i].tolist()]
    return columns


def _several(probabilities: list[float], values: tuple[str, ...], count: str) -> str:
    """The one or two likeliest values, in the order of `values`."""
    number = 2 if count == "two" else 1
    ranked = sorted(range(len(values)), key=lambda i: -probabilities[i])[:number]
    kept = [values[i] for i in sorted(ranked) if probabilities[i] >= UNSURE_BELOW]
    return BETWEEN.join(kept) if kept else UNSURE
