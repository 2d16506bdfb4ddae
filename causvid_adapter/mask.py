"""The block-causal mask: a chunk sees itself whole, and of the chunks before it what the cache would hold."""

# T latent frames, S tokens

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from causvid_adapter.cache import check_window
from causvid_adapter.errors import ShapeError

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query index, key index) -> may attend; the form that ``torch.nn.attention.flex_attention`` takes."""


def block_causal_mask_mod(
    tokens_per_frame: int, frames_per_chunk: int, window_frames: int | None = None, sink_frames: int = 0
) -> MaskMod:
    """Rule of one whole-sequence pass that equals the cached chunk loop.

    With a window, a chunk that ends at frame ``e`` sees the first ``sink_frames`` frames and the last
    ``window_frames - sink_frames`` frames up to ``e``, as :class:`~causvid_adapter.KVCache` keeps them.

    Raises:
        ShapeError: the window has no room for its sink and a chunk.
    """
    check_window(window_frames, sink_frames, frames_per_chunk)

    def may_attend(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_frame, key_frame = query // tokens_per_frame, key // tokens_per_frame
        chunk_end = (query_frame // frames_per_chunk + 1) * frames_per_chunk
        visible = key_frame < chunk_end
        if window_frames is not None:
            recent = key_frame >= chunk_end - (window_frames - sink_frames)
            visible = visible & (recent | (key_frame < sink_frames))
        return visible

    return may_attend


def block_causal_mask(
    num_frames: int,
    tokens_per_frame: int,
    frames_per_chunk: int,
    window_frames: int | None = None,
    sink_frames: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The same rule as a dense boolean mask (S, S); True where a query (row) may look at a key (column).

    Raises:
        ShapeError: ``num_frames`` is not whole chunks, or the window has no room for its sink and a chunk.
    """
    if num_frames % frames_per_chunk:
        raise ShapeError(f"num_frames must be a multiple of frames_per_chunk = {frames_per_chunk}, got {num_frames}")
    index = torch.arange(num_frames * tokens_per_frame, device=device)
    none = torch.zeros((), dtype=torch.long, device=device)
    rule = block_causal_mask_mod(tokens_per_frame, frames_per_chunk, window_frames, sink_frames)
    return rule(none, none, index[:, None], index[None, :])
