"""A cached chunk loop, a masked pass and a rollout are one and the same computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from causvid_adapter import (
    CausalWan,
    ChunkSampler,
    FlowMatchSchedule,
    KVCache,
    ModelCall,
    OnChange,
    SeededNoise,
    ShapeError,
)
from causvid_adapter.window import RopeMode, Window
from nasa_video.text import TextContext

Distance = Callable[[Tensor, Tensor], float]
NewContext = Callable[..., TextContext]
NewLatents = Callable[..., Tensor]

SHAPE = (4, 4, 6)
SIZE = SHAPE[1:]
SCHEDULE = FlowMatchSchedule(8, [1000, 757])


@pytest.fixture
def model(new_wan: Callable[..., WanTransformer3DModel]) -> CausalWan:
    return CausalWan(new_wan(num_layers=3))


@pytest.fixture
def embeds(new_context: NewContext) -> Tensor:
    return new_context([5]).embeds


def chunk_by_chunk(
    model: CausalWan, latents: Tensor, timesteps: Tensor, embeds: Tensor, cache: KVCache, chunk: int
) -> Iterator[Tensor]:
    for x, t in zip(latents.split(chunk, dim=1), timesteps.split(chunk, dim=1), strict=True):
        yield model(x, t, embeds, cache=cache)
        cache.commit()


def video(
    sampler: ChunkSampler,
    context: Tensor,
    frames: int,
    seeds: list[int] | None = None,
    prefix: Tensor | None = None,
    on_change: Callable[[int], OnChange] | None = None,
) -> Tensor:
    noise = SeededNoise(seeds or [7], SHAPE)
    chunks = sampler.stream(context, noise, num_frames=frames, prefix=prefix, on_change=on_change)
    return torch.cat(list(chunks), dim=1)


@pytest.mark.parametrize(
    ("chunk", "window", "sink"),
    [(3, None, 0), (1, None, 0), (2, None, 0), (3, 3, 0), (3, 6, 0), (3, 7, 1), (2, 5, 2), (1, 4, 3), (3, 12, 3)],
)
def test_cached_chunks_are_one_masked_pass(
    model: CausalWan, new_latents: NewLatents, new_context: NewContext, distance: Distance,
    chunk: int, window: int | None, sink: int,
) -> None:  # fmt: skip
    latents, embeds = new_latents(12, batch=2), new_context([5, 3]).embeds
    timesteps = torch.rand(2, 12 // chunk, generator=torch.Generator().manual_seed(0)).mul(1000)
    timesteps = timesteps.repeat_interleave(chunk, dim=1)
    cache = model.new_cache(*SIZE, window=Window(window, sink))
    cached = torch.cat(list(chunk_by_chunk(model, latents, timesteps, embeds, cache, chunk)), dim=1)
    masked = model(latents, timesteps, embeds, frames_per_chunk=chunk, window=Window(window, sink))
    assert distance(cached, masked) < 1e-5
    if window is not None and window < 12:
        unlimited = model(latents, timesteps, embeds, frames_per_chunk=chunk)
        assert distance(cached, unlimited) > 1e-3


def test_without_a_mask_the_model_is_diffusers_own(
    new_wan: Callable[..., WanTransformer3DModel], new_latents: NewLatents, embeds: Tensor, distance: Distance
) -> None:
    latents = new_latents(6)
    plain = new_wan()(latents.transpose(1, 2), torch.tensor([500.0]), embeds).sample.transpose(1, 2)
    model = CausalWan(new_wan())
    assert distance(model(latents, 500.0, embeds), plain) < 1e-5
    assert distance(model(latents, torch.full((1, 6), 500.0), embeds), plain) < 1e-5
    assert distance(model(latents, 500.0, embeds, frames_per_chunk=6), plain) < 1e-5
    assert distance(model(latents, 500.0, embeds, frames_per_chunk=3), plain) > 1e-3


def test_made_causal_twice_it_is_the_same_model(model: CausalWan, new_latents: NewLatents, embeds: Tensor) -> None:
    latents = new_latents(6)
    first = model(latents, 500.0, embeds, frames_per_chunk=3)
    again = CausalWan(model.transformer)
    assert torch.equal(again(latents, 500.0, embeds, frames_per_chunk=3), first)
    assert torch.equal(model(latents, 500.0, embeds, frames_per_chunk=3), first)


@pytest.mark.parametrize("rope", ["absolute", "window"])
def test_a_window_that_is_never_reached_is_no_window(model: CausalWan, embeds: Tensor, rope: RopeMode) -> None:
    unlimited = video(ChunkSampler(model, SCHEDULE, window=Window(rope=rope)), embeds, 9)
    assert torch.equal(video(ChunkSampler(model, SCHEDULE, window=Window(9, rope=rope)), embeds, 9), unlimited)
    shorter = video(ChunkSampler(model, SCHEDULE, window=Window(6, rope=rope)), embeds, 9)
    assert torch.equal(shorter[:, :6], unlimited[:, :6])
    assert not torch.equal(shorter, unlimited)


def test_positions_in_the_window_are_absolute_until_it_is_exceeded(
    model: CausalWan, embeds: Tensor, distance: Distance
) -> None:
    absolute, window = (
        video(ChunkSampler(model, SCHEDULE, window=Window(6, rope=rope)), embeds, 9)
        for rope in ("absolute", "window")  # type: ignore[misc]
    )
    assert distance(window[:, :6], absolute[:, :6]) < 1e-6


def test_positions_in_the_window_are_those_of_a_video_that_began_there(
    model: CausalWan, new_latents: NewLatents, embeds: Tensor, distance: Distance
) -> None:
    # One layer deep, keys know nothing of what their frames once saw, so a shift of the whole window changes nothing.
    model.transformer.blocks = model.transformer.blocks[:1]
    latents = new_latents(12)
    timesteps = torch.full((1, 12), 300.0)
    long, short = (model.new_cache(*SIZE, window=Window(6, rope="window")) for _ in range(2))
    expected = list(chunk_by_chunk(model, latents[:, 6:], timesteps[:, 6:], embeds, short, 3))[-1]
    actual = list(chunk_by_chunk(model, latents, timesteps, embeds, long, 3))[-1]
    assert distance(actual, expected) < 1e-5


def test_denoising_steps_never_change_history(model: CausalWan, new_latents: NewLatents, embeds: Tensor) -> None:
    cache = model.new_cache(*SIZE, window=Window(6, 1))
    for seed in range(3):
        model(new_latents(3, seed=seed), 0.0, embeds, cache=cache)
        cache.commit()
    x = new_latents(3, seed=9)
    first = model(x, 1000.0, embeds, cache=cache)
    before = [tuple(t.clone() for t in cache.history(layer)) for layer in range(model.num_layers)]
    for seed in (10, 11):
        model(new_latents(3, seed=seed), 500.0, embeds, cache=cache)
    for layer, (keys, values) in enumerate(before):
        assert torch.equal(cache.history(layer)[0], keys)
        assert torch.equal(cache.history(layer)[1], values)
    assert torch.equal(model(x, 1000.0, embeds, cache=cache), first)


def test_a_pass_that_fails_leaves_the_next_one_whole(model: CausalWan, new_latents: NewLatents, embeds: Tensor) -> None:
    latents = new_latents(3)
    expected = model(latents, 500.0, embeds)

    def interrupt(*given: object) -> None:
        raise KeyboardInterrupt

    hook = model.transformer.blocks[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(latents, 500.0, embeds, cache=model.new_cache(*SIZE))
    hook.remove()
    assert torch.equal(model(latents, 500.0, embeds), expected)


def test_a_batch_is_its_samples_one_by_one(model: CausalWan, new_context: NewContext, distance: Distance) -> None:
    sampler = ChunkSampler(model, SCHEDULE, window=Window(6, 1))
    context = new_context([5, 2])
    together = video(sampler, context.embeds, 9, seeds=[3, 4])
    for sample, seed in enumerate([3, 4]):
        alone = video(sampler, context.embeds[sample : sample + 1], 9, seeds=[seed])
        assert distance(together[sample : sample + 1], alone) < 1e-5


def test_a_seed_gives_the_same_frames_whatever_the_length(model: CausalWan, embeds: Tensor) -> None:
    sampler = ChunkSampler(model, SCHEDULE)
    long = video(sampler, embeds, 9)
    assert torch.equal(video(sampler, embeds, 3), long[:, :3])
    endless = sampler.stream(embeds, SeededNoise([7], SHAPE))
    assert torch.equal(torch.cat([next(endless), next(endless)], dim=1), long[:, :6])
    assert video(sampler, embeds, 3, seeds=[8]).ne(long[:, :3]).any()


def test_start_noise_from_a_tensor_is_that_of_its_source(model: CausalWan, embeds: Tensor) -> None:
    sampler = ChunkSampler(model, FlowMatchSchedule(8, [1000]))
    noise = SeededNoise([7], SHAPE)
    expected = video(sampler, embeds, 6)
    assert torch.equal(torch.cat(list(sampler.stream(embeds, noise(range(6), 0))), dim=1), expected)
    rest = sampler.stream(embeds, noise(range(3, 6), 0), prefix=expected[:, :3])
    assert torch.equal(torch.cat(list(rest), dim=1), expected[:, 3:])


@pytest.mark.parametrize(
    ("window", "sink", "rope"), [(None, 0, "absolute"), (6, 0, "absolute"), (7, 1, "absolute"), (6, 0, "window")]
)
def test_a_continued_video_is_the_uninterrupted_one(
    model: CausalWan, embeds: Tensor, window: int | None, sink: int, rope: RopeMode
) -> None:
    sampler = ChunkSampler(model, SCHEDULE, window=Window(window, sink, rope))
    whole = video(sampler, embeds, 12)
    assert torch.equal(video(sampler, embeds, 6, prefix=whole[:, :6]), whole[:, 6:])


def at(changed: int, change: OnChange) -> Callable[[int], OnChange]:
    """What the sampler asks before each chunk, for a change at one of them."""
    return lambda chunk: change if chunk == changed else "keep"


def test_recomputing_under_the_same_prompt_changes_nothing(
    model: CausalWan, embeds: Tensor, distance: Distance
) -> None:
    sampler = ChunkSampler(model, SCHEDULE)
    asked: list[int] = []

    def at_the_third(chunk: int) -> OnChange:
        asked.append(chunk)
        return "recache" if chunk == 2 else "keep"

    recomputed = video(sampler, embeds, 12, on_change=at_the_third)
    assert asked == [1, 2, 3]
    assert distance(recomputed, video(sampler, embeds, 12)) < 1e-5


def test_recomputing_under_a_new_prompt_is_a_history_that_had_it(
    model: CausalWan, new_context: NewContext, distance: Distance
) -> None:
    old, new = new_context([5]).embeds, new_context([4], seed=1).embeds
    sampler = ChunkSampler(model, SCHEDULE)
    noise = SeededNoise([7], SHAPE)

    def prompts(chunk: int) -> Tensor:
        return new if chunk == 2 else old

    switched = torch.cat(list(sampler.stream(prompts, noise, num_frames=9, on_change=at(2, "recache"))), dim=1)
    kept = torch.cat(list(sampler.stream(prompts, noise, num_frames=9)), dim=1)
    as_if_always_new = video(sampler, new, 3, prefix=switched[:, :6])
    assert distance(switched[:, 6:], as_if_always_new) < 1e-5
    assert distance(kept[:, 6:], as_if_always_new) > 1e-3


@pytest.mark.parametrize(("window", "sink"), [(6, 0), (8, 2), (9, 3), (10, 0), (7, 1)])
def test_recomputing_with_a_window_sees_the_same_frames(
    model: CausalWan, embeds: Tensor, window: int, sink: int
) -> None:
    # What is kept for a recomputation must cover the window, at the frames' own places.
    sampler = ChunkSampler(model, SCHEDULE, window=Window(window, sink))
    caches: list[KVCache] = []
    new_cache = model.new_cache
    model.new_cache = lambda *sizes: caches.append(new_cache(*sizes)) or caches[-1]  # type: ignore[method-assign, assignment, func-returns-value]
    keys: dict[str, Tensor] = {}
    for name, recompute in (("kept", None), ("recomputed", at(5, "recache"))):
        video(sampler, embeds, 18, on_change=recompute)
        keys[name] = caches[-1].history(0)[0].clone()
        assert caches[-1].next_frame == 15
    # The last chunk's history: keys of layer 0 depend on their own frame alone, up to where recomputed inputs differ.
    assert keys["recomputed"].shape == keys["kept"].shape
    assert torch.allclose(keys["recomputed"], keys["kept"], atol=1e-5)


@pytest.mark.parametrize("rope", ["absolute", "window"])
@pytest.mark.parametrize(("window", "sink"), [(None, 0), (9, 3), (12, 0)])
def test_a_remade_window_is_that_of_a_video_which_had_the_new_prompt(
    model: CausalWan, new_context: NewContext, window: int | None, sink: int, rope: RopeMode
) -> None:
    old, new = new_context([5]).embeds, new_context([4], seed=1).embeds
    sampler = ChunkSampler(model, SCHEDULE, window=Window(window, sink, rope))
    noise = SeededNoise([7], SHAPE)

    def prompts(chunk: int) -> Tensor:
        return new if chunk >= 2 else old

    calls: list[ModelCall] = []
    remade = sampler.stream(prompts, noise, num_frames=12, before_call=calls.append, on_change=at(2, "regenerate"))
    always_new = video(sampler, new, 12)
    assert torch.equal(torch.cat(list(remade)[2:], dim=1), always_new[:, 6:])
    assert [call.clean for call in calls if call.chunk == 2] == 2 * [False, False, True] + [False, False, True]


@pytest.mark.parametrize(
    ("window", "sink", "remade"), [(9, 3, [0, 4]), (6, 0, [4]), (12, 3, [0, 3, 4]), (10, 0, [2, 3, 4])]
)
def test_no_more_is_remade_than_the_chunk_looks_back_on(
    model: CausalWan, embeds: Tensor, window: int, sink: int, remade: list[int]
) -> None:
    asked: list[int] = []

    class Noise(SeededNoise):
        def __call__(self, frames: range, step: int) -> Tensor:
            if step == 0:
                asked.append(frames.start // 3)
            return super().__call__(frames, step)

    sampler = ChunkSampler(model, SCHEDULE, window=Window(window, sink))
    list(sampler.stream(embeds, Noise([7], SHAPE), num_frames=18, on_change=at(5, "regenerate")))
    assert asked == [0, 1, 2, 3, 4, *remade, 5]


@pytest.mark.parametrize("change", ["keep", "recache", "regenerate"])
@pytest.mark.parametrize(("window", "sink", "rope"), [(None, 0, "absolute"), (9, 3, "window")])
def test_an_interrupted_stream_goes_on_with_the_window_that_it_had(
    model: CausalWan, new_context: NewContext, window: int | None, sink: int, rope: RopeMode, change: OnChange
) -> None:
    old, new = new_context([5]).embeds, new_context([4], seed=1).embeds
    sampler = ChunkSampler(model, SCHEDULE, window=Window(window, sink, rope))

    def stream(frames: int, **options: Any) -> Tensor:
        noise = SeededNoise([7], SHAPE)
        prompts = lambda chunk: new if chunk >= 3 else old  # noqa: E731
        chunks = sampler.stream(prompts, noise, num_frames=frames, on_change=at(3, change), **options)
        return torch.cat(list(chunks), dim=1)

    given = video(sampler, new, 3)
    for start in ({}, {"prefix": given}):
        known = 3 if start else 0
        whole = stream(18 - known, **start)
        for made in (6, 12):  # Before the change, and after it.
            prefix = torch.cat([*start.values(), whole[:, :made]], dim=1)
            assert torch.equal(stream(18 - known - made, prefix=prefix, made_frames=made), whole[:, made:])


def test_a_prefix_is_not_remade(model: CausalWan, new_context: NewContext, distance: Distance) -> None:
    old, new = new_context([5]).embeds, new_context([4], seed=1).embeds
    sampler = ChunkSampler(model, SCHEDULE)
    noise = SeededNoise([7], SHAPE)
    prefix = video(sampler, old, 3)

    def prompts(chunk: int) -> Tensor:
        return new if chunk >= 2 else old

    def stream(**options: Any) -> Tensor:
        return torch.cat(list(sampler.stream(noise=noise, num_frames=6, prefix=prefix, **options)), dim=1)

    # The given chunk under the new prompt, the made one again: as if the prefix had been continued with it at once.
    remade = stream(context=prompts, on_change=at(2, "regenerate"))
    assert torch.equal(remade[:, 3:], stream(context=new)[:, 3:])


def test_calls_are_announced_in_order(model: CausalWan, embeds: Tensor) -> None:
    calls: list[ModelCall] = []
    first = FlowMatchSchedule(8, [1000])
    sampler = ChunkSampler(model, SCHEDULE, first_chunk_schedule=first)
    list(sampler.stream(embeds, SeededNoise([7], SHAPE), num_frames=6, before_call=calls.append))
    assert [(call.chunk, call.step, call.num_steps, call.clean) for call in calls] == [
        (0, 0, 1, False), (0, 2, 2, True), (1, 0, 2, False), (1, 1, 2, False)
    ]  # fmt: skip


def test_more_steps_where_the_caller_says_that_a_scene_opens(model: CausalWan, embeds: Tensor) -> None:
    few = FlowMatchSchedule(8, [1000])
    sampler = ChunkSampler(model, few, first_chunk_schedule=SCHEDULE)
    noise = SeededNoise([7], SHAPE)

    def steps(**options: Any) -> list[tuple[int, int]]:
        calls: list[ModelCall] = []
        list(sampler.stream(embeds, noise, num_frames=9, before_call=calls.append, **options))
        return [(call.chunk, call.step) for call in calls if not call.clean]

    assert steps() == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert steps(is_first_chunk=lambda chunk: chunk == 1) == [(0, 0), (1, 0), (1, 1), (2, 0)]
    remade = steps(is_first_chunk=lambda chunk: chunk == 2, on_change=at(2, "regenerate"))
    assert remade == [(0, 0), (1, 0), *3 * [(2, 0), (2, 1)]], "the window is made for the chunk that it opens with"
    prefix = video(sampler, embeds, 6)
    assert steps(prefix=prefix) == [(2, 0), (2, 1), (3, 0), (4, 0)], "the first behind what is given"
    assert steps(prefix=prefix, made_frames=3) == [(2, 0), (3, 0), (4, 0)], "which an earlier run had begun"


class Timesteps:
    """A denoiser that notes when it is called, and with how much history."""

    def __init__(self, model: CausalWan) -> None:
        self.model, self.calls = model, list[tuple[float, int]]()
        self.new_cache = model.new_cache

    def __call__(self, x: Tensor, t: float, context: Tensor | None, *, cache: KVCache) -> Tensor:
        self.calls.append((t, cache.frames_held))
        return self.model(x, t, context, cache=cache)


def test_a_chunk_with_nothing_before_it_has_steps_of_its_own(model: CausalWan, embeds: Tensor) -> None:
    alone = FlowMatchSchedule(8, [990, 600], euler_steps=1)
    noise = SeededNoise([7], SHAPE)

    def calls(**options: Any) -> list[tuple[float, int]]:
        recorder = Timesteps(model)
        sampler = ChunkSampler(recorder, FlowMatchSchedule(8, [1000, 757], without_history=alone))  # type: ignore[arg-type]
        list(sampler.stream(embeds, noise, num_frames=6, **options))
        return [(t, frames) for t, frames in recorder.calls if t]

    usual = [(1000.0, 3), (757.0, 3)]
    assert calls() == [(990.0, 0), (600.0, 0), *usual]
    prefix = video(ChunkSampler(model, SCHEDULE), embeds, 3)
    assert calls(prefix=prefix) == [*usual, (1000.0, 6), (757.0, 6)], "what is given comes before"
    again = [(990.0, 0), (600.0, 0)]
    assert calls(on_change=at(1, "regenerate")) == [*again, *again, *usual], "remade from its start"


def test_steps_of_its_own_follow_the_flow_from_the_noise(model: CausalWan, embeds: Tensor) -> None:
    noise = SeededNoise([7], SHAPE)
    alone = FlowMatchSchedule(1, [1000, 600], euler_steps=1)
    sampler = ChunkSampler(model, FlowMatchSchedule(1, [1000, 757], without_history=alone))
    x = noise(range(3), 0)
    for t, t_next in ((1000.0, 600.0), (600.0, 0.0)):
        flow = model(x, t, embeds, cache=model.new_cache(*SHAPE[1:]))
        x = x + (t_next - t) / 1000 * flow
    torch.testing.assert_close(video(sampler, embeds, 3), x, atol=1e-5, rtol=1e-4)


def test_the_last_timestep_lands_on_the_clean_picture() -> None:
    class Truth:
        """A denoiser that knows the picture."""

        def __init__(self, picture: Tensor) -> None:
            self.picture = picture

        def new_cache(self, *sizes: object) -> KVCache:
            return KVCache(0, 1)

        def __call__(self, x: Tensor, t: float, context: Tensor | None, *, cache: KVCache) -> Tensor:
            cache.begin(3)
            sigma = float(SCHEDULE.sigma(t))
            return (x - self.picture) / sigma if sigma else x

    picture = torch.randn(1, 3, *SHAPE)
    sampler = ChunkSampler(Truth(picture), SCHEDULE)  # type: ignore[arg-type]
    assert torch.allclose(video(sampler, picture, 6), torch.cat([picture, picture], dim=1), atol=1e-5)


def loss_of_two_chunks(model: CausalWan, first: Tensor, second: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of two cached chunks, the first committed by a clean pass of its own."""
    cache = model.new_cache(*SIZE)
    loss_first = model(first, 500.0, embeds, cache=cache).square().mean()
    with torch.no_grad():
        model(first, 0.0, embeds, cache=cache)
    cache.commit()
    return loss_first, model(second, 500.0, embeds, cache=cache).square().mean()


