from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from causvid_adapter import ModelCall
from nasa_video.errors import InputError
from nasa_video.guidance.attention import SdpaAttend, TextKeys
from nasa_video.guidance.formulas import cfg, nag, nasa, projection_coefficient, shares, vsf
from nasa_video.guidance.methods import (
    METHODS,
    AttentionGuidance,
    CentredNasa,
    ClassifierFree,
    Guidance,
    Nag,
    Nasa,
    Vsf,
    parse_guidance,
)
from nasa_video.guidance.schedule import ScaleSchedule
from nasa_video.guidance.state import EffectMeter, GuidanceState, PromptKeys, check_negative
from nasa_video.guidance.terms import Negative
from nasa_video.video.request import VideoRequest

SHAPE = (2, 5, 3, 8)


def branches(seed: int = 0) -> tuple[Tensor, Tensor]:
    z_pos, z_neg = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed)).unbind()
    return z_pos, z_neg


def keys_of(count: int, seed: int) -> TextKeys:
    generator = torch.Generator().manual_seed(seed)
    return TextKeys(*(torch.randn(SHAPE[0], count, *SHAPE[2:], generator=generator) for _ in "kv"))


def test_nasa_is_equation_9() -> None:
    z_pos, z_neg = branches()
    assert torch.equal(nasa(z_pos, z_neg, scale=0.7), z_pos - 0.7 * z_neg)
    assert torch.equal(nasa(z_pos, z_neg, scale=0.0), z_pos)


def padded(keys: TextKeys, copies: float, seed: int = 9) -> TextKeys:
    """The keys and a padding token that stands for so many."""
    k, v = (torch.randn(1, 1, *SHAPE[2:], generator=torch.Generator().manual_seed(seed + part)) for part in range(2))
    more = [torch.cat([x, y.expand(len(x), -1, -1, -1)], 1) for x, y in ((keys.k, k), (keys.v, v))]
    bias = torch.zeros(SHAPE[0], 1, 1, more[0].shape[1])
    bias[..., -1] = math.log(copies)
    return TextKeys(*more, bias, padding_v=v)


def test_centred_nasa_subtracts_what_the_negatives_add_to_the_padding() -> None:
    q, positive = branches()[0], keys_of(4, 1)
    negatives = [(padded(keys_of(3, 2), 5), 0.7), (padded(keys_of(2, 3), 6), 1.0)]
    guided = CentredNasa(0.8)(q, positive, negatives, SdpaAttend())
    expected = SdpaAttend()(q, positive)
    for keys, weight in negatives:
        scores = torch.einsum("bqhd,bnhd->bhqn", q, keys.k) / math.sqrt(SHAPE[-1]) + keys.bias
        p = scores.softmax(-1)[..., :-1]
        values = keys.v[:, :-1] - keys.v[:, -1:]
        expected = expected - 0.8 * weight * torch.einsum("bhqn,bnhd->bqhd", p, values)
    torch.testing.assert_close(guided.z, expected, atol=1e-5, rtol=1e-5)


def test_centred_nasa_leaves_alone_where_the_negative_attends_to_its_padding() -> None:
    q, positive, negative = branches()[0], keys_of(4, 1), padded(keys_of(3, 2), 1e9)
    centred = CentredNasa(1.0)(q, positive, [(negative, 1.0)], SdpaAttend())
    torch.testing.assert_close(centred.z, centred.z_pos, atol=1e-5, rtol=1e-5)
    assert float(centred.negative_share) < 1e-5
    plain = Nasa(1.0)(q, positive, [(negative, 1.0)], SdpaAttend())
    torch.testing.assert_close(plain.z, plain.z_pos - negative.padding_v, atol=1e-5, rtol=1e-5)


def test_centred_nasa_rises_where_the_prompt_says_what_the_negative_names() -> None:
    """The attention's answers are given, so that what the prompt contains of the negative is known by construction."""
    empty, along, across = torch.zeros(3, 1, 1, 2, 4)
    empty[..., 0], along[..., 1], across[..., 2] = 1.0, 2.0, 3.0
    negative = replace(padded(keys_of(3, 2), 5), padding_v=empty)

    def subtracted(prompt: Tensor, scale: float = 0.5) -> Tensor:
        def attend(q: Tensor, keys: TextKeys) -> Tensor:
            return empty + (along if keys is negative else prompt)

        guided = CentredNasa(scale, conflict=2.0)(prompt, keys_of(4, 1), [(negative, 1.0)], attend)
        return (guided.z_pos - guided.z) / scale

    torch.testing.assert_close(subtracted(across), along)
    torch.testing.assert_close(subtracted(-along), along)
    for share in (0.5, 1.0):
        rise = subtracted(share * along + across) / along.clamp_min(1e-9)
        assert rise[..., 1].unique().item() == pytest.approx(1 + 2 * share, rel=0.05)
    torch.testing.assert_close(subtracted(along, 0.1), subtracted(along))


