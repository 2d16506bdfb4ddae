from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from causvid_adapter import CausalWan
from causvid_adapter.rope import FrameRope, rotate
from causvid_adapter.window import Window

HEAD_DIM = 24
CPU = torch.device("cpu")


def wan_rope() -> WanRotaryPosEmbed:
    return WanRotaryPosEmbed(HEAD_DIM, (1, 2, 2), 64)


def test_the_table_from_frame_zero_is_that_of_diffusers() -> None:
    expected = wan_rope()(torch.zeros(1, 4, 5, 4, 6))
    table = FrameRope(wan_rope()).build(torch.arange(5), 2, 3, CPU)
    for actual, wanted in zip(table, expected, strict=True):
        assert actual.shape == wanted.shape
        assert torch.allclose(actual, wanted, atol=1e-6)


def test_a_later_start_is_a_slice_of_the_whole_table() -> None:
    rope = FrameRope(wan_rope())
    whole, later = rope.build(torch.arange(9), 2, 3, CPU), rope.build(torch.arange(6, 9), 2, 3, CPU)
    for all_frames, last_frames in zip(whole, later, strict=True):
        assert torch.equal(all_frames[:, 6 * 6 :], last_frames)


def test_scores_depend_on_the_distance_of_frames_alone() -> None:
    rope = FrameRope(wan_rope())
    q, k = torch.randn(2, 1, 1, 2, HEAD_DIM).unbind()

    def score(query_frame: int, key_frame: int) -> Tensor:
        tables = [rope.build(torch.tensor([frame]), 1, 1, CPU) for frame in (query_frame, key_frame)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum(dim=-1)

    assert torch.allclose(score(5, 2), score(1003, 1000), atol=1e-4)
    assert not torch.allclose(score(5, 2), score(5, 3), atol=1e-2)


def test_frames_far_beyond_diffusers_table_keep_their_precision() -> None:
    table = FrameRope(wan_rope()).build(torch.tensor([100_003]), 1, 1, CPU)
    angle = torch.tensor(100_003.0, dtype=torch.float64)
    assert torch.allclose(table[0][0, 0, 0, 0].double(), angle.cos(), atol=1e-7)
    assert torch.allclose(table[1][0, 0, 0, 1].double(), angle.sin(), atol=1e-7)


def test_rotation_keeps_dtype_and_norm() -> None:
    table = FrameRope(wan_rope()).build(torch.arange(2), 2, 3, CPU)
    x = torch.randn(2, 12, 2, HEAD_DIM)
    assert torch.allclose(rotate(x, table).norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16


def test_an_endless_rollout_keeps_few_tables(
    new_wan: Callable[..., WanTransformer3DModel], new_latents: Callable[..., Tensor]
) -> None:
    model = CausalWan(new_wan())
    cache = model.new_cache(4, 6, window=Window(2))
    for _ in range(20):
        model(new_latents(frames=1), 0.0, torch.zeros(1, 2, 10), cache=cache)
        cache.commit()
    assert len(model._tables) <= 9
    assert cache.next_frame == 20