def test_a_chunks_loss_gives_no_gradient_to_an_earlier_chunk(
    model: CausalWan, new_latents: NewLatents, embeds: Tensor
) -> None:
    model.requires_grad_(True)
    first, second = new_latents(3, seed=1).requires_grad_(), new_latents(3, seed=2).requires_grad_()
    _, loss = loss_of_two_chunks(model, first, second, embeds)
    from_first, from_second = torch.autograd.grad(loss, [first, second], allow_unused=True)
    assert from_first is None
    assert from_second is not None
    assert float(from_second.abs().sum()) > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_cached_chunk_are_those_with_its_history_as_a_constant(
    model: CausalWan, new_latents: NewLatents, embeds: Tensor, checkpointing: bool
) -> None:
    first, second = new_latents(3, seed=1), new_latents(3, seed=2)
    model.requires_grad_(True)
    if checkpointing:
        model.transformer.enable_gradient_checkpointing()
    weights = [block.attn1.to_k.weight for block in model.transformer.blocks]
    losses = loss_of_two_chunks(model, first, second, embeds)
    actual = torch.autograd.grad(losses[1], weights)

    # A step along the gradient changes the loss by the gradient's length, where history stays as it was written.
    length = float(torch.stack([gradient.norm() for gradient in actual]).norm())
    cache = model.new_cache(*SIZE)
    losses_there = []
    with torch.no_grad():
        model(first, 0.0, embeds, cache=cache)
        cache.commit()
        for position in (0.05, -0.1):  # forwards, then from there to the other side
            for weight, gradient in zip(weights, actual, strict=True):
                weight += position * gradient / length
            losses_there.append(float(model(second, 500.0, embeds, cache=cache).double().square().mean()))
    assert (losses_there[0] - losses_there[1]) / 0.1 == pytest.approx(length, rel=1e-2)