def test_centred_nasa_limits_what_does_not_rise() -> None:
    """Token by token, heads together: here one negative says nothing, little, a lot, and a lot that the prompt says."""
    padding = torch.zeros(1, 1, 2, 4)
    prompt, negative = torch.zeros(1, 4, 2, 4), torch.zeros(1, 4, 2, 4)
    prompt[..., 0], prompt[:, 3, 0, 1] = 1.0, 2.0  # lengths sqrt(2), and sqrt(6)
    negative[:, 1, 0, 2], negative[:, 2, :, 3], negative[:, 3, 0, 1] = 0.1, 5.0, 2.0
    keys = replace(padded(keys_of(3, 2), 5), padding_v=padding)

    def subtracted(**settings: float) -> Tensor:
        method = CentredNasa(0.5, **settings)
        guided = method(prompt, keys_of(4, 1), [(keys, 1.0)], lambda q, asked: negative if asked is keys else prompt)
        return guided.z_pos - guided.z

    lengths = subtracted(limit=0.3).norm(dim=(-2, -1))[0].tolist()
    assert lengths == pytest.approx([0, 0.05, 0.3 * 2**0.5, 0.3 * 6**0.5])
    torch.testing.assert_close(subtracted(limit=100.0), subtracted())
    assert not subtracted(limit=0.0).any()
    more = subtracted(limit=0.3, conflict=2.0) - subtracted(limit=0.3)
    torch.testing.assert_close(more, subtracted(conflict=2.0) - subtracted()), "the rise has none"
    assert more[:, 3].norm() > 1.9 > 0.2 > more[:, :3].norm()


def test_what_the_prompt_says_already_is_nothing_where_the_negative_finds_nothing() -> None:
    prompt = torch.randn(2, 5, 3, 4)
    for tiny in (0.0, 1e-6, 1e-3):
        assert (projection_coefficient(prompt, tiny * prompt) * tiny).max() < 0.1 * (
            projection_coefficient(prompt, prompt)
        ).max()
    assert projection_coefficient(prompt, prompt).min() > 0.98
    assert projection_coefficient(prompt, -prompt).max() == 0


def test_centred_nasa_says_so_where_prompts_are_not_padded() -> None:
    with pytest.raises(InputError, match=r"not pad its prompts with one token.*use nasa"):
        CentredNasa()(branches()[0], keys_of(4, 1), [(keys_of(3, 2), 1.0)], SdpaAttend())


def test_nag_is_its_four_equations_token_by_token() -> None:
    z_pos, z_neg = branches()
    scale, tau, alpha = 6.0, 2.5, 0.25
    actual = nag(z_pos, z_neg, scale=scale, tau=tau, alpha=alpha)
    clipped = 0
    for sample in range(SHAPE[0]):
        for token in range(SHAPE[1]):
            pos, neg = z_pos[sample, token], z_neg[sample, token]
            phi = scale - 1
            extrapolated = pos + phi * (pos - neg)
            ratio = float(extrapolated.abs().sum() / pos.abs().sum())
            clipped += ratio > tau
            limited = extrapolated * min(ratio, tau) / ratio
            assert torch.allclose(actual[sample, token], alpha * limited + (1 - alpha) * pos, atol=1e-5)
    assert clipped


def test_nag_leaves_what_is_within_tau() -> None:
    z_pos, z_neg = branches()
    loose = nag(z_pos, z_neg, scale=2, tau=100, alpha=1)
    assert torch.allclose(loose, 2 * z_pos - z_neg)


def test_nag_of_nothing_is_nothing() -> None:
    zero = torch.zeros(SHAPE)
    assert torch.equal(nag(zero, zero, scale=4, tau=2.5, alpha=0.25), zero)


def test_cfg_runs_from_the_negative_through_the_positive() -> None:
    v_pos, v_neg = branches()
    assert torch.equal(cfg(v_pos, v_neg, scale=0), v_neg)
    assert torch.allclose(cfg(v_pos, v_neg, scale=1), v_pos, atol=1e-6)
    assert torch.allclose(cfg(v_pos, v_neg, scale=3), v_pos + 2 * (v_pos - v_neg), atol=1e-5)


