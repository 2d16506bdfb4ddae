"""Guided Wan layers against the formulas, computed here from what hooks see of diffusers' own projections."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

from causvid_adapter import CausalWan, ChunkSampler, FlowMatchSchedule, ModelCall, SeededNoise
from causvid_adapter.model import IMAGE_MODEL_TEXT_TOKENS
from nasa_video.backbones.wan import install, prompt_keys
from nasa_video.guidance.attention import FOLDED_TILE, SdpaAttend
from nasa_video.guidance.methods import AttentionGuidance, CentredNasa, Nag, Nasa, Vsf
from nasa_video.guidance.schedule import ScaleSchedule
from nasa_video.guidance.state import GuidanceState
from nasa_video.text import TextContext

Distance = Callable[[Tensor, Tensor], float]
NewWan = Callable[..., WanTransformer3DModel]
NewContext = Callable[..., TextContext]
NewLatents = Callable[..., Tensor]
HEADS = 2
SHAPE = (4, 4, 6)
METHODS: list[AttentionGuidance] = [
    Nasa(0.7),
    Nasa(0.7, negative_padding=False),
    CentredNasa(0.7),
    CentredNasa(0.4, conflict=1.5),
    CentredNasa(0.6, conflict=1.5, limit=0.05),
    CentredNasa(0.2, negative_padding=False),
    Nag(5.0),
    Nag(5.0, negative_padding=False),
    Vsf(1.3, bias=-0.2),
    Vsf(1.3, negative_padding=True),
]


def label(value: object) -> str:
    """A short name of a case."""
    if not isinstance(value, Nasa | CentredNasa | Nag | Vsf):
        return str(value)
    return f"{value.name}-{value.scale}-{'padding' if value.negative_padding else 'tokens'}"


@contextmanager
def seen(transformer: WanTransformer3DModel) -> Iterator[dict[tuple[int, str], Tensor]]:
    """Outputs of the cross-attention's projections, and what enters its output projection, by (layer, name)."""
    record: dict[tuple[int, str], Tensor] = {}
    hooks = []

    def keep(key: tuple[int, str]) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, given: Any, output: Tensor) -> None:
            record[key] = output

        return hook

    def keep_input(key: tuple[int, str]) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(module: nn.Module, given: tuple[Tensor]) -> None:
            record[key] = given[0]

        return hook

    for layer, block in enumerate(transformer.blocks):
        names = ["norm_q", "norm_k", "to_kv" if block.attn2.fused_projections else "to_v"]
        names += ["norm_added_k", "add_v_proj"] if block.attn2.add_k_proj is not None else []
        for name in names:
            hooks.append(getattr(block.attn2, name).register_forward_hook(keep((layer, name))))
        hooks.append(block.attn2.to_out[0].register_forward_pre_hook(keep_input((layer, "z"))))
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def heads(x: Tensor) -> Tensor:
    return x.double().unflatten(2, (HEADS, -1))


