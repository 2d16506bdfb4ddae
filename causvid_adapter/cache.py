"""Keys and values of the frames that a chunk may look back on.

A chunk that is still being denoised is scratch: its keys are staged, overwritten by the next step, and become history
only through :meth:`KVCache.commit`, after the clean pass. The window and sink policy lives here and nowhere else.
"""

# L layers, B batch, S tokens, H heads, D head dim; "history" = committed frames

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from causvid_adapter.errors import ShapeError

RopeMode = Literal["absolute", "window"]


def check_window(window_frames: int | None, sink_frames: int, chunk_frames: int = 1) -> None:
    """Refuse a window that cannot hold its sink and a chunk.

    Raises:
        ShapeError: it cannot; the message names the smallest that can.
    """
    if window_frames is None:
        return
    if not 0 <= sink_frames < window_frames:
        raise ShapeError(f"sink_frames must be from 0 to window_frames - 1 = {window_frames - 1}, got {sink_frames}")
    if sink_frames + chunk_frames > window_frames:
        raise ShapeError(
            f"a window of {window_frames} latent frames with a sink of {sink_frames} has no room for a chunk of "
            f"{chunk_frames}; use window_frames >= {sink_frames + chunk_frames}"
        )


def capacity_frames(wanted: int, held: int, window_frames: int | None, num_frames: int | None) -> int:
    """Latent frames that the buffers are made for when ``wanted`` do not fit into the ``held`` ones."""
    limits = [limit for limit in (window_frames, num_frames) if limit is not None]
    if limits and min(limits) >= wanted:
        return min(limits)
    if window_frames is not None:
        return window_frames
    # Doubling keeps the copies of an unlimited rollout linear in its length.
    return max(wanted, 2 * held)


class KVCache:
    """History of one rollout of one batch, layer by layer.

    Args:
        num_layers: transformer layers that read and write it.
        tokens_per_frame: tokens of one latent frame.
        window_frames: latent frames that attention spans, the current chunk included; None keeps all.
        sink_frames: first latent frames that never leave the window.
        rope: "absolute" stores keys already rotated by their frame in the video (CausVid, Self-Forcing); "window"
            stores them unrotated and counts positions inside the window, so that a long rollout never leaves the
            positions that the model was trained on.
        num_frames: latent frames of the whole video, where that is known: no more room than these need is taken.
            A video may still become longer.
    """

    def __init__(
        self,
        num_layers: int,
        tokens_per_frame: int,
        window_frames: int | None = None,
        sink_frames: int = 0,
        rope: RopeMode = "absolute",
        num_frames: int | None = None,
    ) -> None:
        check_window(window_frames, sink_frames)
        self.num_layers = num_layers
        self.tokens_per_frame = tokens_per_frame
        self.window_frames = window_frames
        self.sink_frames = sink_frames
        self.rope = rope
        self.num_frames = num_frames
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next chunk is the first of a new video, of any batch size."""
        self.frames_held = 0
        self.next_frame = 0
        self._keys: list[Tensor | None] = [None] * self.num_layers
        self._values: list[Tensor | None] = [None] * self.num_layers
        self._chunk_frames = 0
        self._staged_layers: set[int] = set()

    def begin(self, chunk_frames: int) -> None:
        """Make room for a chunk of ``chunk_frames``; what falls out of the window is dropped here."""
        check_window(self.window_frames, self.sink_frames, chunk_frames)
        self._chunk_frames = chunk_frames
        self._staged_layers.clear()
        if self.window_frames is None:
            return
        evicted = self.frames_held + chunk_frames - self.window_frames
        if evicted <= 0:
            return
        kept = self.frames_held - evicted
        start, end = self.sink_frames * self.tokens_per_frame, kept * self.tokens_per_frame
        shift = evicted * self.tokens_per_frame
        for buffer in (*self._keys, *self._values):
            if buffer is not None:
                buffer[:, start:end] = buffer[:, start + shift : end + shift].clone()
        self.frames_held = kept

    def seek(self, frame: int) -> None:
        """Place the next chunk at this latent frame of the video (absolute positions only; the default is to go on)."""
        self.next_frame = frame

    @property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Frame positions of (the current chunk, every key it attends to) for the rotary embedding."""
        if self.rope == "absolute":
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
        self.frames_held += self._chunk_frames
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
        frames = capacity_frames(-(-total // self.tokens_per_frame), held, self.window_frames, self.num_frames)
        capacity = frames * self.tokens_per_frame
        grown = new.new_empty(batch, capacity, heads, dim)
        if buffer is not None:
            grown[:, : buffer.shape[1]] = buffer
        return grown
