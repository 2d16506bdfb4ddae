"""Guidance in FLUX against a plain second forward pass, written out here with one softmax over explicit scores."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import image_tiny as tiny

from nasa_video import Nag, Nasa, ScaleSchedule, Vsf, guided
from nasa_video.backbones.base import NegativeContext
from nasa_video.backbones.joint import JoinedKeys, NegativeMass, PositiveMass, WholeOutput, default_joint
from nasa_video.errors import InputError
from nasa_video.guidance.attention import SdpaAttend, TextKeys
from nasa_video.guidance.fused_lse import SMALL_SCORES, fused_with_lse

L, S = 6, 16  # text and image tokens


def inputs(seed: int = 0, batch: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(S, 3)
    ids[:, 1], ids[:, 2] = torch.arange(S) // 4, torch.arange(S) % 4
    return {
        "hidden_states": torch.randn(batch, S, 64, generator=g),
        "encoder_hidden_states": torch.randn(batch, L, tiny.TEXT_DIM, generator=g),
        "pooled_projections": torch.randn(batch, tiny.TEXT_DIM, generator=g),
        "timestep": torch.full((batch,), 0.7),
        "img_ids": ids,
        "txt_ids": torch.zeros(L, 3),
    }


def negative(seed: int, weight: float = 1.0, mask: Tensor | None = None) -> NegativeContext:
    g = torch.Generator().manual_seed(seed)
    embeds, pooled = torch.randn(1, L, tiny.TEXT_DIM, generator=g), torch.randn(1, tiny.TEXT_DIM, generator=g)
    return NegativeContext(embeds, mask, pooled, weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos[None, None] + turned * sin[None, None]


def qkv(attn: Any, x: Tensor, rope: tuple[Tensor, Tensor], added: bool) -> tuple[Tensor, ...]:
    names = ("add_q_proj", "add_k_proj", "add_v_proj") if added else ("to_q", "to_k", "to_v")
    q, k, v = (getattr(attn, name)(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for name in names)
    norm_q, norm_k = (attn.norm_added_q, attn.norm_added_k) if added else (attn.norm_q, attn.norm_k)
    return rotate(norm_q(q), *rope), rotate(norm_k(k), *rope), v


def softmax_parts(q: Tensor, keys: list[Tensor]) -> tuple[Tensor, ...]:
    """Attention weights over several groups of keys in one softmax."""
    scores = torch.cat([q @ k.transpose(-1, -2) for k in keys], dim=-1) / math.sqrt(q.shape[-1])
    return scores.softmax(-1).split([k.shape[2] for k in keys], dim=-1)


def guide(formula: str, q: Tensor, pos: Any, neg: Any, image: Any, scale: float) -> Tensor:
    p_text, p_image = softmax_parts(q, [pos[0], image[0]])
    n_text, n_image = softmax_parts(q, [neg[0], image[0]])
    (n_alone,) = softmax_parts(q, [neg[0]])
    z = p_text @ pos[1] + p_image @ image[1]
    merged = lambda x: x.transpose(1, 2).flatten(2)  # noqa: E731
    if formula == "F1":
        return merged(z - scale * (n_text @ neg[1] + n_image @ image[1]))
    if formula == "F2":
        return merged(z - scale * n_text @ neg[1])
    if formula == "F3":
        return merged(z - scale * p_text.sum(-1, keepdim=True) * (n_alone @ neg[1]))
    if formula == "VSF":
        a, b, c = softmax_parts(q, [pos[0], image[0], neg[0]])
        return merged(a @ pos[1] + b @ image[1] - scale * c @ neg[1])
    z, other = merged(z), merged(n_text @ neg[1] + n_image @ image[1])
    far = 4 * z - 3 * other
    ratio = far.abs().sum(-1, keepdim=True) / z.abs().sum(-1, keepdim=True)
    return 0.25 * far * ratio.clamp(max=2.5) / ratio + 0.75 * z


def reference(model: Any, formula: str, scale: float, other: NegativeContext) -> Tensor:
    """FLUX with one image stream and two text streams, slowly."""
    given = inputs()
    x = model.x_embedder(given["hidden_states"])
    embeds = [given["encoder_hidden_states"], other.embeds.expand(2, -1, -1)]
    pooled = [given["pooled_projections"], other.pooled.expand(2, -1)]
    text = [model.context_embedder(e) for e in embeds]
    temb = [model.time_text_embed(given["timestep"] * 1000, p) for p in pooled]
    cos, sin = model.pos_embed(torch.cat([given["txt_ids"], given["img_ids"]]))
    rope_t, rope_i = (cos[:L], sin[:L]), (cos[L:], sin[L:])

    def attend(q: Tensor, own: Any, image: Any) -> Tensor:
        a, b = softmax_parts(q, [own[0], image[0]])
        return (a @ own[1] + b @ image[1]).transpose(1, 2).flatten(2)

    for block in model.transformer_blocks:
        xn, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1(x, emb=temb[0])
        q_i, *image = qkv(block.attn, xn, rope_i, False)
        norms = [block.norm1_context(t, emb=e) for t, e in zip(text, temb, strict=True)]
        parts = [qkv(block.attn, n[0], rope_t, True) for n in norms]
        z = guide(formula, q_i, parts[0][1:], parts[1][1:], image, scale)
        x = x + gate[:, None] * block.attn.to_out[0](z)
        x = x + gate_mlp[:, None] * block.ff(block.norm2(x) * (1 + scale_mlp[:, None]) + shift_mlp[:, None])
        for i, (_, gate, shift, factor, gate_mlp) in enumerate(norms):
            out = block.attn.to_add_out(attend(parts[i][0], parts[i][1:], image))
            text[i] = text[i] + gate[:, None] * out
            inner = block.norm2_context(text[i]) * (1 + factor[:, None]) + shift[:, None]
            text[i] = text[i] + gate_mlp[:, None] * block.ff_context(inner)
    for block in model.single_transformer_blocks:
        xn, gate = block.norm(x, emb=temb[0])
        q_i, *image = qkv(block.attn, xn, rope_i, False)
        norms = [block.norm(t, emb=e) for t, e in zip(text, temb, strict=True)]
        parts = [qkv(block.attn, n[0], rope_t, False) for n in norms]
        z = guide(formula, q_i, parts[0][1:], parts[1][1:], image, scale)
        x = x + gate[:, None] * block.proj_out(torch.cat([z, block.act_mlp(block.proj_mlp(xn))], -1))
        for i, (tn, gate) in enumerate(norms):
            out = attend(parts[i][0], parts[i][1:], image)
            text[i] = text[i] + gate[:, None] * block.proj_out(torch.cat([out, block.act_mlp(block.proj_mlp(tn))], -1))
    return model.proj_out(model.norm_out(x, temb[0]))


CASES = {
    "F1": (Nasa(0.4), WholeOutput(), 0.4),
    "F2": (Nasa(1.1), NegativeMass(), 1.1),
    "F3": (Nasa(0.6), PositiveMass(), 0.6),
    "NAG": (Nag(), WholeOutput(), 0.0),
    "VSF": (Vsf(1.3, negative_padding=True), JoinedKeys(), 1.3),
}


def model() -> Any:
    torch.manual_seed(0)
    return tiny.flux_transformer().requires_grad_(False)


@pytest.mark.parametrize("formula", CASES)
@torch.no_grad()
def test_formula_is_a_plain_two_stream_pass(formula: str) -> None:
    flux = model()
    guidance, joint, scale = CASES[formula]
    with guided(flux, negative(1), guidance, joint=joint):
        ours = flux(**inputs()).sample
    torch.testing.assert_close(ours, reference(flux, formula, scale, negative(1)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, flux(**inputs()).sample, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_lora_also_changes_the_negatives_stream() -> None:
    from peft import LoraConfig

    flux = model()
    with guided(flux, negative(1), Nasa(0.6)):
        before = flux(**inputs()).sample
    torch.manual_seed(1)
    targets = ["to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "proj_mlp", "ff_context.net.2"]
    flux.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    with guided(flux, negative(1), Nasa(0.6)):
        ours = flux(**inputs()).sample
    assert not torch.allclose(ours, before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours, reference(flux, "F2", 0.6, negative(1)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_several_negatives_share_the_scale() -> None:
    """In one layer: F3 with two negatives subtracts the weighted mean of their text outputs."""
    q, attend = keys(9, 11).k, SdpaAttend()
    pos, image = keys(1, 5), keys(3, 11)
    negatives = [(keys(2, 4), 1.0), (keys(4, 6), 0.5)]
    (z_text, lse_text), (z_image, lse_image) = attend.with_lse(q, pos), attend.with_lse(q, image)
    mass = torch.sigmoid(lse_text - lse_image)
    mean = (attend(q, negatives[0][0]) + 0.5 * attend(q, negatives[1][0])) / 1.5
    z = PositiveMass()(Nasa(0.7), q, pos, negatives, image, attend).z
    torch.testing.assert_close(z, mass * (z_text - 0.7 * mean) + (1 - mass) * z_image)


def keys(seed: int, tokens: int) -> TextKeys:
    g = torch.Generator().manual_seed(seed)
    return TextKeys(torch.randn(2, tokens, 3, 8, generator=g), torch.randn(2, tokens, 3, 8, generator=g))


def test_f1_is_f2_less_the_image() -> None:
    q, attend, alpha = keys(9, 11).k, SdpaAttend(), 0.3
    pos, neg, image = keys(1, 5), keys(2, 4), keys(3, 11)
    f1, f2 = (f(Nasa(alpha), q, pos, [(neg, 1.0)], image, attend).z for f in (WholeOutput(), NegativeMass()))
    (z_image, lse_image), (_, lse_neg) = attend.with_lse(q, image), attend.with_lse(q, neg)
    mass = torch.sigmoid(lse_neg - lse_image)
    torch.testing.assert_close(f1, f2 - alpha * (1 - mass) * z_image)


def test_all_formulas_share_the_positive_output() -> None:
    q, attend = keys(9, 11).k, SdpaAttend()
    pos, neg, image = keys(1, 5), keys(2, 4), keys(3, 11)
    plain = attend(q, TextKeys(torch.cat([pos.k, image.k], 1), torch.cat([pos.v, image.v], 1)))
    for formula in (WholeOutput(), NegativeMass(), PositiveMass()):
        guided_layer = formula(Nasa(0.5), q, pos, [(neg, 1.0)], image, attend)
        torch.testing.assert_close(guided_layer.z_pos, plain)


def test_f3_does_not_count_the_negatives_padding() -> None:
    """Repeating a negative's keys doubles its mass (F2) and changes nothing in F3."""
    q, attend = keys(9, 11).k, SdpaAttend()
    pos, neg, image = keys(1, 5), keys(2, 4), keys(3, 11)
    twice = TextKeys(neg.k.repeat(1, 2, 1, 1), neg.v.repeat(1, 2, 1, 1))
    for formula, same in ((PositiveMass(), True), (NegativeMass(), False)):
        a, b = (formula(Nasa(0.5), q, pos, [(n, 1.0)], image, attend).z for n in (neg, twice))
        assert torch.allclose(a, b, atol=1e-5) is same


