"""Keys and values of the frames that a chunk may look back on.

A chunk that is still being denoised is scratch: its keys are staged, overwritten by the next step, and become history
only through :meth:`KVCache.commit`, after the clean pass. The window and sink policy lives here and nowhere else.
"""

# L layers, B batch, S tokens, H heads, D head dim; "history" = committed frames

from __future__ import annotations

import torch
from torch import Tensor

from causvid_adapter.errors import ShapeError
from causvid_adapter.window import UNLIMITED, Window


class KVCache:
    """History of one rollout of one batch, layer by layer.

    Args:
        num_layers: transformer layers that read and write it.
        tokens_per_frame: tokens of one latent frame.
        window: what a chunk may look back on. Where its positions are absolute, keys are stored already rotated by
            their frame in the video; where they count inside the window, unrotated.
        num_frames: latent frames of the whole video, where that is known: no more room than these need is taken.
            A video may still become longer.
    """

    def __init__(
        self,
        num_layers: int,
        tokens_per_frame: int,
        window: Window = UNLIMITED,
        num_frames: int | None = None,
    ) -> None:
        self.num_layers = num_layers
        self.tokens_per_frame = tokens_per_frame
        self.window = window
        self.num_frames = num_frames
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next chunk is the first of a new video, of any batch size."""
        self.held: list[int] = []
        self.next_frame = 0
        self._committed = 0
        self._keys: list[Tensor | None] = [None] * self.num_layers
        self._values: list[Tensor | None] = [None] * self.num_layers
        self._chunk_frames = 0
        self._staged_layers: set[int] = set()

    @property
    def frames_held(self) -> int:
        """Committed latent frames that are still there; ``held`` numbers them from the rollout's first."""
        return len(self.held)

    def begin(self, chunk_frames: int) -> None:
        """Make room for a chunk of ``chunk_frames``; what falls out of the window is dropped here."""
        self.window.check(chunk_frames)
        self._chunk_frames = chunk_frames
        self._staged_layers.clear()
        seen = self.window.seen(self._committed + chunk_frames)
        kept = [place for place, frame in enumerate(self.held) if any(frame in part for part in seen)]
        if len(kept) == len(self.held):
            return
        first = next((i for i, place in enumerate(kept) if place != i), len(kept))
        if first < len(kept):
            tokens = torch.arange(self.tokens_per_frame)
            moved = (torch.tensor(kept[first:])[:, None] * self.tokens_per_frame + tokens).flatten()
            start, end = first * self.tokens_per_frame, len(kept) * self.tokens_per_frame
            for buffer in (*self._keys, *self._values):
                if buffer is not None:
                    buffer[:, start:end] = buffer[:, moved.to(buffer.device)]
        self.held = [self.held[place] for place in kept]

    def seek(self, frame: int) -> None:
        """Place the next chunk at this latent frame of the video (absolute positions only; the default is to go on)."""
        self.next_frame = frame

    @property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Frame positions of (the current chunk, every key it attends to) for the rotary embedding."""
        if self.window.rope == "absolute":
            chunk = torch.arange(self.next_frame, self.next_frame + self._chunk_frames)
            return chunk, chunk
        everything = torch.arange(self.frames_held + self._chunk_frames)
        return everything[self.frames_held :], everything

    def extend(self, layer: int, k_BSHD: Tensor, v_BSHD: Tensor) -> tuple[Tensor, Tensor]:
        """History and the given chunk together, (B, S_history + S, H, D); the chunk is staged, not committed.

        Keys that carry a gradient are not written: the chunk is appended to a detached history, so no loss of a later
        chunk reaches an earlier one. While gradients are on the result is never a view of the buffers, so nothing that
        autograd saved is overwritten.

        Raises:
            ShapeError: the batch is not the history's.
        """
        held = self.frames_held * self.tokens_per_frame
        total = held + k_BSHD.shape[1]
        keys, values = self._keys[layer], self._values[layer]
        if keys is not None and keys.shape[0] != k_BSHD.shape[0]:
            raise ShapeError(
                f"the cache holds a batch of {keys.shape[0]}, got a batch of {k_BSHD.shape[0]}; reset() it or use a "
                "new cache"
            )
        if torch.is_grad_enabled() and (k_BSHD.requires_grad or v_BSHD.requires_grad):
            if keys is None or values is None or held == 0:
                return k_BSHD, v_BSHD
            return (
                torch.cat([keys[:, :held].detach(), k_BSHD], dim=1),
                torch.cat([values[:, :held].detach(), v_BSHD], dim=1),
            )
        keys = self._keys[layer] = self._with_room(keys, k_BSHD, total)
        values = self._values[layer] = self._with_room(values, v_BSHD, total)
        keys[:, held:total] = k_BSHD
        values[:, held:total] = v_BSHD
        self._staged_layers.add(layer)
        if torch.is_grad_enabled():
            return keys[:, :total].clone(), values[:, :total].clone()
        return keys[:, :total], values[:, :total]

    def commit(self) -> None:
        """Make the staged chunk history. Call it after the clean pass, once."""
        if len(self._staged_layers) != self.num_layers:
            raise RuntimeError(
                "nothing to commit: run the clean chunk through the model first, without a gradient "
                f"({len(self._staged_layers)} of {self.num_layers} layers are staged)"
            )
        self.held += range(self._committed, self._committed + self._chunk_frames)
        self._committed += self._chunk_frames
        self.next_frame += self._chunk_frames
        self._chunk_frames = 0
        self._staged_layers.clear()

    def history(self, layer: int) -> tuple[Tensor, Tensor]:
        """Committed keys and values of a layer, (B, S_history, H, D) each; views, not copies."""
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            raise RuntimeError("the cache is empty")
        held = self.frames_held * self.tokens_per_frame
        return keys[:, :held], values[:, :held]

    @property
    def num_bytes(self) -> int:
        """Bytes that the buffers take now."""
        return sum(b.numel() * b.element_size() for b in (*self._keys, *self._values) if b is not None)

    def _with_room(self, buffer: Tensor | None, new: Tensor, total: int) -> Tensor:
        batch, _, heads, dim = new.shape
        if buffer is not None and total <= buffer.shape[1]:
            return buffer
        held = 0 if buffer is None else buffer.shape[1] // self.tokens_per_frame
        frames = self.window.capacity(-(-total // self.tokens_per_frame), held, self.num_frames)
        capacity = frames * self.tokens_per_frame
        grown = new.new_empty(batch, capacity, heads, dim)
        if buffer is not None:
            grown[:, : buffer.shape[1]] = buffer
        return grown
