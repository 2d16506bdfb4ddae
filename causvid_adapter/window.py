"""What a chunk may look back on: the one rule that cache, mask, sampler, memory plan and FLOP count ask.

Imported without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from causvid_adapter.errors import ShapeError

RopeMode = Literal["absolute", "window"]
_FOREVER = 1 << 62

OnChange = Literal["keep", "recache", "regenerate"]
"""What becomes of the window when a chunk is to show something new.

"keep": its keys stay as they are. "recache": its clean latents are run again at t = 0, so that its keys belong to the
new prompt (the "KV recache" of LongLive, arXiv 2509.22622); they still show what they showed. "regenerate": its latents
are generated again under the new prompt, each chunk from its own noise; nobody sees them, but the chunk follows them.
"""
_OLDER_CHOICES = {"recompute": "recache", "remake": "regenerate"}


def read_on_change(value: str) -> OnChange:
    """The choice of that name, or of the name that nasa-video 0.1 had for it.

    Raises:
        ValueError: there is no such choice.
    """
    name = _OLDER_CHOICES.get(value, value)
    if name not in get_args(OnChange):
        raise ValueError(f"on_change must be one of {', '.join(get_args(OnChange))}, got {value!r}")
    return cast(OnChange, name)


@dataclass(frozen=True)
class Window:
    """A window over the latent frames of a video.

    Attributes:
        frames: latent frames that attention spans, the current chunk included; None keeps all.
        sink: first latent frames that never leave the window.
        rope: "absolute" counts positions in the video (CausVid, Self-Forcing); "window" counts them inside the window,
            so that a long rollout never leaves the positions that the model was trained on.

    Raises:
        ShapeError: the sink leaves no room.
    """

    frames: int | None = None
    sink: int = 0
    rope: RopeMode = "absolute"

    def __post_init__(self) -> None:
        if self.frames is not None and not 0 <= self.sink < self.frames:
            raise ShapeError(
                f"the sink of a window of {self.frames} latent frames must be from 0 to {self.frames - 1}, got "
                f"{self.sink}"
            )

    def seen(self, end: int) -> tuple[range, ...]:
        """The frames that a chunk that ends before frame ``end`` attends to, itself included: the rule."""
        if self.frames is None or end <= self.frames:
            return (range(end),)
        return range(self.sink), range(end - (self.frames - self.sink), end)

    def check(self, chunk_frames: int) -> None:
        """Refuse chunks that it has no room for beside its sink.

        Raises:
            ShapeError: it has none; the message names the smallest window that has.
        """
        if self.frames is not None and self.sink + chunk_frames > self.frames:
            raise ShapeError(
                f"a window of {self.frames} latent frames with a sink of {self.sink} has no room for a chunk of "
                f"{chunk_frames}; use a window of at least {self.sink + chunk_frames}"
            )

    def count(self, end: int) -> int:
        """How many frames a chunk that ends before frame ``end`` attends to."""
        return sum(map(len, self.seen(end)))

    def capacity(self, wanted: int, held: int = 0, num_frames: int | None = None) -> int:
        """Latent frames that a cache makes room for when ``wanted`` do not fit into the ``held`` ones.

        ``num_frames``: of the whole video, where that is known; it may still become longer.
        """
        if num_frames is not None and (room := self.count(num_frames)) >= wanted:
            return room
        if self.frames is not None:
            return self.count(_FOREVER)
        # Doubling keeps the copies of an unlimited rollout linear in its length.
        return max(wanted, 2 * held)


UNLIMITED = Window()
