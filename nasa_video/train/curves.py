"""What a run leaves to look at: curves in a JSON-lines file, a PNG and TensorBoard, and contact sheets."""

# B batch, F frames, H height, W width

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nasa_video.files.frames import frames_from_tensor
from nasa_video.files.images import read_image
from nasa_video.files.sheets import contact_sheet


class Curves:
    """Values by step; a resumed run goes on where its checkpoint was.

    Args:
        folder: gets ``NAME.jsonl``, ``NAME.png`` and ``tensorboard/``.
        start: steps done; what was written of later ones, by a run that was killed, is dropped.
        draw_every: steps between two drawings of the PNG.
    """

    def __init__(self, folder: Path, start: int, draw_every: int, name: str = "curves") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.draw_every = draw_every
        self.path = folder / f"{name}.jsonl"
        self._began = time.monotonic()
        if self.path.exists():
            kept = [line for line in self._lines() if line["step"] <= start]
            self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._board = _board(folder / "tensorboard" / ("" if name == "curves" else name), start)

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

    def show_sheet(self, path: Path, step: int) -> None:
        """Show a contact sheet in TensorBoard too."""
        if self._board is not None:
            self._board.add_image("samples", read_image(path), step, dataformats="HWC")

    def draw(self) -> None:
        """Draw every value over the steps."""
        from matplotlib.figure import Figure

        lines = self._lines()
        names = list(dict.fromkeys(name for line in lines for name in line if name not in ("step", "seconds")))
        if not names:
            return
        figure = Figure(figsize=(9, 2.2 * len(names)), layout="constrained")
        for axes, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot([p[0] for p in points], [p[1] for p in points], linewidth=1)
            axes.set(ylabel=name)
            axes.grid(alpha=0.3)
        axes.set(xlabel="iteration")
        figure.savefig(self.path.with_suffix(".png"), dpi=90)

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


def save_sheet(clips: Tensor, labels: Sequence[str], path: Path) -> None:
    """Write clips (B, F, 3, H, W) in [-1, 1] as a contact sheet, each under its label; NaN becomes grey."""
    rows = [(label, frames_from_tensor(clip.nan_to_num())) for label, clip in zip(labels, clips, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows, min(6, clips.shape[1])).save(path)
