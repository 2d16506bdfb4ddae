from __future__ import annotations

import math
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nasa_video.errors import InputError
from nasa_video.guidance.attention import (
    FOLDED_TILE,
    AttentionError,
    SdpaAttend,
    TextKeys,
    XformersAttend,
    _aligned,
    folded_embeds,
    key_bias,
    make_attend,
    shifted_bias,
)
from nasa_video.guidance.methods import AttentionGuidance, Nag, Nasa, Vsf


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
    q, k, v = (x.bfloat16() for x in random_case(keys=FOLDED_TILE))
    bias = key_bias(torch.tensor([3, 1]), 8, fold=True, padding=True)
    out, lse = SdpaAttend().with_lse(q, TextKeys(k, v, bias))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.allclose(out.float(), SdpaAttend()(q, TextKeys(k, v, bias)).float(), atol=0.03)


def test_m_equal_keys_are_one_with_log_m() -> None:
    q, k, v = random_case(keys=FOLDED_TILE)
    lengths, total = torch.tensor([2, 2]), 7
    padded_k, padded_v = (torch.cat([x[:, :2], x[:, -1:].expand(-1, total - 2, -1, -1)], dim=1) for x in (k, v))
    bias = key_bias(lengths, total, fold=True, padding=True)
    folded = SdpaAttend()(q, TextKeys(k, v, bias))
    assert torch.allclose(folded, SdpaAttend()(q, TextKeys(padded_k, padded_v)), atol=1e-6)
    assert not torch.allclose(folded, SdpaAttend()(q, TextKeys(k, v)), atol=1e-2)


def test_bias_of_prompts_of_different_length_in_one_batch() -> None:
    bias = key_bias(torch.tensor([2, 0, 3]), 3, fold=True, padding=True)
    assert bias is not None
    off = -math.inf
    between = [off] * (FOLDED_TILE - 4)
    assert bias[:, 0, 0].tolist() == [
        [0, 0, off, *between, 0],
        [off, off, off, *between, pytest.approx(math.log(3))],
        [0, 0, 0, *between, off],
    ]


def test_bias_without_padding_leaves_the_real_tokens() -> None:
    off, lengths = -math.inf, torch.tensor([2, 1])
    folded, whole = (key_bias(lengths, 4, fold=fold, padding=False) for fold in (True, False))
    assert folded is not None
    assert whole is not None
    between = [off] * (FOLDED_TILE - 3)
    assert folded[:, 0, 0].tolist() == [[0, 0, *between, off], [0, off, *between, off]]
    assert whole[:, 0, 0].tolist() == [[0, 0, off, off], [0, off, off, off]]
    assert key_bias(lengths, 4, fold=False, padding=True) is None


@pytest.mark.parametrize("fold", [True, False])
def test_a_prompt_without_tokens_and_padding_is_refused(fold: bool) -> None:
    with pytest.raises(InputError, match="only padding"):
        key_bias(torch.tensor([2, 0]), 4, fold=fold, padding=False)


def test_folding_keeps_the_longest_prompt_and_one_padding_token() -> None:
    embeds = torch.ones(2, 40, 3)
    for longest, keys in ((2, 1), (15, 1), (16, 2)):
        folded = folded_embeds(embeds, torch.tensor([longest, 1]))
        assert folded.shape == (2, keys * FOLDED_TILE, 3)
        assert torch.equal(folded[:, :longest], embeds[:, :longest])
        assert not folded[:, longest:].any()


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


