"""The compiled chunk loop: one graph for every chunk, and the eager loop's video."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo.testing
from diffusers import WanTransformer3DModel
from torch import Tensor

from causvid_adapter import (
    CausalWan,
    CausvidAdapterError,
    ChunkSampler,
    FlowMatchSchedule,
    SeededNoise,
    ShapeError,
    StaticKVCache,
    compile_generator,
)
from causvid_adapter.accelerate.offload import offload_blocks
from causvid_adapter.window import RopeMode, Window
from nasa_video.backbones.wan import install, prompt_keys
from nasa_video.guidance.attention import FOLDED_TILE, SdpaAttend
from nasa_video.guidance.methods import AttentionGuidance, Nag, Nasa
from nasa_video.guidance.state import GuidanceState
from nasa_video.text import TextContext

NewWan = Callable[..., WanTransformer3DModel]
NewContext = Callable[..., TextContext]
SHAPE = (4, 4, 6)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def stream(
    model: CausalWan,
    steering: GuidanceState,
    chunks: int,
    window: int | None,
    sink: int = 0,
    rope: RopeMode = "absolute",
) -> Iterator[Tensor]:
    sampler = ChunkSampler(model, FlowMatchSchedule(8, [1000, 757]), 1, Window(window, sink, rope))
    with install(model.transformer, steering):
        yield from sampler.stream(
            None,
            SeededNoise([7], SHAPE),
            num_frames=chunks,
            before_call=lambda call: setattr(steering, "call", call),
        )


def steering_of(transformer: WanTransformer3DModel, method: AttentionGuidance | None, new: NewContext) -> GuidanceState:
    negatives = [(prompt_keys(transformer, new([3], seed=1)), 1.0)]
    made = GuidanceState(SdpaAttend(), len(transformer.blocks), method, prompt_keys(transformer, new([5])), negatives)
    made.meter.prepare(torch.device("cpu"))
    return made


@pytest.mark.parametrize("method", [None, Nasa(0.7), Nag(3.0)], ids=lambda m: m.name if m else "none")
@pytest.mark.parametrize(("window", "sink", "rope"), [(None, 0, "absolute"), (3, 1, "absolute"), (3, 0, "window")])
def test_one_graph_serves_every_chunk_and_is_the_eager_video(
    new_wan: NewWan, new_context: NewContext, method: AttentionGuidance | None, window: int | None, sink: int,
    rope: RopeMode,
) -> None:  # fmt: skip
    model = CausalWan(new_wan())
    steering = steering_of(model.transformer, method, new_context)
    expected = torch.cat(list(stream(model, steering, 6, window, sink, rope)), dim=1)
    effect = steering.meter.effect
    steering.meter.prepare(torch.device("cpu"))
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compile_generator(model, backend=counter)
    graphs, chunks = [], []
    for chunk in stream(model, steering, 6, window, sink, rope):
        chunks.append(chunk)
        graphs.append(counter.frame_count)
    assert graphs == [1] * 6, "no chunk is compiled anew: first, filling and sliding window"
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, rtol=0, atol=1e-5)
    measured = steering.meter.effect
    assert (measured is None) == (effect is None)
    if measured is not None and effect is not None:
        assert dataclasses.astuple(measured) == pytest.approx(dataclasses.astuple(effect), rel=1e-5)
    again = torch.cat(list(stream(model, steering, 6, window, sink, rope)), dim=1)
    assert torch.equal(again, torch.cat(chunks, dim=1))
    assert counter.frame_count == 1, "the next video of the size takes the same graph"


def test_prompts_of_other_lengths_take_the_same_graph(new_wan: NewWan, new_context: NewContext) -> None:
    model = CausalWan(new_wan())
    steering = steering_of(model.transformer, Nasa(0.1), new_context)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compile_generator(model, backend=counter)
    for length in (5, 2, FOLDED_TILE - 1):
        steering.positive = prompt_keys(model.transformer, new_context([length], tokens=FOLDED_TILE))
        list(stream(model, steering, 1, None))
    assert counter.frame_count == 1


def test_a_session_may_change_its_guidance_more_often_than_torch_compiles_by_itself(
    new_wan: NewWan, new_context: NewContext
) -> None:
    model = CausalWan(new_wan())
    steering = steering_of(model.transformer, Nasa(0.1), new_context)
    (negative,) = steering.negatives
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_generator(model, backend=counter)
        for number in range(1, 13):
            steering.negatives = [negative] * number
            list(stream(model, steering, 1, None))
    assert counter.frame_count == 12


def test_the_static_cache_is_the_growing_one(new_wan: NewWan, new_context: NewContext) -> None:
    model = CausalWan(new_wan())
    embeds = new_context([5]).embeds
    sampler = ChunkSampler(model, FlowMatchSchedule(8, [1000]), 3, Window(7, 1))

    def video() -> Tensor:
        return torch.cat(list(sampler.stream(embeds, SeededNoise([1], SHAPE), num_frames=15)), dim=1)

    growing = video()
    model.static_cache = True
    torch.testing.assert_close(video(), growing, rtol=0, atol=1e-5)


def test_a_static_cache_needs_a_capacity_and_keeps_to_it() -> None:
    with pytest.raises(ShapeError, match="a window or the video's length"):
        StaticKVCache(1, 2)
    cache = StaticKVCache(1, 2, num_frames=3)
    cache.allocate(1, 2, 4, torch.float32, torch.device("cpu"))
    cache.begin(3)
    size = cache.num_bytes
    assert size == 2 * 3 * 2 * 8 * 4
    keys, _ = cache.extend(0, torch.ones(1, 6, 2, 4), torch.ones(1, 6, 2, 4))
    assert keys.shape == (1, 6, 2, 4)
    cache.commit()
    with pytest.raises(RuntimeError, match="nothing to commit"):
        cache.commit()
    with pytest.raises(ShapeError, match="made for 3 latent frames"):
        cache.begin(1)
    with pytest.raises(ShapeError, match="holds a batch of 1, got a batch of 2"):
        cache.allocate(2, 2, 4, torch.float32, torch.device("cpu"))


def test_what_cannot_be_compiled_is_refused(new_wan: NewWan) -> None:
    model = CausalWan(new_wan())
    with pytest.raises(CausvidAdapterError, match="CUDA graphs need CUDA"):
        compile_generator(model, cuda_graphs=True)
    assert not model.static_cache
    offload_blocks(model, torch.device("cpu"))
    with pytest.raises(CausvidAdapterError, match="offloaded blocks cannot be compiled"):
        compile_generator(model)
