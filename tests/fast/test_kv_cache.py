from __future__ import annotations

import pytest
import torch
from torch import Tensor

from causvid_adapter import ChunkSampler, FlowMatchSchedule, KVCache, ShapeError
from causvid_adapter.window import RopeMode, Window

TOKENS = 2


def numbered(frames: range, batch: int = 1) -> Tensor:
    """Keys (B, S, 1, 1) that carry their frame's number."""
    return torch.tensor(frames).repeat_interleave(TOKENS).float().reshape(1, -1, 1, 1).repeat(batch, 1, 1, 1)


def run(cache: KVCache, frames: range, commit: bool = True) -> list[int]:
    """Pass a chunk through the cache; the frames of all keys that it saw."""
    cache.begin(len(frames))
    for layer in range(cache.num_layers):
        keys, values = cache.extend(layer, numbered(frames), -numbered(frames))
        assert torch.equal(keys, -values)
    if commit:
        cache.commit()
    return [int(number) for number in keys[0, ::TOKENS, 0, 0]]


def held(cache: KVCache) -> list[int]:
    return [int(number) for number in cache.history(0)[0][0, ::TOKENS, 0, 0]]


def test_a_staged_chunk_is_no_history() -> None:
    cache = KVCache(2, TOKENS)
    run(cache, range(3))
    for attempt in (range(30, 33), range(40, 43)):
        assert run(cache, attempt, commit=False) == [0, 1, 2, *attempt]
        assert held(cache) == [0, 1, 2]
    assert run(cache, range(3, 6)) == [0, 1, 2, 3, 4, 5]
    assert held(cache) == [0, 1, 2, 3, 4, 5]


def test_the_window_fills_to_the_last_frame_before_anything_leaves() -> None:
    cache = KVCache(1, TOKENS, window=Window(6, 1))
    assert run(cache, range(3)) == [0, 1, 2]
    assert run(cache, range(3, 6)) == [0, 1, 2, 3, 4, 5]
    assert run(cache, range(6, 9)) == [0, 4, 5, 6, 7, 8]
    assert run(cache, range(9, 12)) == [0, 7, 8, 9, 10, 11]


def test_a_window_that_is_no_multiple_of_the_chunk_evicts_single_frames() -> None:
    cache = KVCache(1, TOKENS, window=Window(5))
    for frames in (range(3), range(3, 6)):
        seen = run(cache, frames)
    assert seen == [1, 2, 3, 4, 5]
    assert run(cache, range(6, 9)) == [4, 5, 6, 7, 8]


def test_eviction_happens_once_however_many_steps_a_chunk_takes() -> None:
    cache = KVCache(1, TOKENS, window=Window(6))
    run(cache, range(3))
    run(cache, range(3, 6))
    for _ in range(3):
        assert run(cache, range(6, 9), commit=False) == [3, 4, 5, 6, 7, 8]
    assert held(cache) == [3, 4, 5]


def test_a_window_as_large_as_sink_and_chunk_keeps_the_sink_alone() -> None:
    cache = KVCache(1, TOKENS, window=Window(4, 1))
    run(cache, range(3))
    assert run(cache, range(3, 6)) == [0, 3, 4, 5]


def test_memory_stays_constant_with_a_window() -> None:
    cache = KVCache(1, TOKENS, window=Window(6))
    sizes = set()
    for start in range(0, 60, 3):
        run(cache, range(start, start + 3))
        sizes.add(cache.num_bytes)
    assert sizes == {2 * 6 * TOKENS * 4}


def test_an_unlimited_cache_grows_and_forgets_nothing() -> None:
    cache = KVCache(1, TOKENS)
    for start in range(0, 30, 3):
        run(cache, range(start, start + 3))
    assert held(cache) == list(range(30))


@pytest.mark.parametrize(
    ("rope", "chunk", "everything"), [("absolute", [6, 7, 8], [6, 7, 8]), ("window", [3, 4, 5], [0, 1, 2, 3, 4, 5])]
)
def test_positions_count_in_the_video_or_in_the_window(rope: RopeMode, chunk: list[int], everything: list[int]) -> None:
    cache = KVCache(1, TOKENS, window=Window(6, rope=rope))
    run(cache, range(3))
    run(cache, range(3, 6))
    cache.begin(3)
    assert [positions.tolist() for positions in cache.positions] == [chunk, everything]