@given(scale=st.floats(0, 5), bias=st.floats(-3, 3), weights=st.lists(st.floats(0.1, 3), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_vsf_is_one_softmax_over_all_keys_with_the_negatives_values_flipped(
    scale: float, bias: float, weights: list[float]
) -> None:
    q = branches()[0]
    positive = keys_of(4, 1)
    negatives = [(keys_of(2 + index, 10 + index), weight) for index, weight in enumerate(weights)]
    guided = Vsf(scale=scale, bias=bias)(q, positive, negatives, SdpaAttend())

    k = torch.cat([positive.k, *(keys.k for keys, _ in negatives)], dim=1)
    v = torch.cat([positive.v, *(-scale * weight * keys.v for keys, weight in negatives)], dim=1)
    scores = torch.einsum("bqhd,bnhd->bhqn", q, k) / math.sqrt(SHAPE[-1])
    scores[..., 4:] += bias
    attention = scores.softmax(dim=-1)
    expected = torch.einsum("bhqn,bnhd->bqhd", attention, v)
    assert torch.allclose(guided.z, expected, atol=1e-5)
    assert float(guided.negative_share) == pytest.approx(float(attention[..., 4:].sum(-1).mean()), abs=1e-5)


def test_vsf_gate_without_negative_mass_is_the_positive() -> None:
    z_pos, z_neg = branches()
    lse = torch.zeros(*SHAPE[:3], 1)
    assert torch.equal(vsf(z_pos, z_neg, lse, lse - 1000, scale=2.0), z_pos)


@given(st.lists(st.floats(1e-3, 100), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_shares_keep_their_ratios_and_never_sum_to_more_than_one(weights: list[float]) -> None:
    parts = shares([(keys_of(1, 0), weight) for weight in weights])
    assert sum(parts) <= 1 + 1e-9
    assert all(part <= weight for part, weight in zip(parts, weights, strict=True))
    assert all(a * weights[0] == pytest.approx(b * parts[0]) for a, b in zip(parts, weights, strict=True))
    if sum(weights) <= 1:
        assert parts == weights
    else:
        assert sum(parts) == pytest.approx(1)


@pytest.mark.parametrize("method", [Nasa(0.8), Nag(), Vsf(1.2)])
def test_the_same_negative_twice_is_that_negative_once(method: AttentionGuidance) -> None:
    q, positive, negative = branches()[0], keys_of(4, 1), keys_of(3, 2)
    once = method(q, positive, [(negative, 1.0)], SdpaAttend())
    if isinstance(method, Vsf):  # one prompt of twice the keys has twice the mass
        method = Vsf(method.scale, bias=-math.log(2))
    twice = method(q, positive, [(negative, 1.0), (negative, 1.0)], SdpaAttend())
    assert torch.allclose(once.z, twice.z, atol=1e-5)
    assert float(once.negative_share) == pytest.approx(float(twice.negative_share), abs=1e-5)


@pytest.mark.parametrize("method", [Nasa(0.8), Nag(scale=4), Vsf(1.2)])
def test_a_lighter_negative_changes_less(method: AttentionGuidance) -> None:
    q, positive, negative = branches()[0], keys_of(4, 1), keys_of(3, 2)

    def change(weight: float) -> float:
        guided = method(q, positive, [(negative, weight)], SdpaAttend())
        return float((guided.z - guided.z_pos).norm())

    assert 0 < change(0.1) < change(0.4) < change(1.0)


def test_shares_of_the_negative_are_between_none_and_all() -> None:
    q, positive, negative = branches()[0], keys_of(4, 1), [(keys_of(3, 2), 1.0)]
    z_pos, z_neg = (SdpaAttend()(q, keys) for keys in (positive, negative[0][0]))
    length_pos, length_neg = (float(z.flatten(-2).norm(dim=-1).mean()) for z in (z_pos, z_neg))
    share = float(Nasa(0.5)(q, positive, negative, SdpaAttend()).negative_share)
    assert share == pytest.approx(0.5 * length_neg / (0.5 * length_neg + length_pos), rel=1e-5)
    share = float(Nag(3.0)(q, positive, negative, SdpaAttend()).negative_share)
    assert share == pytest.approx(2 * length_neg / (2 * length_neg + 3 * length_pos), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "active"),
    [(Nasa(0), False), (Nasa(0.1), True), (CentredNasa(0), False), (CentredNasa(0.1), True),
     (Nag(1), False), (Nag(alpha=0), False), (Nag(), True), (Vsf(0), False),
     (Vsf(1), True), (ClassifierFree(1), False), (ClassifierFree(2), True)],
)  # fmt: skip
def test_settings_that_make_a_method_the_identity_are_not_active(method: Guidance, active: bool) -> None:
    assert method.active is active


@pytest.mark.parametrize("method", list(METHODS.values()))
@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf, 101.0])
def test_scales_out_of_range_are_refused(method: type[Guidance], scale: float) -> None:
    with pytest.raises(InputError, match="scale must be a number from"):
        method(scale=scale)


def test_other_numbers_out_of_range_are_refused() -> None:
    for wrong in (lambda: Nag(tau=0.5), lambda: Nag(alpha=1.5), lambda: Vsf(bias=math.nan), lambda: Nag(scale=0.5)):
        with pytest.raises(InputError, match="must be a number from"):
            wrong()


@pytest.mark.parametrize(
    ("text", "weight"), [("", 1.0), (" \n", 1.0), ("blurry", 0.0), ("blurry", math.nan), ("blurry", -1.0)]
)
def test_a_negative_that_cannot_act_is_refused(text: str, weight: float) -> None:
    with pytest.raises(InputError):
        Negative(text, weight)


def test_a_negative_without_tokens_or_equal_to_a_prompt_is_refused() -> None:
    check_negative("blurry", 1, ["a ball", "a cat"])
    with pytest.raises(InputError, match="no token"):
        check_negative("…", 0, ["a ball"])
    with pytest.raises(InputError, match="is the prompt itself"):
        check_negative("A  Cat", 2, ["a ball", "a cat "])


@pytest.mark.parametrize("bounds", [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0)])
def test_a_schedule_that_runs_backwards_is_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="first <= last"):
        ScaleSchedule(first_step=bounds[0], last_step=bounds[1])
    with pytest.raises(InputError, match="first <= last"):
        ScaleSchedule(first_layer=bounds[0], last_layer=bounds[1])


