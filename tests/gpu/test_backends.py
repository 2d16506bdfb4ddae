"""On a CUDA device: both attention kernels give the same numbers, and the generator those of the CPU."""

# B batch, Q queries, N keys, H heads, D head dim

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from causvid_adapter import CausalWan, ChunkSampler, FlowMatchSchedule, SeededNoise
from causvid_adapter.window import Window
from nasa_video.backbones.wan import install, prompt_keys
from nasa_video.bench.case import BenchSettings
from nasa_video.bench.measure import bench
from nasa_video.guidance.attention import Attend, Backend, SdpaAttend, TextKeys, key_bias, make_attend, shifted_bias
from nasa_video.guidance.fused_lse import SMALL_SCORES
from nasa_video.guidance.methods import AttentionGuidance, Nag, Nasa, Vsf
from nasa_video.guidance.state import GuidanceState
from nasa_video.models.free_memory import available
from nasa_video.text import TextContext

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

NewWan = Callable[..., WanTransformer3DModel]
NewContext = Callable[..., TextContext]
Distance = Callable[[Tensor, Tensor], float]
SHAPE = (4, 4, 6)
METHODS: list[AttentionGuidance | None] = [None, Nasa(0.7), Nag(5.0), Vsf(1.3)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture
def xformers_attend() -> Attend:
    pytest.importorskip("xformers.ops")
    return make_attend("xformers")


@pytest.fixture(autouse=True)
def _exact_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def keys_of(num_keys: int, bias: str, dtype: torch.dtype, batch: int = 2) -> TextKeys:
    generator = torch.Generator().manual_seed(num_keys)
    k, v = (torch.randn(batch, num_keys, 3, 64, generator=generator).to("cuda", dtype) for _ in range(2))
    if bias == "none":
        return TextKeys(k, v)
    scores = torch.zeros(batch, 1, 1, num_keys)
    scores[0, ..., -1] = math.log(491)
    scores[1, ..., num_keys // 2 :] = -math.inf
    return TextKeys(k, v, scores.to("cuda"))


def queries_of(num_queries: int, dtype: torch.dtype, batch: int = 2) -> Tensor:
    return torch.randn(batch, num_queries, 3, 64, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)


def exact(q: Tensor, keys: TextKeys) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64."""
    scores = torch.einsum("bqhd,bnhd->bhqn", q.double(), keys.k.double()) / math.sqrt(q.shape[-1])
    if keys.bias is not None:
        scores = scores + keys.bias.double()
    lse = scores.logsumexp(dim=-1, keepdim=True)
    return torch.einsum("bhqn,bnhd->bqhd", (scores - lse).exp(), keys.v.double()), lse.transpose(1, 2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", ["none", "log m and -inf"])
@pytest.mark.parametrize("num_keys", [9, 21, 512])
def test_xformers_is_sdpa_is_the_formula(
    xformers_attend: Attend, distance: Distance, num_keys: int, bias: str, dtype: torch.dtype
) -> None:
    q, keys = queries_of(130, dtype), keys_of(num_keys, bias, dtype)
    expected, expected_lse = exact(q, keys)
    for attend in (SdpaAttend(), xformers_attend):
        out, lse = attend.with_lse(q, keys)
        assert distance(attend(q, keys), expected) < TOLERANCE[dtype]
        assert distance(out, expected) < TOLERANCE[dtype]
        assert lse.shape == (2, 130, 3, 1)
        assert distance(lse, expected_lse) < TOLERANCE[dtype]


@pytest.mark.parametrize("bias", ["none", "log m and -inf"])
def test_scores_too_large_to_be_formed_have_the_same_log_sum_exp(distance: Distance, bias: str) -> None:
    num_keys = 513
    q, keys = queries_of(SMALL_SCORES // (2 * 3 * num_keys) + 7, torch.float32), keys_of(num_keys, bias, torch.float32)
    expected, expected_lse = exact(q, keys)
    out, lse = SdpaAttend().with_lse(q, keys)
    assert distance(out, expected) < 1e-5
    assert distance(lse, expected_lse) < 1e-5


@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
@pytest.mark.parametrize("real", [4, 20, 77])
def test_folding_in_half_precision_is_as_exact_as_padding(real: int, backend: Backend) -> None:
    if backend == "xformers":
        pytest.importorskip("xformers.ops")
    attend, q = make_attend(backend), 2 * queries_of(130, torch.bfloat16, batch=1)
    keys, padding = (keys_of(n, "none", torch.bfloat16, batch=1) for n in (real, 1))
    padded = TextKeys(
        *(
            torch.cat([own, 0.3 * pad.expand(-1, 512 - real, -1, -1)], dim=1)
            for own, pad in ((keys.k, padding.k), (keys.v, padding.v))
        )
    )
    expected, expected_lse = exact(q, padded)
    bias = key_bias(torch.tensor([real]), 512, fold=True, padding=True)
    assert bias is not None
    rounded, _ = shifted_bias(bias.to("cuda"), torch.bfloat16)
    num_keys = bias.shape[-1]
    folded = TextKeys(padded.k[:, :num_keys], padded.v[:, :num_keys], bias.to("cuda"), rounded)

    def error(out: Tensor) -> float:
        return float((out.double() - expected).norm() / expected.norm())

    assert error(attend(q, folded)) <= 1.2 * error(attend(q, padded))
    _, lse = attend.with_lse(q, folded)
    assert float((lse.double() - expected_lse).abs().max()) < 5e-3


def rollout(
    transformer: WanTransformer3DModel,
    method: AttentionGuidance | None,
    attend: Attend,
    new_context: NewContext,
) -> Tensor:
    model = CausalWan(transformer)
    padding = method is None or method.negative_padding
    positive = prompt_keys(transformer, new_context([5]))
    negatives = [(prompt_keys(transformer, new_context([3], seed=1), padding=padding), 1.0)]
    steering = GuidanceState(attend, model.num_layers, method, positive, negatives)
    sampler = ChunkSampler(model, FlowMatchSchedule(8, [1000, 757]), 3, window=Window(9, 3))
    with install(transformer, steering):
        noise = SeededNoise([7], SHAPE, model.device)
        return torch.cat(list(sampler.stream(None, noise, num_frames=12)), dim=1).cpu()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name if method else "none")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
def test_the_generator_on_cuda_is_close_to_the_cpu_in_float32(
    new_wan: NewWan,
    new_context: NewContext,
    distance: Distance,
    method: AttentionGuidance | None,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    settings = {"num_attention_heads": 2, "attention_head_dim": 64}
    expected = rollout(new_wan(**settings), method, SdpaAttend(), new_context)
    actual = rollout(new_wan(**settings).to("cuda", dtype), method, SdpaAttend(), new_context)
    assert distance(actual, expected) < tolerance


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name if method else "none")
def test_the_generator_is_the_same_with_either_kernel(
    new_wan: NewWan,
    new_context: NewContext,
    distance: Distance,
    xformers_attend: Attend,
    method: AttentionGuidance | None,
) -> None:
    transformer = new_wan(num_attention_heads=2, attention_head_dim=64).to("cuda")
    expected = rollout(transformer, method, SdpaAttend(), new_context)
    assert distance(rollout(transformer, method, xformers_attend, new_context), expected) < 1e-4


def test_a_seed_is_the_same_noise_on_both_devices() -> None:
    for step in range(3):
        on_cpu, on_cuda = (SeededNoise([3, 4], SHAPE, device)(range(3, 6), step) for device in ("cpu", "cuda"))
        assert on_cuda.device.type == "cuda"
        assert torch.equal(on_cpu, on_cuda.cpu())


def test_free_memory_follows_what_is_taken() -> None:
    device = torch.device("cuda")
    before = available(device)
    assert before is not None
    taken = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    after = available(device)
    assert after is not None
    assert before - after >= taken.numel()


def test_the_bench_runs_and_knows_its_peak_memory() -> None:
    settings = BenchSettings(
        random_weights=True, layers=1, width=208, height=112, chunks=2, repeats=2, device="cuda",
        methods=("nasa-folded", "cfg"),
    )  # fmt: skip
    result = bench(settings)
    rows = {row["name"]: row for row in result["methods"]}
    assert result["order"] == "video by video"
    for row in rows.values():
        assert row["memory"]["peak_beside_weights"] >= row["memory"]["history"] + row["memory"]["text_keys"]
    peaks = [rows[name]["memory"]["peak_beside_weights"] for name in ("cfg", "nasa-folded")]
    assert peaks[0] > peaks[1]
