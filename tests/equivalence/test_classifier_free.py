"""Two branches with two caches are two rollouts mixed by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from causvid_adapter import CausalWan, ChunkSampler, FlowMatchSchedule, SeededNoise
from causvid_adapter.window import Window
from nasa_video.backbones.wan import install, prompt_keys
from nasa_video.guidance.attention import SdpaAttend
from nasa_video.guidance.methods import ClassifierFree
from nasa_video.guidance.state import GuidanceState
from nasa_video.text import TextContext
from nasa_video.video.classifier_free import ClassifierFreeDenoiser

Distance = Callable[[Tensor, Tensor], float]
NewContext = Callable[..., TextContext]
SHAPE = (4, 4, 6)
SCHEDULE = FlowMatchSchedule(8, [1000, 757])
FRAMES = 9


@pytest.fixture
def model(new_wan: Callable[..., WanTransformer3DModel]) -> CausalWan:
    return CausalWan(new_wan())


def two_rollouts(model: CausalWan, positive: Tensor, negative: Tensor, scale: float, window: int) -> Tensor:
    """The few-step loop written out, with a plain model and a cache for each prompt."""
    noise = SeededNoise([7, 8], SHAPE)
    contexts = (positive, negative)
    caches = [model.new_cache(*SHAPE[1:], window=Window(window)) for _ in contexts]
    chunks = []
    for start in range(0, FRAMES, 3):
        frames = range(start, start + 3)
        x = noise(frames, 0)
        for step, t in enumerate(SCHEDULE.timesteps):
            v_pos, v_neg = (model(x, t, c, cache=cache) for c, cache in zip(contexts, caches, strict=True))
            x0 = SCHEDULE.to_x0(x, v_pos + (scale - 1) * (v_pos - v_neg), t)
            last = step + 1 == len(SCHEDULE.timesteps)
            x = x0 if last else SCHEDULE.add_noise(x0, noise(frames, step + 1), SCHEDULE.timesteps[step + 1])
        for context, cache in zip(contexts, caches, strict=True):
            model(x, 0.0, context, cache=cache)
            cache.commit()
        chunks.append(x)
    return torch.cat(chunks, dim=1)


def stream(denoiser: ClassifierFreeDenoiser, window: int) -> Tensor:
    sampler = ChunkSampler(denoiser, SCHEDULE, window=Window(window))
    return torch.cat(list(sampler.stream(None, SeededNoise([7, 8], SHAPE), num_frames=FRAMES)), dim=1)


def branched(
    model: CausalWan, positive: TextContext, negative: TextContext, guidance: ClassifierFree | None
) -> ClassifierFreeDenoiser:
    denoiser = ClassifierFreeDenoiser(model, GuidanceState(SdpaAttend(), model.num_layers))
    denoiser.positive, denoiser.negative = (prompt_keys(model.transformer, c) for c in (positive, negative))
    denoiser.guidance = guidance
    return denoiser


@pytest.mark.parametrize("window", [6, FRAMES])
def test_a_batch_with_two_caches_is_two_rollouts_by_hand(
    model: CausalWan, new_context: NewContext, distance: Distance, window: int
) -> None:
    positive, negative = new_context([5, 2]), new_context([3, 4], seed=1)
    expected = two_rollouts(model, positive.embeds, negative.embeds, 2.5, window)
    denoiser = branched(model, positive, negative, ClassifierFree(2.5))
    with install(model.transformer, denoiser.steering):
        actual = stream(denoiser, window)
    assert distance(actual, expected) < 1e-5
    effect = denoiser.steering.meter.effect
    assert effect is not None
    assert effect.relative_change > 0.1
    assert 0 < effect.negative_share < 1


@pytest.mark.parametrize("guidance", [None, ClassifierFree(1)])
def test_without_guidance_it_is_the_positive_branch_to_the_bit(
    model: CausalWan, new_context: NewContext, guidance: ClassifierFree | None
) -> None:
    positive, negative = new_context([5, 2]), new_context([3, 4], seed=1)
    denoiser = branched(model, positive, negative, guidance)
    with install(model.transformer, denoiser.steering):
        actual = stream(denoiser, FRAMES)
        denoiser.steering.positive = denoiser.positive
        sampler = ChunkSampler(model, SCHEDULE)
        alone = torch.cat(list(sampler.stream(None, SeededNoise([7, 8], SHAPE), num_frames=FRAMES)), dim=1)
    assert torch.equal(actual, alone)
    assert denoiser.steering.meter.effect is None


def test_a_call_leaves_the_steering_as_it_was(model: CausalWan, new_context: NewContext) -> None:
    denoiser = branched(model, new_context([5]), new_context([3], seed=1), ClassifierFree(2.0))
    with install(model.transformer, denoiser.steering):
        denoiser(torch.zeros(1, 3, *SHAPE), 500.0, None, cache=denoiser.new_cache(*SHAPE[1:]))
        assert denoiser.steering.positive is None

        def interrupt(*given: object) -> None:
            raise KeyboardInterrupt

        hook = model.transformer.blocks[0].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            denoiser(torch.zeros(1, 3, *SHAPE), 500.0, None, cache=denoiser.new_cache(*SHAPE[1:]))
        hook.remove()
        assert denoiser.steering.positive is None


def test_a_branch_without_a_prompt_is_refused(model: CausalWan, new_context: NewContext) -> None:
    denoiser = branched(model, new_context([5]), new_context([3], seed=1), ClassifierFree(2.0))
    denoiser.negative = None
    with install(model.transformer, denoiser.steering), pytest.raises(ValueError, match="empty prompt has keys"):
        denoiser(torch.zeros(1, 3, *SHAPE), 500.0, None, cache=denoiser.new_cache(*SHAPE[1:]))


def test_both_caches_are_reset_placed_and_counted(model: CausalWan, new_context: NewContext) -> None:
    denoiser = branched(model, new_context([5]), new_context([3], seed=1), ClassifierFree(2.0))
    caches = denoiser.new_cache(*SHAPE[1:], window=Window(6))
    with install(model.transformer, denoiser.steering):
        denoiser(torch.zeros(1, 3, *SHAPE), 0.0, None, cache=caches)
    caches.commit()
    assert (caches.positive.frames_held, caches.negative.frames_held) == (3, 3)
    assert caches.num_bytes == 2 * caches.positive.num_bytes > 0
    caches.seek(9)
    assert (caches.positive.next_frame, caches.negative.next_frame) == (9, 9)
    caches.reset()
    assert (caches.positive.frames_held, caches.negative.frames_held, caches.num_bytes) == (0, 0, 0)
