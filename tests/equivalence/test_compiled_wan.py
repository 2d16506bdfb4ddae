"""torch.compile takes the causal, guided model in whole graphs, and guidance adds none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch._dynamo.testing
from diffusers import WanTransformer3DModel
from torch import Tensor

from causvid_adapter import CausalWan, ChunkSampler, FlowMatchSchedule, SeededNoise
from causvid_adapter.window import Window
from nasa_video.backbones.wan import install, prompt_keys
from nasa_video.guidance.attention import SdpaAttend
from nasa_video.guidance.methods import AttentionGuidance, CentredNasa, Nag, Nasa, Vsf
from nasa_video.guidance.schedule import ScaleSchedule
from nasa_video.guidance.state import GuidanceState
from nasa_video.text import TextContext

NewWan = Callable[..., WanTransformer3DModel]
NewContext = Callable[..., TextContext]
SHAPE = (4, 4, 6)
METHODS: list[AttentionGuidance | None] = [
    None,
    Nasa(0.7),
    CentredNasa(0.7, conflict=1.0, limit=0.3),
    Nag(5.0),
    Vsf(1.3),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steering_of(
    transformer: WanTransformer3DModel, method: AttentionGuidance | None, new_context: NewContext
) -> GuidanceState:
    padding = method is None or method.negative_padding
    negatives = [(prompt_keys(transformer, new_context([3], seed=1), padding=padding), 1.0)]
    positive = prompt_keys(transformer, new_context([5]))
    return GuidanceState(SdpaAttend(), len(transformer.blocks), method, positive, negatives)


def stream(model: CausalWan, steering: GuidanceState, chunks: int) -> Tensor:
    sampler = ChunkSampler(model, FlowMatchSchedule(8, [1000, 757]), 1, window=Window(3, 1))
    noise = SeededNoise([7], SHAPE)
    with install(model.transformer, steering):
        frames = sampler.stream(
            None, noise, num_frames=chunks, before_call=lambda call: setattr(steering, "call", call)
        )
        return torch.cat(list(frames), dim=1)


def compiled(model: CausalWan) -> torch._dynamo.testing.CompileCounterWithBackend:
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model.transformer.forward = torch.compile(model.transformer.forward, backend=counter, fullgraph=True)
    return counter


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name if method else "none")
def test_a_rollout_in_whole_graphs_is_the_rollout_and_stops_compiling_when_the_window_is_full(
    new_wan: NewWan, new_context: NewContext, method: AttentionGuidance | None
) -> None:
    model = CausalWan(new_wan(num_layers=1))
    steering = steering_of(model.transformer, method, new_context)
    expected = stream(model, steering, 6)
    effect = steering.meter.effect
    counter = compiled(model)
    steering.meter.reset()
    assert torch.allclose(stream(model, steering, 6), expected, atol=1e-5)
    assert steering.meter.effect == (effect if effect is None else pytest.approx(effect))
    # An empty cache, its first chunk, a second and a full window; the measured effect adds its own beginning.
    assert counter.frame_count <= 5
    graphs = counter.frame_count
    stream(model, steering, 8)
    assert counter.frame_count <= graphs + 1


def test_a_scale_that_follows_steps_and_layers_is_itself_in_whole_graphs(
    new_wan: NewWan, new_context: NewContext
) -> None:
    model = CausalWan(new_wan())
    schedule = ScaleSchedule(step_scales=(1, 0.5), layer_scales=(0.5, 1))
    steering = steering_of(model.transformer, Nasa(0.7, schedule=schedule), new_context)
    expected = stream(model, steering, 2)
    steering.guidance = Nasa(0.7)
    assert not torch.allclose(stream(model, steering, 2), expected, atol=1e-3)
    steering.guidance = Nasa(0.7, schedule=schedule)
    compiled(model)
    assert torch.allclose(stream(model, steering, 2), expected, atol=1e-5)


def test_a_guided_block_compiles_without_a_graph_break(new_wan: NewWan, new_context: NewContext) -> None:
    transformer = new_wan()
    steering = steering_of(transformer, Nasa(0.7), new_context)
    with install(transformer, steering):
        attention = transformer.blocks[1].attn2
        hidden, text = torch.randn(1, 6, 48), torch.zeros(1, 1, 48)
        expected = attention(hidden, text)
        explained = torch._dynamo.explain(attention)(hidden, text)
        assert explained.graph_break_count == 0
        assert explained.graph_count == 1
        assert torch.allclose(
            torch.compile(attention, backend="aot_eager", fullgraph=True)(hidden, text), expected, atol=1e-5
        )
