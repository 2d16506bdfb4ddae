from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from causvid_adapter import (
    ChunkSampler,
    FlowMatchSchedule,
    KVCache,
    ShapeError,
    StaticKVCache,
    Window,
    block_causal_mask,
)
from nasa_video.bench.flops import ChunkLoop
from nasa_video.models.memory_estimate import cache_frames

TOKENS = 2


def frames_seen_through_a_cache(frames: int, chunk: int, window: int | None, sink: int) -> Tensor:
    """(T, T): which frames a chunk's keys come from, read off a cache whose keys carry their frame's number."""
    seen = torch.zeros(frames, frames, dtype=torch.bool)
    cache = KVCache(1, TOKENS, Window(window, sink))
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
    mask = block_causal_mask(chunks * chunk, TOKENS, chunk, Window(window, sink))
    frames = mask[::TOKENS, ::TOKENS]
    assert torch.equal(mask, frames.repeat_interleave(TOKENS, 0).repeat_interleave(TOKENS, 1))
    assert torch.equal(frames, frames_seen_through_a_cache(chunks * chunk, chunk, window, sink))


def test_a_chunk_sees_itself_whole_and_nothing_later() -> None:
    mask = block_causal_mask(4, 1, 2)
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_the_window_drops_the_oldest_but_the_sink() -> None:
    mask = block_causal_mask(5, 1, 1, window=Window(3, 1))
    assert mask[4].int().tolist() == [1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("frames", "chunk", "window", "sink"), [(7, 3, None, 0), (6, 3, 2, 0), (6, 3, 4, 2), (6, 3, 6, 6), (6, 3, 6, -1)]
)
def test_sizes_that_a_cache_would_not_take_are_refused(frames: int, chunk: int, window: int | None, sink: int) -> None:
    with pytest.raises(ShapeError):
        block_causal_mask(frames, TOKENS, chunk, Window(window, sink))


class EveryOther(Window):
    """Another rule: of the past, every second frame."""

    def seen(self, end: int) -> tuple[range, ...]:
        return range(0, max(0, end - 2), 2), range(max(0, end - 2), end)


def test_another_rule_of_the_window_is_one_function() -> None:
    """Mask, cache, static cache, sampler, memory plan and FLOPs follow it, and nothing else has to change."""
    window = EveryOther(4)
    mask = block_causal_mask(8, 1, 2, window)
    assert mask[7].nonzero().flatten().tolist() == [0, 2, 4, 6, 7]
    for cache in (KVCache(1, TOKENS, window, num_frames=8), StaticKVCache(1, TOKENS, window, num_frames=8)):
        for start in range(0, 8, 2):
            if isinstance(cache, StaticKVCache):
                cache.allocate(1, 1, 1, torch.float32, torch.device("cpu"))
            cache.begin(2)
            numbers = torch.arange(start * TOKENS, (start + 2) * TOKENS, dtype=torch.float32).reshape(1, -1, 1, 1)
            cache.extend(0, numbers, numbers)
            cache.commit()
        cache.begin(0)
        held = cache.history(0)[0].flatten()[::TOKENS] / TOKENS
        assert held.tolist() == [0, 2, 4, 6, 7] == [*cache.held]
    assert ChunkLoop(TOKENS, 2, 4, window).keys_seen(3) == 5 * TOKENS
    assert cache_frames(8, 2, window) == 5
    assert ChunkSampler(None, FlowMatchSchedule(8, [1000]), 2, window).window.count(8) == 5  # type: ignore[arg-type]
