"""A finished video: its frames, and the recipe that makes them again."""

# F frames, H W height and width in pixels

from __future__ import annotations

import base64
import dataclasses
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nasa_video.files.sinks import open_sink

if TYPE_CHECKING:
    from nasa_video.guidance.state import Effect
    from nasa_video.video.request import VideoRequest


@dataclass(frozen=True, eq=False)
class Video:
    """What ``pipe("a ball", negative="blurry")`` returns; a notebook shows it.

    Attributes:
        frames: (F, H, W, 3) uint8 RGB.
        fps: frames a second.
        request: the recipe; None where latents or states made it, which no recipe holds.
        effect: what guidance did; None where nothing was guided.
        upscale: how much larger files are written.
    """

    frames: np.ndarray[Any, np.dtype[np.uint8]] = field(repr=False)
    fps: float
    request: VideoRequest | None = None
    effect: Effect | None = None
    upscale: int = 1

    def __len__(self) -> int:
        return len(self.frames)

    def save(self, path: str | Path) -> Path | None:
        """Write .mp4, .webm, .gif or a folder ``DIR/`` of PNG files, as ``nasa-video generate -o`` does.

        The file carries the recipe: ``nasa-video generate --from FILE`` makes it again.

        Returns:
            Where it is; None for ``-``, which is standard output.

        Raises:
            OutputError: it cannot be written.
        """
        metadata = {} if self.request is None else self.request.to_metadata()
        if self.effect is not None:
            metadata["effect"] = dataclasses.asdict(self.effect)
        with open_sink(path, self.fps, metadata, scale=self.upscale) as sink:
            sink.write(self.frames)
        return sink.finish()

    def _repr_html_(self) -> str:
        width = min(self.frames.shape[2] * self.upscale, 640)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "video.mp4")
            self.save(path)
            data = base64.b64encode(path.read_bytes()).decode()
        source = f"data:video/mp4;base64,{data}"
        return f'<video controls loop autoplay muted playsinline width="{width}" src="{source}"></video>'
