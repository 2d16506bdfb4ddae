from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from causvid_adapter import KVCache, ShapeError, block_causal_mask

TOKENS = 2


def frames_seen_through_a_cache(frames: int, chunk: int, window: int | None, sink: int) -> Tensor:
    """(T, T): which frames a chunk's keys come from, read off a cache whose keys carry their frame's number."""
    seen = torch.zeros(frames, frames, dtype=torch.bool)
    cache = KVCache(1, TOKENS, window, sink)
    for start in range(0, frames, chunk):
        numbers = torch.arange(start, start + chunk).repeat_interleave(TOKENS).float()[None, :, None, None]
        for _ in range(2):  # a denoising step and the clean pass
            cache.begin(chunk)
            keys, _ = cache.extend(0, numbers, numbers)
        cache.commit()
        seen[start : start + chunk, keys.flatten().long()] = True
    return seen


@given(
    chunks=st.integers(1, 6),
    chunk=st.integers(1, 4),
    sink=st.integers(0, 5),
    room=st.integers(0, 9),
    limited=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_mask_shows_what_the_cache_holds(chunks: int, chunk: int, sink: int, room: int, limited: bool) -> None:
    window = sink + chunk + room if limited else None
    mask = block_causal_mask(chunks * chunk, TOKENS, chunk, window, sink)
    frames = mask[::TOKENS, ::TOKENS]
    assert torch.equal(mask, frames.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1))
    assert torch.equal(frames, frames_seen_through_a_cache(chunks * chunk, chunk, window, sink))


def test_a_chunk_sees_itself_whole_and_nothing_later() -> None:
    mask = block_causal_mask(4, 1, 2)
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_the_window_drops_the_oldest_but_the_sink() -> None:
    mask = block_causal_mask(5, 1, 1, window_frames=3, sink_frames=1)
    assert mask[4].int().tolist() == [1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("frames", "chunk", "window", "sink"), [(7, 3, None, 0), (6, 3, 2, 0), (6, 3, 4, 2), (6, 3, 6, 6), (6, 3, 6, -1)]
)
def test_sizes_that_a_cache_would_not_take_are_refused(frames: int, chunk: int, window: int | None, sink: int) -> None:
    with pytest.raises(ShapeError):
        block_causal_mask(frames, TOKENS, chunk, window, sink)
