from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nasa_video.attention import (
    AttentionError,
    SdpaAttend,
    TextKeys,
    XformersAttend,
    folded_embeds,
    key_bias,
    make_attend,
)
from nasa_video.errors import InputError


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Output (B, Q, H, D) and log-sum-exp (B, Q, H, 1) in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias.double()
    out = scores.softmax(dim=-1) @ v
    return out.transpose(1, 2), scores.logsumexp(dim=-1).transpose(1, 2).unsqueeze(-1)


def random_case(batch: int = 2, queries: int = 5, keys: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, n, 3, 8, generator=generator) for n in (queries, keys, keys))  # type: ignore[return-value]


@pytest.mark.parametrize("biased", [False, True])
def test_sdpa_is_softmax_attention(biased: bool) -> None:
    q, k, v = random_case()
    bias = torch.tensor([[0.0, -1.0, 2.0, -math.inf], [-math.inf, 0.0, 0.0, 3.0]])[:, None, None] if biased else None
    expected, lse = softmax_attention(q, k, v, bias)
    attend, keys = SdpaAttend(), TextKeys(k, v, bias)
    assert torch.allclose(attend(q, keys).double(), expected, atol=1e-6)
    out, actual_lse = attend.with_lse(q, keys)
    assert torch.allclose(out.double(), expected, atol=1e-6)
    assert torch.allclose(actual_lse.double(), lse, atol=1e-5)
    assert actual_lse.dtype == torch.float32


def test_sdpa_in_bfloat16_keeps_the_dtype_and_the_log_sum_exp_in_float32() -> None:
    q, k, v = (x.bfloat16() for x in random_case())
    bias = key_bias(torch.tensor([3, 1]), 8, fold=True, padding=True)
    out, lse = SdpaAttend().with_lse(q, TextKeys(k, v, bias))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.allclose(out.float(), SdpaAttend()(q, TextKeys(k, v, bias)).float(), atol=0.03)


def test_m_equal_keys_are_one_with_log_m() -> None:
    q, k, v = random_case(keys=3)
    lengths, total = torch.tensor([2, 2]), 7
    padded_k, padded_v = (torch.cat([x[:, :2], x[:, 2:].expand(-1, total - 2, -1, -1)], dim=1) for x in (k, v))
    bias = key_bias(lengths, total, fold=True, padding=True)
    folded = SdpaAttend()(q, TextKeys(k, v, bias))
    assert torch.allclose(folded, SdpaAttend()(q, TextKeys(padded_k, padded_v)), atol=1e-6)
    assert not torch.allclose(folded, SdpaAttend()(q, TextKeys(k, v)), atol=1e-2)


def test_bias_of_prompts_of_different_length_in_one_batch() -> None:
    bias = key_bias(torch.tensor([2, 0, 3]), 3, fold=True, padding=True)
    assert bias is not None
    off = -math.inf
    assert bias[:, 0, 0].tolist() == [[0, 0, off, 0], [off, off, off, pytest.approx(math.log(3))], [0, 0, 0, off]]


def test_bias_without_padding_leaves_the_real_tokens() -> None:
    off, lengths = -math.inf, torch.tensor([2, 1])
    folded, whole = (key_bias(lengths, 4, fold=fold, padding=False) for fold in (True, False))
    assert folded is not None
    assert whole is not None
    assert folded[:, 0, 0].tolist() == [[0, 0, off], [0, off, off]]
    assert whole[:, 0, 0].tolist() == [[0, 0, off, off], [0, off, off, off]]
    assert key_bias(lengths, 4, fold=False, padding=True) is None


@pytest.mark.parametrize("fold", [True, False])
def test_a_prompt_without_tokens_and_padding_is_refused(fold: bool) -> None:
    with pytest.raises(InputError, match="only padding"):
        key_bias(torch.tensor([2, 0]), 4, fold=fold, padding=False)


def test_folding_keeps_the_longest_prompt_and_one_padding_token() -> None:
    embeds = torch.ones(2, 5, 3)
    folded = folded_embeds(embeds, torch.tensor([2, 1]))
    assert folded.shape == (2, 3, 3)
    assert torch.equal(folded[:, 2], torch.zeros(2, 3))


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'sdpa' or 'xformers', got 'flash'"):
        make_attend("flash")  # type: ignore[arg-type]


def test_xformers_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(AttentionError, match="pip install"):
        make_attend("xformers")


def test_xformers_on_a_cpu_is_refused_and_never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    package, ops = ModuleType("xformers"), ModuleType("xformers.ops")
    package.ops = ops  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    attend = make_attend("xformers")
    q, k, v = random_case()
    for call in (attend, attend.with_lse):
        with pytest.raises(AttentionError, match="no attention kernel for cpu; use the backend 'sdpa'"):
            call(q, TextKeys(k, v))


@pytest.mark.parametrize("num_keys", [3, 8, 9])
def test_the_bias_for_xformers_has_its_values_and_its_alignment(num_keys: int) -> None:
    q, k, v = random_case(keys=num_keys)
    bias = torch.randn(2, 1, 1, num_keys)
    aligned = XformersAttend._bias(q, TextKeys(k, v, bias))
    assert aligned is not None
    assert torch.equal(aligned, bias.expand(2, 3, 5, num_keys))
    assert aligned._base is not None
    assert aligned._base.shape[-1] % 8 == 0