@given(cut=st.floats(0, 1), total=st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_two_halves_of_a_schedule_cover_every_step_and_layer(cut: float, total: int) -> None:
    early, late = ScaleSchedule(last_step=cut), ScaleSchedule(first_step=cut)
    shallow, deep = ScaleSchedule(last_layer=cut), ScaleSchedule(first_layer=cut)
    for index in range(total):
        on_the_cut = (index + 0.5) / total == cut
        steps = early.factor(index, total, False, 0, 1) + late.factor(index, total, False, 0, 1)
        layers = shallow.factor(0, 1, False, index, total) + deep.factor(0, 1, False, index, total)
        assert steps == layers == (2 if on_the_cut else 1)


def test_the_first_quarter_of_four_steps_is_the_first_and_the_clean_pass_has_its_own_switch() -> None:
    first = ScaleSchedule(last_step=0.25)
    assert [first.factor(step, 4, False, 0, 2) for step in range(4)] == [1, 0, 0, 0]
    assert first.factor(4, 4, True, 0, 2) == 1
    assert ScaleSchedule(clean_pass=False).factor(4, 4, True, 0, 2) == 0


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((), [1, 1, 1, 1, 1]), ((0.5,), [0.5] * 5), ((1, 0), [1, 0.75, 0.5, 0.25, 0]), ((0, 1, 0), [0, 0.5, 1, 0.5, 0])],
)
def test_shares_of_the_scale_lie_on_a_line_between_its_points(shares: tuple[float, ...], expected: list[float]) -> None:
    over_steps, over_layers = ScaleSchedule(step_scales=shares), ScaleSchedule(layer_scales=shares)
    assert [over_steps.factor(step, 5, False, 0, 3) for step in range(5)] == pytest.approx(expected)
    assert [over_layers.factor(0, 3, False, layer, 5) for layer in range(5)] == pytest.approx(expected)
    assert over_steps.factor(5, 5, True, 0, 3) == expected[-1], "the clean pass has the last step's share"
    assert over_steps.factor(0, 1, False, 0, 1) == expected[0]
    assert (over_steps.over_steps, over_steps.over_layers) == (bool(shares), False)
    assert (over_layers.over_steps, over_layers.over_layers) == (False, bool(shares))