def keys_and_values(transformer: WanTransformer3DModel, embeds: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(k, v) of a prompt in every layer, from a run of the unguided model on it."""
    with seen(transformer) as record:
        transformer(torch.zeros(len(embeds), SHAPE[0], 1, *SHAPE[1:]), torch.zeros(len(embeds)), embeds)
    pairs = []
    for layer, block in enumerate(transformer.blocks):
        v = record[layer, "to_kv"].chunk(2, dim=-1)[1] if block.attn2.fused_projections else record[layer, "to_v"]
        pairs.append((heads(record[layer, "norm_k"]), heads(v)))
    return pairs


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention and its scores' exponential sums, sample by sample, over the first ``lengths`` keys only."""
    outputs, sums = [], []
    for sample in range(len(q)):
        count = k.shape[1] if lengths is None else int(lengths[sample])
        scores = torch.einsum("qhd,nhd->hqn", q[sample], k[sample, :count]) / math.sqrt(q.shape[-1])
        weights = scores.exp()
        total = weights.sum(dim=-1, keepdim=True)
        outputs.append(torch.einsum("hqn,nhd->qhd", weights / total, v[sample, :count]))
        sums.append(total.transpose(0, 1))
    return torch.stack(outputs), torch.stack(sums)


def by_hand(
    method: AttentionGuidance,
    q: Tensor,
    positive: tuple[Tensor, Tensor],
    negatives: Sequence[tuple[tuple[Tensor, Tensor], Tensor, float]],
) -> Tensor:
    z_pos, mass_pos = attention(q, *positive, None)
    branches = [attention(q, *kv, None if method.negative_padding else lengths) for kv, lengths, _ in negatives]
    weights = [weight for _, _, weight in negatives]
    together = max(1.0, sum(weights))
    if isinstance(method, Nasa):
        return z_pos - method.scale * sum(w / together * z for w, (z, _) in zip(weights, branches, strict=True))
    if isinstance(method, CentredNasa):
        _, v = negatives[0][0]
        empty = v[:, -1:]  # any softmax over a prompt of padding alone
        moved = z_pos
        for weight, (z, _) in zip(weights, branches, strict=True):
            added, said = z - empty, z_pos - empty
            contained = (said * added).sum(-1).clamp(min=0) / (added.square() + 0.01 * said.square()).sum(-1)
            even = torch.ones(())
            if method.limit is not None:
                length, own = (x.square().sum((-2, -1)).sqrt() for x in (z_pos, method.scale * added))
                even = (method.limit * length / own).clamp(max=1)[..., None, None]
                assert float((even < 1).float().mean()) > 0.1, "the limit is felt"
            share = even + method.conflict * contained[..., None]
            moved = moved - method.scale * weight * share * added
        return moved
    if isinstance(method, Nag):
        z_neg = sum(w / together * z for w, (z, _) in zip(weights, branches, strict=True))
        z_neg = z_neg + (1 - sum(weights) / together) * z_pos
        moved = z_pos + (method.scale - 1) * (z_pos - z_neg)
        ratio = moved.flatten(2).abs().sum(-1) / z_pos.flatten(2).abs().sum(-1)
        limited = moved * (ratio.clamp(max=method.tau) / ratio)[..., None, None]
        return method.alpha * limited + (1 - method.alpha) * z_pos
    assert isinstance(method, Vsf)
    masses = [mass * math.exp(method.bias) for _, mass in branches]
    flipped = sum(-method.scale * w * m * z for w, m, (z, _) in zip(weights, masses, branches, strict=True))
    return (mass_pos * z_pos + flipped) / (mass_pos + sum(masses))


def steering_of(
    transformer: WanTransformer3DModel,
    method: AttentionGuidance | None,
    positive: TextContext | None,
    negatives: Sequence[tuple[TextContext, float]],
    fold: bool = True,
) -> GuidanceState:
    padding = method is None or method.negative_padding
    return GuidanceState(
        SdpaAttend(),
        len(transformer.blocks),
        method,
        None if positive is None else prompt_keys(transformer, positive, fold=fold),
        [(prompt_keys(transformer, context, fold=fold, padding=padding), weight) for context, weight in negatives],
    )


def guided_run(
    transformer: WanTransformer3DModel, steering: GuidanceState, latents: Tensor, embeds: Tensor, **more: Any
) -> tuple[Tensor, dict[tuple[int, str], Tensor]]:
    with install(transformer, steering), seen(transformer) as record:
        timestep = torch.full((len(latents),), 500.0)
        flow = transformer(latents.transpose(1, 2), timestep, embeds, **more).sample.transpose(1, 2)
    return flow, record


def assert_guided_by_hand(
    transformer: WanTransformer3DModel,
    method: AttentionGuidance,
    positive: TextContext,
    negatives: Sequence[tuple[TextContext, float]],
    latents: Tensor,
    distance: Distance,
    **run: Any,
) -> None:
    kv_pos = keys_and_values(transformer, positive.embeds)
    kv_neg = [keys_and_values(transformer, context.embeds) for context, _ in negatives]
    own = run.pop("own_keys", True)
    steering = steering_of(transformer, method, positive if own else None, negatives, fold=run.pop("fold", True))
    _, record = guided_run(transformer, steering, latents, positive.embeds)
    for layer in range(len(transformer.blocks)):
        q = heads(record[layer, "norm_q"])
        rows = [(kv[layer], context.lengths, w) for kv, (context, w) in zip(kv_neg, negatives, strict=True)]
        expected = by_hand(method, q, kv_pos[layer], rows)
        assert distance(heads(record[layer, "z"]), expected) < 1e-5
        unguided, _ = attention(q, *kv_pos[layer], None)
        assert distance(expected, unguided) > 1e-2


@pytest.mark.parametrize("weights", [[1.0], [0.4], [1.0, 0.5], [0.2, 0.3]])
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_every_method_in_a_batch_with_several_negatives(
    new_wan: NewWan, new_context: NewContext, new_latents: NewLatents, distance: Distance,
    method: AttentionGuidance, weights: list[float],
) -> None:  # fmt: skip
    negatives = [(new_context([3 + row, 1 + row], seed=row + 1), weight) for row, weight in enumerate(weights)]
    assert_guided_by_hand(new_wan(), method, new_context([5, 2]), negatives, new_latents(2, batch=2), distance)


@pytest.mark.parametrize("own_keys", [True, False])
@pytest.mark.parametrize("fold", [True, False])
def test_keys_of_its_own_or_from_the_context_folded_or_not(
    new_wan: NewWan, new_context: NewContext, new_latents: NewLatents, distance: Distance, own_keys: bool, fold: bool
) -> None:
    negatives = [(new_context([3], seed=1), 1.0)]
    assert_guided_by_hand(
        new_wan(), Nasa(0.7), new_context([5]), negatives, new_latents(), distance, own_keys=own_keys, fold=fold
    )


@pytest.mark.parametrize("method", METHODS[::2], ids=label)
def test_with_a_lora_loaded(
    new_wan: NewWan, new_context: NewContext, new_latents: NewLatents, distance: Distance, method: AttentionGuidance
) -> None:
    transformer, latents = new_wan(), new_latents()
    positive, negative = new_context([5]), [(new_context([3], seed=1), 1.0)]
    before, _ = guided_run(transformer, steering_of(transformer, method, positive, negative), latents, positive.embeds)
    transformer.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    )
    assert_guided_by_hand(transformer, method, positive, negative, latents, distance)
    after, _ = guided_run(transformer, steering_of(transformer, method, positive, negative), latents, positive.embeds)
    assert distance(after, before) > 1e-2


