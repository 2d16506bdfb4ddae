"""What a training run leaves to look at: loss curves and contact sheets.

Shape legend: B batch, F frames, H height, W width.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

Report = Callable[[int, int, dict[str, float]], None]
"""Called with (step, steps in all, values) for a progress display."""


def contact_sheet(
    clips: Tensor, path: Path, frames: Sequence[int] = (0, 6, 12, 18, 24, 32), columns: int = 2, zoom: int = 2
) -> None:
    """Writes clips (B, F, 3, H, W) in [-1, 1] as a PNG: a row of chosen frames each, clips in `columns`."""
    chosen = [f for f in frames if f < clips.shape[1]]
    pictures = ((clips[:, chosen].float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    rows = [torch.cat(list(clip), dim=-1) for clip in pictures]
    if len(rows) % columns:
        rows += [torch.zeros_like(rows[0])] * (columns - len(rows) % columns)
    height = len(rows) // columns
    sheet = torch.cat([torch.cat(rows[c * height : (c + 1) * height], dim=-2) for c in range(columns)], dim=-1)
    image = Image.fromarray(sheet.permute(1, 2, 0).contiguous().numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)


class Journal:
    """Values by step, appended to a JSON-lines file and drawn as a curve every `draw_every` seconds."""

    def __init__(self, folder: Path, name: str, report: Report | None = None, draw_every: float = 60) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name, self.report, self.draw_every = folder, name, report, draw_every
        self.path = folder / f"{name}.jsonl"
        self.started = self.drawn = time.monotonic()

    def record(self, step: int, steps: int, values: dict[str, float]) -> None:
        """Notes the values of one step."""
        line = {"step": step, "seconds": round(time.monotonic() - self.started, 2), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.report is not None:
            self.report(step, steps, values)
        if time.monotonic() - self.drawn >= self.draw_every or step == steps:
            self.draw()
            self.drawn = time.monotonic()

    def draw(self) -> None:
        """Draws every value over the steps into `<name>.png`."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        names = [n for n in lines[-1] if n not in ("step", "seconds")] if lines else []
        figure = Figure(figsize=(8, 4.5))
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot([p[0] for p in points], [p[1] for p in points], label=name, linewidth=1)
        axes.set_xlabel("iteration")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if names:
            axes.legend()
        figure.savefig(self.folder / f"{self.name}.png", dpi=90)
