"""What a run leaves to look at: curves in a JSON-lines file, a PNG and TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Curves:
    """Values by step; a resumed run goes on where its checkpoint was.

    Args:
        folder: gets ``curves.jsonl``, ``curves.png`` and ``tensorboard/``.
        start: steps done; what was written of later ones, by a run that was killed, is dropped.
    """

    def __init__(self, folder: Path, start: int, draw_every: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.draw_every = folder, draw_every
        self.path = folder / "curves.jsonl"
        self._began = time.monotonic()
        self._forget_after(start)
        self._board = _board(folder / "tensorboard", start)

    def _forget_after(self, start: int) -> None:
        if self.path.exists():
            kept = [line for line in self._lines() if line["step"] <= start]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue  # the line that a killed run was writing
        return lines

    def record(self, step: int, values: dict[str, float], last: bool = False) -> None:
        """Note the values of one step."""
        line = {"step": step, "seconds": round(time.monotonic() - self._began, 2), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if step % self.draw_every == 0 or last:
            self.draw()

    def picture(self, path: Path, step: int) -> None:
        """Show a contact sheet in TensorBoard too."""
        if self._board is None:
            return
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._board.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def draw(self) -> None:
        """Every value over the steps, in ``curves.png``."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        lines = self._lines()
        names = list(dict.fromkeys(name for line in lines for name in line if name not in ("step", "seconds")))
        if not names:
            return
        figure = Figure(figsize=(9, 2.2 * len(names)), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot([p[0] for p in points], [p[1] for p in points], linewidth=1)
            axes.set(ylabel=name)
            axes.grid(alpha=0.3)
        axes.set(xlabel="iteration")
        figure.savefig(self.folder / "curves.png", dpi=90)

    def close(self) -> None:
        """Write what TensorBoard still holds."""
        if self._board is not None:
            self._board.close()


def _board(folder: Path, start: int) -> Any:
    """TensorBoard's writer, where the package is installed: the other two curves do without."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1)