@pytest.mark.parametrize("method", METHODS[::2], ids=label)
def test_with_fused_projections(
    new_wan: NewWan, new_context: NewContext, new_latents: NewLatents, distance: Distance, method: AttentionGuidance
) -> None:
    transformer, latents = new_wan(), new_latents()
    positive, negative = new_context([5]), [(new_context([3], seed=1), 1.0)]
    apart, _ = guided_run(transformer, steering_of(transformer, method, positive, negative), latents, positive.embeds)
    transformer.fuse_qkv_projections()
    assert transformer.blocks[0].attn2.fused_projections
    assert_guided_by_hand(transformer, method, positive, negative, latents, distance)
    fused, _ = guided_run(transformer, steering_of(transformer, method, positive, negative), latents, positive.embeds)
    assert distance(fused, apart) < 1e-5


def test_a_causal_model_with_fused_projections_is_itself(
    new_wan: NewWan, new_context: NewContext, new_latents: NewLatents, distance: Distance
) -> None:
    model, latents, embeds = CausalWan(new_wan()), new_latents(6), new_context([5]).embeds
    expected = model(latents, 500.0, embeds, frames_per_chunk=3)
    model.transformer.fuse_qkv_projections()
    assert distance(model(latents, 500.0, embeds, frames_per_chunk=3), expected) < 1e-5