def test_seek_places_the_next_chunk() -> None:
    cache = KVCache(1, TOKENS)
    cache.seek(12)
    cache.begin(3)
    assert cache.positions[0].tolist() == [12, 13, 14]


def test_reset_takes_another_batch_and_starts_at_frame_zero() -> None:
    cache = KVCache(1, TOKENS)
    run(cache, range(3))
    cache.reset()
    cache.begin(3)
    keys, _ = cache.extend(0, numbered(range(3), batch=2), numbered(range(3), batch=2))
    assert keys.shape[0] == 2
    assert (cache.frames_held, cache.next_frame, cache.positions[0].tolist()) == (0, 0, [0, 1, 2])


@pytest.mark.parametrize("gradient", [False, True])
def test_another_batch_in_the_middle_is_refused(gradient: bool) -> None:
    cache = KVCache(1, TOKENS)
    run(cache, range(3))
    cache.begin(3)
    keys = numbered(range(3, 6), batch=2).requires_grad_(gradient)
    with pytest.raises(ShapeError, match="batch of 1, got a batch of 2"):
        cache.extend(0, keys, keys)
    assert held(cache) == [0, 1, 2]


def test_commit_without_a_whole_pass_is_refused() -> None:
    cache = KVCache(2, TOKENS)
    with pytest.raises(RuntimeError, match="0 of 2"):
        cache.commit()
    cache.begin(3)
    cache.extend(0, numbered(range(3)), numbered(range(3)))
    with pytest.raises(RuntimeError, match="1 of 2"):
        cache.commit()
    run(cache, range(3))
    with pytest.raises(RuntimeError, match="0 of 2"):
        cache.commit()


def test_history_of_an_empty_cache_is_refused() -> None:
    with pytest.raises(RuntimeError, match="empty"):
        KVCache(1, TOKENS).history(0)


@pytest.mark.parametrize(("window", "sink"), [(3, 3), (3, 4), (3, -1), (0, 0)])
def test_a_sink_that_leaves_no_room_is_refused(window: int, sink: int) -> None:
    with pytest.raises(ShapeError, match="must be from 0 to"):
        KVCache(1, TOKENS, Window(window, sink))


def test_a_chunk_larger_than_the_window_is_refused_with_the_smallest_that_fits() -> None:
    with pytest.raises(ShapeError, match="a window of at least 5"):
        KVCache(1, TOKENS, Window(4, 2)).begin(3)


def test_the_sampler_refuses_such_a_window_before_it_runs() -> None:
    with pytest.raises(ShapeError, match="a window of at least 5"):
        ChunkSampler(None, FlowMatchSchedule(8, [1000]), 3, window=Window(4, 2))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="frames_per_chunk"):
        ChunkSampler(None, FlowMatchSchedule(8, [1000]), 0)  # type: ignore[arg-type]


def test_keys_with_a_gradient_are_not_written() -> None:
    cache = KVCache(1, TOKENS)
    run(cache, range(3))
    before = cache._keys[0]
    assert before is not None
    before = before.clone()
    cache.begin(3)
    new = numbered(range(3, 6)).requires_grad_()
    keys, _ = cache.extend(0, new, new)
    keys.sum().backward()
    assert torch.equal(new.grad, torch.ones_like(new))  # type: ignore[arg-type]
    assert torch.equal(cache._keys[0], before)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="without a gradient"):
        cache.commit()


def test_what_autograd_may_save_is_no_view_of_the_buffers() -> None:
    cache = KVCache(1, TOKENS)
    query = torch.ones(1, TOKENS, 1, 1, requires_grad=True)
    cache.begin(1)
    keys, _ = cache.extend(0, numbered(range(1)) + 1, numbered(range(1)))
    loss = (query * keys).sum()
    cache.begin(1)
    cache.extend(0, numbered(range(1)) + 5, numbered(range(1)))
    loss.backward()
    assert torch.equal(query.grad, torch.ones_like(query))  # type: ignore[arg-type]