def test_gradient_checkpointing_keeps_each_pass_its_own_mask(
    model: CausalWan, new_latents: NewLatents, embeds: Tensor
) -> None:
    model.requires_grad_(True)
    weights = [block.attn1.to_k.weight for block in model.transformer.blocks]

    def gradients() -> tuple[Tensor, ...]:
        # Training makes other passes before it goes backwards.
        loss = model(new_latents(6), 500.0, embeds, frames_per_chunk=3).square().mean()
        model(new_latents(2), 100.0, embeds)
        return torch.autograd.grad(loss, weights)

    expected = gradients()
    model.transformer.enable_gradient_checkpointing()
    for actual, wanted in zip(gradients(), expected, strict=True):
        assert torch.allclose(actual, wanted, atol=1e-6)


@pytest.mark.parametrize("frames", [-3, 1, 7])
def test_lengths_that_are_no_whole_chunks_name_the_nearest(model: CausalWan, embeds: Tensor, frames: int) -> None:
    below = frames // 3 * 3
    with pytest.raises(ShapeError, match=f"got {frames}; use .*{below + 3}"):
        video(ChunkSampler(model, SCHEDULE), embeds, frames)


def test_sizes_that_the_model_does_not_take_are_refused(
    model: CausalWan, new_wan: Callable[..., WanTransformer3DModel], embeds: Tensor, new_latents: NewLatents
) -> None:
    with pytest.raises(ShapeError, match="multiples of 2 and 2, got 5 x 6"):
        model(torch.zeros(1, 3, 4, 5, 6), 0.0, embeds)
    with pytest.raises(ShapeError, match="multiples of 2 and 2, got 4 x 7"):
        model.new_cache(4, 7)
    with pytest.raises(ShapeError, match=r"must be \(B, T, C, H, W\)"):
        model(torch.zeros(3, 4, 4, 6), 0.0, embeds)
    with pytest.raises(ShapeError, match=r"\(2,\) or \(2, 3\), got \(3,\)"):
        model(new_latents(3, batch=2), torch.zeros(3), embeds)
    with pytest.raises(ShapeError, match="prefix must be a multiple of 3"):
        video(ChunkSampler(model, SCHEDULE), embeds, 3, prefix=new_latents(2))
    with pytest.raises(ShapeError, match="patch_size must be 1 along time"):
        CausalWan(new_wan(patch_size=(2, 2, 2)))
    with pytest.raises(ValueError, match="not both"):
        model(new_latents(3), 0.0, embeds, cache=model.new_cache(*SIZE), frames_per_chunk=3)


def test_another_batch_in_the_middle_of_a_rollout_is_refused(
    model: CausalWan, embeds: Tensor, new_latents: NewLatents
) -> None:
    with pytest.raises(ShapeError, match="batch of 2, got a batch of 1"):
        video(ChunkSampler(model, SCHEDULE), embeds, 3, prefix=new_latents(3, batch=2))


def test_an_attention_mask_is_refused_and_not_ignored(model: CausalWan) -> None:
    attention = model.transformer.blocks[0].attn1
    with pytest.raises(NotImplementedError, match="not ignored"):
        attention(torch.zeros(1, 6, 48), attention_mask=torch.ones(1, 6))