def image_wan(new_wan: NewWan) -> WanTransformer3DModel:
    return new_wan(image_dim=12, added_kv_proj_dim=48)


@pytest.mark.parametrize("own_keys", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_the_image_attention_of_an_image_to_video_model_stays_positive(
    new_wan: NewWan, new_context: NewContext, new_latents: NewLatents, distance: Distance, own_keys: bool, fused: bool
) -> None:
    transformer = image_wan(new_wan)
    if fused:
        for block in transformer.blocks:
            block.attn2.fuse_projections()
    positive = new_context([5], tokens=IMAGE_MODEL_TEXT_TOKENS)
    negative = new_context([3], seed=1, tokens=IMAGE_MODEL_TEXT_TOKENS)
    image = torch.randn(1, 7, 12)
    kv_pos, kv_neg = (
        [tuple(x[:, -IMAGE_MODEL_TEXT_TOKENS:] for x in pair) for pair in keys_and_values(transformer, context.embeds)]
        for context in (positive, negative)
    )
    method = Nasa(0.7)
    steering = steering_of(transformer, method, positive if own_keys else None, [(negative, 1.0)])
    with torch.no_grad():
        embedded = transformer.condition_embedder.image_embedder(image)
    _, record = guided_run(transformer, steering, new_latents(), positive.embeds, encoder_hidden_states_image=image)
    for layer, block in enumerate(transformer.blocks):
        q = heads(record[layer, "norm_q"])
        attn = block.attn2
        image_kv = heads(attn.norm_added_k(attn.add_k_proj(embedded))), heads(attn.add_v_proj(embedded))
        expected = by_hand(method, q, kv_pos[layer], [(kv_neg[layer], negative.lengths, 1.0)])
        expected = expected + attention(q, *image_kv, None)[0]
        assert distance(heads(record[layer, "z"]), expected) < 1e-5


def test_an_image_to_video_model_as_a_causal_one_takes_its_keys_from_anywhere(
    new_wan: NewWan, new_context: NewContext, new_latents: NewLatents, distance: Distance
) -> None:
    model = CausalWan(image_wan(new_wan))
    context, image = new_context([5], tokens=IMAGE_MODEL_TEXT_TOKENS), torch.randn(1, 7, 12)
    expected = model(new_latents(), 500.0, context.embeds, image_context=image)
    assert distance(model(new_latents(), 500.0, context.embeds, image_context=-image), expected) > 1e-3
    with install(model.transformer, steering_of(model.transformer, None, context, [])):
        for embeds in (None, context.embeds):
            actual = model(new_latents(), 500.0, embeds, image_context=image)
            assert distance(actual, expected) < 1e-5
    with pytest.raises(ValueError, match="must have 512 tokens, got 8"):
        model(new_latents(), 500.0, new_context([5]).embeds, image_context=image)


def test_an_attention_mask_is_refused_and_not_ignored(new_wan: NewWan, new_context: NewContext) -> None:
    transformer, context = new_wan(), new_context([5])
    with install(transformer, steering_of(transformer, None, context, [])):
        attention2 = transformer.blocks[0].attn2
        with pytest.raises(NotImplementedError, match="not ignored"):
            attention2(torch.zeros(1, 6, 48), torch.zeros(1, 8, 48), attention_mask=torch.ones(1, 8))


def stream(model: CausalWan, steering: GuidanceState | None, embeds: Tensor | None, frames: int = 6) -> Tensor:
    def announce(call: ModelCall) -> None:
        if steering is not None:
            steering.call = call

    sampler = ChunkSampler(model, FlowMatchSchedule(8, [1000, 757]))
    noise = SeededNoise([7], SHAPE)
    return torch.cat(list(sampler.stream(embeds, noise, num_frames=frames, before_call=announce)), dim=1)


@pytest.mark.parametrize(
    "method",
    [None, Nasa(0), Nag(1), Nag(alpha=0), Vsf(0), Nasa(1, schedule=ScaleSchedule(last_step=0, clean_pass=False))],
    ids=label,
)
def test_a_method_that_is_switched_off_is_the_unguided_model_to_the_bit(
    new_wan: NewWan, new_context: NewContext, method: AttentionGuidance | None
) -> None:
    model, positive = CausalWan(new_wan()), new_context([5])
    unguided = stream(model, None, positive.embeds)
    steering = steering_of(model.transformer, method, positive, [(new_context([3], seed=1), 1.0)], fold=False)
    with install(model.transformer, steering):
        assert torch.equal(stream(model, steering, None), unguided)
    assert steering.meter.effect is None


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_without_negatives_every_method_is_the_unguided_model_to_the_bit(
    new_wan: NewWan, new_context: NewContext, method: AttentionGuidance
) -> None:
    model, positive = CausalWan(new_wan()), new_context([5])
    unguided = stream(model, None, positive.embeds)
    steering = steering_of(model.transformer, method, positive, [], fold=False)
    with install(model.transformer, steering):
        assert torch.equal(stream(model, steering, None), unguided)


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_guidance_comes_off_and_leaves_nothing_behind(
    new_wan: NewWan, new_context: NewContext, error: type[BaseException] | None
) -> None:
    model, positive = CausalWan(new_wan()), new_context([5])
    before = [block.attn2.processor for block in model.transformer.blocks]
    unguided = stream(model, None, positive.embeds)
    steering = steering_of(model.transformer, Nasa(0.7), positive, [(new_context([3], seed=1), 1.0)])

    def guide_and_fail() -> None:
        with install(model.transformer, steering):
            assert not torch.equal(stream(model, steering, None), unguided)
            if error is not None:
                raise error

    if error is None:
        guide_and_fail()
    else:
        with pytest.raises(error):
            guide_and_fail()
    assert all(block.attn2.processor is own for block, own in zip(model.transformer.blocks, before, strict=True))
    assert torch.equal(stream(model, None, positive.embeds), unguided)


def test_scopes_nest(new_wan: NewWan, new_context: NewContext) -> None:
    model, positive = CausalWan(new_wan()), new_context([5])
    outer = steering_of(model.transformer, Nasa(0.7), positive, [(new_context([3], seed=1), 1.0)])
    inner = steering_of(model.transformer, Nag(5.0), positive, [(new_context([3], seed=1), 1.0)])
    with install(model.transformer, outer):
        expected = stream(model, outer, None)
        with install(model.transformer, inner):
            assert not torch.equal(stream(model, inner, None), expected)
        assert torch.equal(stream(model, outer, None), expected)


def test_a_schedule_guides_the_layers_and_steps_that_it_names(new_wan: NewWan, new_context: NewContext) -> None:
    model, positive = CausalWan(new_wan()), new_context([5])
    schedule = ScaleSchedule(last_step=0.5, first_layer=0.5, clean_pass=False)
    steering = steering_of(model.transformer, Nasa(0.7, schedule=schedule), positive, [(new_context([3], seed=1), 1.0)])
    acted: list[tuple[int, int, bool]] = []
    add = steering.meter.add

    def note(guided: Any) -> None:
        assert steering.call is not None
        acted.append((steering.call.chunk, steering.call.step, steering.call.clean))
        add(guided)

    steering.meter.add = note  # type: ignore[method-assign]
    with install(model.transformer, steering):
        stream(model, steering, None)
        assert [steering.acts(layer) for layer in range(2)] == [False, False]
        steering.call = ModelCall(0, 0, 2, clean=False)
        assert [steering.acts(layer) for layer in range(2)] == [False, True]
    assert acted == [(0, 0, False), (1, 0, False)]


@pytest.mark.parametrize("lengths", [[5], [8], [0], [5, 8, 0, 1]], ids=label)
@pytest.mark.parametrize("method", [None, *METHODS], ids=label)
def test_folded_text_is_padded_text(
    new_wan: NewWan, new_context: NewContext, new_latents: NewLatents, distance: Distance,
    method: AttentionGuidance | None, lengths: list[int],
) -> None:  # fmt: skip
    transformer, positive = new_wan(), new_context(lengths)
    # Without padding an empty negative has no key at all and is refused.
    shortest = 0 if method is None or method.negative_padding else 1
    negative = new_context([max(length - 1, shortest) for length in lengths], seed=1)
    latents = new_latents(2, batch=len(lengths))
    folded, padded = (
        guided_run(
            transformer, steering_of(transformer, method, positive, [(negative, 1.0)], fold), latents, positive.embeds
        )[0]
        for fold in (True, False)
    )
    assert distance(folded, padded) < 1e-5


def test_folding_makes_text_keys_as_few_as_the_prompt_has_tokens(new_wan: NewWan, new_context: NewContext) -> None:
    tokens = 4 * FOLDED_TILE
    keys = prompt_keys(new_wan(), new_context([FOLDED_TILE, 2], tokens=tokens))
    assert [layer.k.shape[1] for layer in keys.layers] == [2 * FOLDED_TILE] * 2
    whole = prompt_keys(new_wan(), new_context([FOLDED_TILE, 2], tokens=tokens), fold=False)
    assert keys.num_bytes * 2 == whole.num_bytes


def test_the_padding_of_the_negative_is_a_setting_that_matters(
    new_wan: NewWan, new_context: NewContext, new_latents: NewLatents, distance: Distance
) -> None:
    transformer, positive, negative = new_wan(), new_context([5]), [(new_context([3], seed=1), 1.0)]
    flows = [
        guided_run(transformer, steering_of(transformer, method, positive, negative), new_latents(), positive.embeds)[0]
        for method in (Nasa(0.7), Nasa(0.7, negative_padding=False))
    ]
    assert distance(*flows) > 1e-2


@pytest.mark.parametrize("method", METHODS[::2], ids=label)
def test_every_sample_of_a_batch_is_guided_by_its_own_negative(
    new_wan: NewWan, new_context: NewContext, new_latents: NewLatents, distance: Distance, method: AttentionGuidance
) -> None:
    transformer, latents = new_wan(), new_latents(2, batch=2)
    positive, negative = new_context([5, 2]), new_context([3, 4], seed=1)
    together, _ = guided_run(
        transformer, steering_of(transformer, method, positive, [(negative, 1.0)]), latents, positive.embeds
    )
    for sample in range(2):
        one_pos, one_neg = (TextContext(c.embeds[[sample]], c.lengths[[sample]]) for c in (positive, negative))
        alone, _ = guided_run(
            transformer, steering_of(transformer, method, one_pos, [(one_neg, 1.0)]), latents[[sample]], one_pos.embeds
        )
        assert distance(together[[sample]], alone) < 1e-5


@pytest.mark.parametrize("method", METHODS[::2], ids=label)
def test_in_bfloat16_the_guided_model_is_near_its_float32_self(
    new_wan: NewWan, new_context: NewContext, distance: Distance, method: AttentionGuidance
) -> None:
    positive, negative = new_context([5]), [(new_context([3], seed=1), 1.0)]
    flows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = CausalWan(new_wan().to(dtype))
        steering = steering_of(model.transformer, method, positive, negative)
        with install(model.transformer, steering):
            flows.append(model(SeededNoise([7], SHAPE)(range(3), 0), 500.0, None, cache=model.new_cache(4, 6)))
        assert flows[-1].dtype == dtype
        assert steering.meter.effect is not None
        assert steering.meter.effect.relative_change > 0.05
    assert distance(flows[1].float(), flows[0]) < 0.05
