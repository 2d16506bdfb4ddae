from __future__ import annotations

import pytest
import torch

from nasa_video.text import TextContext, WordLlamaEncoder


@pytest.fixture(scope="module")
def encoder() -> WordLlamaEncoder:
    return WordLlamaEncoder(max_tokens=6)


def test_embeddings_are_zero_after_the_real_tokens_and_only_there(encoder: WordLlamaEncoder) -> None:
    context = encoder(["a red ball", "", "snow"])
    assert context.embeds.shape == (3, 6, 256)
    assert context.lengths[1] == 0
    assert context.lengths[0] > context.lengths[2] > 0
    for embeds, length in zip(context.embeds, context.lengths.tolist(), strict=True):
        assert bool((embeds[:length] != 0).any(dim=-1).all())
        assert bool((embeds[length:] == 0).all())


def test_a_batch_is_its_prompts_one_by_one(encoder: WordLlamaEncoder) -> None:
    prompts = ["a red ball", "deep blue sea"]
    together = encoder(prompts)
    for row, prompt in enumerate(prompts):
        alone = encoder([prompt])
        assert torch.equal(together.embeds[row], alone.embeds[0])
        assert together.lengths[row] == alone.lengths[0]


def test_case_and_spaces_do_not_matter(encoder: WordLlamaEncoder) -> None:
    assert torch.equal(encoder(["A  Red\nBall "]).embeds, encoder(["a red ball"]).embeds)


def test_what_does_not_fit_is_cut_and_shown(encoder: WordLlamaEncoder) -> None:
    words = ["red", "blue", "green", "ball", "cat", "dog", "house", "tree"]
    context = encoder([" ".join(words), "red ball"])
    assert context.lengths.tolist() == [6, 2]
    assert context.cut == ("house tree", "")
    assert torch.equal(context.embeds[0], encoder([" ".join(words[:6])]).embeds[0])


@pytest.mark.parametrize("prompt", ["🎈🎈", "نص عربي", "e\u0301\u200b\u202e", "\x00", "ß" * 50, "x" * 1_000_000])
def test_strange_and_huge_prompts_are_encoded(encoder: WordLlamaEncoder, prompt: str) -> None:
    context = encoder([prompt])
    assert 0 <= int(context.lengths[0]) <= 6
    assert bool(context.embeds.isfinite().all())


def test_a_context_moves_whole() -> None:
    context = TextContext(torch.ones(1, 2, 3), torch.tensor([1]), ("cut",)).to("cpu", torch.bfloat16)
    assert (context.embeds.dtype, context.lengths.dtype, context.cut) == (torch.bfloat16, torch.int64, ("cut",))