class FakeXformers(ModuleType):
    """What xformers 0.0.35 does with our calls, in float64: its checks of shape and alignment, its padded log-sum-exp.

    Its checks are those of ``fmha.common.Inputs.validate_inputs`` and ``fmha.cutlass.FwOp.not_supported_reasons``.
    """

    def __init__(self) -> None:
        super().__init__("xformers.ops")
        self.biases: list[Tensor | None] = []

    def memory_efficient_attention(self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None) -> Tensor:
        return self._attention(query, key, value, attn_bias)[0]

    def memory_efficient_attention_forward_requires_grad(
        self, query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = self._attention(query, key, value, attn_bias)
        padded = torch.nn.functional.pad(lse.squeeze(-1).transpose(1, 2), (0, -query.shape[1] % 32), value=math.inf)
        return out, padded.float()

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        assert q.dtype == k.dtype == v.dtype
        if q.shape[-1] % 8:
            raise NotImplementedError("No operator found for\n  `memory_efficient_attention_forward`")
        if bias is not None:
            if bias.shape != (q.shape[0], q.shape[2], q.shape[1], k.shape[1]):
                raise ValueError(f"Invalid shape for attention bias: {bias.shape}")
            if bias.dtype != q.dtype:
                raise ValueError(f"Invalid dtype for attention bias: {bias.dtype}")
            alignment = 128 // torch.finfo(bias.dtype).bits
            if bias.stride(-1) > 1 or any(stride % alignment for stride in bias.stride()[:-1]):
                raise NotImplementedError(f"attn_bias.stride(-2) % {alignment} != 0")
        self.biases.append(bias)
        out, lse = softmax_attention(q, k, v, bias)
        return out.to(q.dtype), lse


@pytest.fixture
def fake_xformers(monkeypatch: pytest.MonkeyPatch) -> FakeXformers:
    package, ops = ModuleType("xformers"), FakeXformers()
    package.ops = ops  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(XformersAttend, "_check", staticmethod(lambda q: None))
    return ops


@pytest.mark.parametrize("method", [Nasa(0.8), Nag(3.0), Vsf(1.2)], ids=lambda method: method.name)
@pytest.mark.parametrize("num_keys", [3, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guidance_over_xformers_interface_is_guidance_over_sdpa(
    fake_xformers: FakeXformers, method: AttentionGuidance, num_keys: int, dtype: torch.dtype
) -> None:
    q, k, v = (x.to(dtype) for x in random_case(queries=5, keys=num_keys))
    bias = key_bias(torch.tensor([num_keys - 1, 1]), num_keys, fold=False, padding=False)
    assert bias is not None
    bias[..., -1] = math.log(30)
    positive, negative = TextKeys(k, v, bias), TextKeys(v, k)
    over_xformers = method(q, positive, [(negative, 0.7)], make_attend("xformers"))
    over_sdpa = method(q, positive, [(negative, 0.7)], SdpaAttend())
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(over_xformers.z, over_sdpa.z, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(over_xformers.negative_share, over_sdpa.negative_share, rtol=1e-2, atol=1e-3)
    assert [given is None for given in fake_xformers.biases] == [False, True]


def test_what_xformers_cannot_do_is_said_with_the_way_out(fake_xformers: FakeXformers) -> None:
    attend = make_attend("xformers")
    q, k, v = (x[..., :5].contiguous() for x in random_case())
    for call in (attend, attend.with_lse):
        with pytest.raises(
            AttentionError, match=r"no kernel for torch.float32 with 3 heads of 5 .*'sdpa' \(No operator"
        ):
            call(q, TextKeys(k, v))


def test_xformers_loses_no_gradient_of_the_log_sum_exp_in_silence(fake_xformers: FakeXformers) -> None:
    q, k, v = random_case()
    attend, keys = make_attend("xformers"), TextKeys(k.requires_grad_(), v)
    with pytest.raises(AttentionError, match="without a gradient"):
        attend.with_lse(q, keys)
    with torch.no_grad():
        attend.with_lse(q, keys)


@pytest.mark.parametrize("num_keys", [3, 8, 9])
def test_the_bias_for_xformers_has_its_values_and_its_alignment(num_keys: int) -> None:
    q = random_case(keys=num_keys)[0]
    bias = torch.randn(2, 1, 1, num_keys)
    aligned = _aligned(bias, q)
    assert torch.equal(aligned, bias.expand(2, 3, 5, num_keys))
    assert aligned._base is not None
    assert aligned._base.shape[-1] % 8 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", ["none", "aligned"])
def test_the_real_xformers_refuses_nothing_but_the_cpu(dtype: torch.dtype, bias: str) -> None:
    """Where the package is installed: its own checks of our input find no fault but the device."""
    cutlass = pytest.importorskip("xformers.ops.fmha.cutlass")
    common = pytest.importorskip("xformers.ops.fmha.common")
    q, k, v = (x.to(dtype) for x in random_case(keys=9))
    scores = None if bias == "none" else _aligned(torch.zeros(2, 1, 1, 9, dtype=dtype), q)
    inputs = common.Inputs(q, k, v, scores)
    inputs.validate_inputs()
    reasons = cutlass.FwOp.not_supported_reasons(inputs)
    assert any("device=cpu" in reason for reason in reasons)
    assert [reason for reason in reasons if "device=cpu" not in reason and "bf16 is only" not in reason] == []


@pytest.mark.parametrize("real", [4, 20, 77])
def test_folding_in_half_precision_is_as_exact_as_padding(real: int) -> None:
    generator = torch.Generator().manual_seed(real)
    q, k, v, pad_k, pad_v = (
        (size * torch.randn(1, n, 4, 64, generator=generator)).bfloat16()
        for n, size in ((64, 2.0), (real, 1.0), (real, 1.0), (1, 0.3), (1, 0.3))
    )
    padded = [torch.cat([x, pad.expand(-1, 512 - real, -1, -1)], dim=1) for x, pad in ((k, pad_k), (v, pad_v))]
    exact, _ = softmax_attention(q, *padded)
    bias = key_bias(torch.tensor([real]), 512, fold=True, padding=True)
    assert bias is not None
    rounded, shift = shifted_bias(bias, torch.bfloat16)
    padded_k, padded_v = (x[:, : bias.shape[-1]] for x in padded)
    folded = TextKeys(padded_k, padded_v, bias, rounded)

    def error(out: Tensor) -> float:
        return float((out.double() - exact).norm() / exact.norm())

    assert error(SdpaAttend()(q, folded)) <= error(SdpaAttend()(q, TextKeys(*padded)))
    weights = (rounded.double() + shift.double()).exp().flatten()
    torch.testing.assert_close(float(weights[-1]), 512.0 - real, rtol=2e-4, atol=0)
    torch.testing.assert_close(weights[:real], torch.ones(real, dtype=torch.double), rtol=2e-4, atol=0)
    assert not weights[real:-1].any()


def test_a_gradient_is_wanted_and_no_fused_kernel_loses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_case(queries=6)
    expected = [x.clone().requires_grad_() for x in (q, k, v)]
    softmax_attention(*expected)[1].sum().backward()  # type: ignore[misc]
    monkeypatch.setattr("nasa_video.guidance.fused_lse.SMALL_SCORES", 0)
    q.requires_grad_()
    k.requires_grad_()
    SdpaAttend().with_lse(q, TextKeys(k, v))[1].sum().backward()
    torch.testing.assert_close(q.grad, expected[0].grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(k.grad, expected[1].grad, rtol=1e-4, atol=1e-6)