def test_shares_of_step_and_layer_are_multiplied_and_bounded() -> None:
    both = ScaleSchedule(step_scales=(1, 0), layer_scales=(0, 1), last_layer=0.7)
    assert both.factor(1, 3, False, 1, 3) == pytest.approx(0.25)
    assert both.factor(0, 3, False, 2, 3) == 0
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="from 0 to 1"):
            ScaleSchedule(step_scales=(1, share))


@pytest.mark.parametrize("method", [Nasa(0.8), Nag(5.0), Vsf(1.2)], ids=lambda method: method.name)
def test_a_share_of_a_method_lies_between_nothing_and_the_whole(method: AttentionGuidance) -> None:
    q, positive, negative = branches()[0], keys_of(4, 1), [(keys_of(3, 2), 1.0)]
    assert method.scaled(1.0) is method
    whole, half, none = (method.scaled(share)(q, positive, negative, SdpaAttend()) for share in (1.0, 0.5, 0.0))
    assert not method.scaled(0.0).active
    change = [(guided.z - guided.z_pos).norm() for guided in (none, half, whole)]
    assert change[1] < change[2]
    if method.name != "vsf":  # whose gate takes from the positive branch at any scale
        assert change[0] < 1e-6


def test_steering_follows_the_shares_of_steps_and_layers() -> None:
    negative = [(PromptKeys((keys_of(3, 2),) * 3), 1.0)]
    schedule = ScaleSchedule(step_scales=(1, 0), layer_scales=(0, 1))
    steering = GuidanceState(SdpaAttend(), 3, Nasa(0.8, schedule=schedule), None, negative)
    steering.call = ModelCall(chunk=0, step=1, num_steps=3, clean=False)
    scales = [None if method is None else method.scale for method in steering.methods]  # type: ignore[attr-defined]
    assert scales == [None, pytest.approx(0.2), pytest.approx(0.4)]
    q, positive = branches()[0], keys_of(4, 1)
    expected = Nasa(0.4)(q, positive, [(keys_of(3, 2), 1.0)], SdpaAttend()).z
    torch.testing.assert_close(steering.guide(2, q, positive), expected)
    steering.call = ModelCall(chunk=0, step=3, num_steps=3, clean=True)
    assert not any(steering.acts(layer) for layer in range(3))


def test_steering_acts_only_with_a_method_that_does_and_a_negative() -> None:
    negative = [(PromptKeys((keys_of(3, 2),)), 1.0)]
    steering = GuidanceState(SdpaAttend(), 1)
    assert not steering.acts(0)
    steering.guidance = Nasa(1.0)
    assert not steering.acts(0)
    steering.negatives = negative
    assert steering.acts(0)
    steering.guidance = Nasa(0.0)
    assert not steering.acts(0)
    steering.guidance = None
    assert not steering.acts(0)


def test_the_meter_averages_what_layers_did() -> None:
    meter = EffectMeter()
    assert meter.effect is None
    q, positive, negative = branches()[0], keys_of(4, 1), [(keys_of(3, 2), 1.0)]
    changes, parts = [], []
    for scale in (0.5, 1.0):
        guided = Nasa(scale)(q, positive, negative, SdpaAttend())
        meter.add(guided)
        change = (guided.z - guided.z_pos).flatten(-2).norm(dim=-1) / guided.z_pos.flatten(-2).norm(dim=-1)
        changes.append(float(change.mean()))
        parts.append(float(guided.negative_share))
    assert meter.effect is not None
    assert meter.effect.relative_change == pytest.approx(sum(changes) / 2, rel=1e-5)
    assert meter.effect.negative_share == pytest.approx(sum(parts) / 2, rel=1e-5)
    meter.reset()
    assert meter.effect is None


@pytest.mark.parametrize(
    "method",
    [
        Nasa(0.8, schedule=ScaleSchedule(step_scales=(1, 0.5), layer_scales=(0, 1))),
        CentredNasa(),
        CentredNasa(0.5, conflict=2.0, limit=0.3),
        Nag(),
        Vsf(),
        ClassifierFree(),
    ],
    ids=lambda method: method.name,
)
def test_a_stored_method_comes_back_from_json_equal(method: Guidance) -> None:
    stored = VideoRequest(guidance=method)
    read = VideoRequest.model_validate_json(stored.model_dump_json())
    assert parse_guidance(read.guidance, {method.name: {"scale": 7.0}}) == method, "whatever the model's settings are"
