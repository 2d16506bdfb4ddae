"""The block-causal mask: a chunk sees itself whole, and of the chunks before it what the cache would hold."""

# T latent frames, S tokens

from __future__ import annotations

import torch
from torch import Tensor

from causvid_adapter.errors import ShapeError
from causvid_adapter.window import UNLIMITED, Window


def block_causal_mask(
    num_frames: int,
    tokens_per_frame: int,
    frames_per_chunk: int,
    window: Window = UNLIMITED,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The mask (S, S) of one whole-sequence pass that equals the cached chunk loop.

    True where a query (row) may look at a key (column): what :meth:`~causvid_adapter.window.Window.seen` says for the
    end of the query's chunk.

    Raises:
        ShapeError: ``num_frames`` is not whole chunks, or the window has no room for its sink and a chunk.
    """
    if num_frames % frames_per_chunk:
        raise ShapeError(f"num_frames must be a multiple of frames_per_chunk = {frames_per_chunk}, got {num_frames}")
    window.check(frames_per_chunk)
    by_frame = torch.zeros(num_frames, num_frames, dtype=torch.bool)
    for start in range(0, num_frames, frames_per_chunk):
        for seen in window.seen(start + frames_per_chunk):
            by_frame[start : start + frames_per_chunk, list(seen)] = True
    tokens = by_frame.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)
    return tokens.to(device)