@torch.no_grad()
def test_masked_padding_takes_no_part() -> None:
    flux, mask = model(), torch.tensor([[True, True, False, False, False, False]])
    guidance = Nasa(0.5, negative_padding=False)
    with guided(flux, negative(1, mask=mask), guidance):
        masked = flux(**inputs()).sample
    with guided(flux, negative(1), guidance):
        assert not torch.allclose(flux(**inputs()).sample, masked, rtol=1e-3, atol=1e-4)
    with guided(flux, negative(1), Nasa(0.5)):
        padded = flux(**inputs()).sample
    with guided(flux, negative(1, mask=mask), Nasa(0.5)):
        assert torch.equal(flux(**inputs()).sample, padded)


@torch.no_grad()
def test_some_layers_and_fused_projections() -> None:
    flux = model()
    with guided(flux, negative(1), Nasa(0.5, schedule=ScaleSchedule(first_layer=0.5, last_layer=0.75))):
        some = flux(**inputs()).sample
    with guided(flux, negative(1), Nasa(0.5)):
        every = flux(**inputs()).sample
    assert not torch.allclose(some, every, rtol=1e-3, atol=1e-4)
    flux.fuse_qkv_projections()
    for block in (*flux.transformer_blocks, *flux.single_transformer_blocks):
        assert block.attn.fused_projections
    with guided(flux, negative(1), Nasa(0.5)):
        torch.testing.assert_close(flux(**inputs()).sample, every, rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    flux = model()
    with pytest.raises(InputError, match="pooled"), guided(flux, torch.zeros(1, L, tiny.TEXT_DIM), Nasa(0.5)):
        pass
    for guidance, joint in ((Vsf(), WholeOutput()), (Nag(), NegativeMass()), (Nasa(), JoinedKeys())):
        with pytest.raises(InputError), guided(flux, negative(1), guidance, joint=joint):
            pass
    long = NegativeContext(torch.zeros(1, L + 1, tiny.TEXT_DIM), pooled=torch.zeros(1, tiny.TEXT_DIM))
    with pytest.raises(InputError, match="max_sequence_length"), guided(flux, long, Nasa(0.5)):
        flux(**inputs())
    assert not flux.context_embedder._forward_hooks
    assert default_joint(Nasa()) == NegativeMass()
    assert default_joint(Nag()) == WholeOutput()
    assert default_joint(Vsf()) == JoinedKeys()


@pytest.mark.parametrize("biased", [False, True])
def test_fused_log_sum_exp_is_the_explicit_one(biased: bool) -> None:
    g = torch.Generator().manual_seed(0)
    queries = SMALL_SCORES // (2 * 3 * 40) + 8
    q = torch.randn(2, queries, 3, 16, generator=g)
    k, v = torch.randn(2, 40, 3, 16, generator=g), torch.randn(2, 40, 3, 16, generator=g)
    bias = torch.where(torch.arange(40) < 30, 0.0, -math.inf)[None, None, None].expand(2, 1, 1, 40) if biased else None
    fused = fused_with_lse(q, k, v, bias)
    assert fused is not None
    scores = torch.einsum("bqhd,bnhd->bqhn", q, k) / 4 + (0 if bias is None else bias[:, :, 0, :][:, :, None])
    out = torch.einsum("bqhn,bnhd->bqhd", scores.softmax(-1), v)
    torch.testing.assert_close(fused[0], out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused[1], scores.logsumexp(-1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert fused_with_lse(q[:, :8], k, v, bias) is None
