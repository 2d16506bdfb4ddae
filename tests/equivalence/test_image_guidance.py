"""Guidance in classic pipelines against a plain computation from q, k, v that hooks capture."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import image_tiny as tiny

from nasa_video import Nag, Nasa, Negative, ScaleSchedule, Vsf, guided
from nasa_video.backbones.base import NegativeContext
from nasa_video.guidance.methods import AttentionGuidance, GuidedAttention
from nasa_video.guidance.schedule import EVERYWHERE

CROSS = ["pixart", "sd", "sdxl", "wan"]
ALL = [*CROSS, "flux"]
NEGATIVE = "blurry"


@dataclass(frozen=True)
class Unchanged(AttentionGuidance):
    """Guidance that acts and gives back the positive branch: our layers must then be diffusers' own."""

    name: ClassVar[str] = "unchanged"

    def __call__(self, q: Tensor, positive: Any, negatives: Sequence[Any], attend: Any) -> GuidedAttention:
        z = attend(q, positive)
        return GuidedAttention(z, z, torch.zeros(()))


class Capture:
    """Outputs of to_q, to_k, to_v and inputs of to_out of every text cross-attention layer, in the last call."""

    def __init__(self, model: Any) -> None:
        self.layers = [m for n, m in model.named_modules() if n.endswith("attn2")]
        self.seen: list[dict[str, Tensor]] = [{} for _ in self.layers]
        self._hooks: list[Any] = []

    def __enter__(self) -> Capture:
        for attn, seen in zip(self.layers, self.seen, strict=True):
            for name in ("to_q", "to_k", "to_v"):
                hook = lambda m, a, out, seen=seen, name=name: seen.__setitem__(name, out.detach())  # noqa: E731
                self._hooks.append(getattr(attn, name).register_forward_hook(hook))
            out = lambda m, args, seen=seen: seen.__setitem__("out", args[0].detach())  # noqa: E731
            self._hooks.append(attn.to_out[0].register_forward_pre_hook(out))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()


def heads(attn: Any, x: Tensor, norm: str | None = None) -> Tensor:
    own = getattr(attn, norm, None) if norm else None
    if own is not None and hasattr(attn, "add_k_proj"):  # Wan norms over all heads
        x = own(x)
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def scores(attn: Any, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    q, k = heads(attn, q, "norm_q"), heads(attn, k, "norm_k")
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return s if mask is None else s.masked_fill(~mask[:, None, None, :], -math.inf)


def merge(z: Tensor) -> Tensor:
    return z.transpose(1, 2).flatten(2)


def text_masks(pipe: Any, kind: str, *prompts: str) -> list[Tensor | None]:
    if kind != "pixart":
        return [None] * len(prompts)
    length = tiny.CALLS["pixart"]["max_sequence_length"]
    tokens = pipe.tokenizer(list(prompts), padding="max_length", max_length=length, return_tensors="pt")
    return list(tokens.attention_mask.bool()[:, None])


def captured(pipe: Any, kind: str, prompt: str, guidance: AttentionGuidance | None = None, **call: Any) -> Capture:
    with Capture(tiny.denoiser(pipe)) as capture:
        if guidance is None:
            tiny.draw(pipe, kind, prompt, **call)
        else:
            with guided(pipe, NEGATIVE, guidance):
                tiny.draw(pipe, kind, prompt, **call)
    return capture


def expected(attn: Any, guidance: Any, q: Tensor, pos: dict[str, Tensor], neg: dict[str, Tensor], masks: Any) -> Tensor:
    s_pos, s_neg = (scores(attn, q, text["to_k"], mask) for text, mask in zip((pos, neg), masks, strict=True))
    v_pos, v_neg = (heads(attn, text["to_v"]) for text in (pos, neg))
    if isinstance(guidance, Vsf):
        joined = torch.cat([s_pos, s_neg + guidance.bias], dim=-1).softmax(-1)
        return merge(joined @ torch.cat([v_pos, -guidance.scale * v_neg], dim=2))
    z_pos, z_neg = merge(s_pos.softmax(-1) @ v_pos), merge(s_neg.softmax(-1) @ v_neg)
    if isinstance(guidance, Nasa):
        return z_pos - guidance.scale * z_neg
    far = guidance.scale * z_pos - (guidance.scale - 1) * z_neg
    ratio = far.abs().sum(-1, keepdim=True) / z_pos.abs().sum(-1, keepdim=True)
    far = far * ratio.clamp(max=guidance.tau) / ratio
    return guidance.alpha * far + (1 - guidance.alpha) * z_pos


GUIDANCES = [Nasa(0.7), Nag(), Vsf(1.5, bias=0.3, negative_padding=True)]


@pytest.mark.parametrize("guidance", GUIDANCES, ids=lambda g: g.name)
@pytest.mark.parametrize("kind", CROSS)
def test_every_layer_is_the_formula(kind: str, guidance: Any) -> None:
    pipe = tiny.PIPES[kind]()
    masks = text_masks(pipe, kind, "a fox", NEGATIVE)
    negative = captured(pipe, kind, NEGATIVE)
    run = captured(pipe, kind, "a fox", guidance)
    assert len(run.layers) >= 2
    for attn, seen, other in zip(run.layers, run.seen, negative.seen, strict=True):
        wanted = expected(attn, guidance, seen["to_q"], seen, other, masks)
        torch.testing.assert_close(seen["out"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_identities(kind: str) -> None:
    pipe = tiny.PIPES[kind]()
    plain = tiny.draw(pipe, kind)
    for negatives, guidance in ((NEGATIVE, Nasa(0.0)), ("", Nasa(1.0)), (None, None), (NEGATIVE, Nag(scale=1.0))):
        with guided(pipe, negatives, guidance) as scope:
            assert torch.equal(tiny.draw(pipe, kind), plain)
        assert scope.effect is None
    with guided(pipe, NEGATIVE, Nasa(0.5)) as scope:
        assert not torch.equal(tiny.draw(pipe, kind), plain)
    assert scope.effect is not None
    assert scope.effect.relative_change > 0.01
    assert torch.equal(tiny.draw(pipe, kind), plain)


@pytest.mark.parametrize("kind", ALL)
def test_layers_are_diffusers_own(kind: str) -> None:
    pipe = tiny.PIPES[kind]()
    plain = tiny.draw(pipe, kind)
    with guided(pipe, NEGATIVE, Unchanged()):  # type: ignore[arg-type]
        torch.testing.assert_close(tiny.draw(pipe, kind), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_comes_off_after_an_exception(kind: str) -> None:
    pipe = tiny.PIPES[kind]()
    model = tiny.denoiser(pipe)
    before = dict(model.attn_processors)
    calls = 0

    def fail_late(module: Any, args: Any) -> None:
        nonlocal calls
        assert any(model.attn_processors[name] is not own for name, own in before.items())
        calls += 1
        if calls == 2:
            raise ZeroDivisionError

    handle = model.register_forward_pre_hook(fail_late)
    with pytest.raises(ZeroDivisionError), guided(pipe, NEGATIVE, Nasa(0.5)):
        tiny.draw(pipe, kind)
    handle.remove()
    assert all(model.attn_processors[name] is own for name, own in before.items())
    assert "encode_prompt" not in vars(pipe)
    assert "cache_context" not in vars(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def noise_of(kind: str, count: int) -> Tensor:
    shape = {"flux": (16, 64), "wan": (16, 2, 2, 2)}.get(kind, (4, 8, 8))
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ALL)
def test_every_sample_of_a_batch_is_guided(kind: str) -> None:
    pipe = tiny.PIPES[kind]()
    prompts = ["a fox", "a hen, red"]
    number = "num_videos_per_prompt" if kind == "wan" else "num_images_per_prompt"
    noise = noise_of(kind, 4)
    with guided(pipe, NEGATIVE, Nasa(0.6)):
        together = tiny.draw(pipe, kind, prompts, latents=noise, num_inference_steps=1, **{number: 2})
        for row in range(4):
            one = {"latents": noise[row : row + 1], "num_inference_steps": 1}  # later steps add noise by batch
            alone = tiny.draw(pipe, kind, prompts[row // 2], **one)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_negative_keeps_its_own_mask() -> None:
    pipe = tiny.pixart_pipe()
    embeds, mask, *_ = pipe.encode_prompt(NEGATIVE, False, max_sequence_length=12)
    noisy = torch.where(mask.bool()[..., None], embeds, torch.randn(embeds.shape))
    with guided(pipe, NegativeContext(embeds, mask), Nasa(0.5)):
        clean = tiny.draw(pipe, "pixart")
    with guided(pipe, NegativeContext(noisy, mask), Nasa(0.5)):
        assert torch.equal(tiny.draw(pipe, "pixart"), clean)
    with guided(pipe, NegativeContext(noisy), Nasa(0.5)):
        assert not torch.equal(tiny.draw(pipe, "pixart"), clean)
    with guided(pipe, NEGATIVE, Nasa(0.5)):
        torch.testing.assert_close(tiny.draw(pipe, "pixart"), clean)


def outputs(pipe: Any, kind: str, **call: Any) -> list[Tensor]:
    """What the denoiser gives in each call of one run."""
    seen: list[Tensor] = []
    handle = tiny.denoiser(pipe).register_forward_hook(lambda m, a, out: seen.append(out[0].detach().clone()))
    tiny.draw(pipe, kind, num_inference_steps=1, **call)
    handle.remove()
    return seen


@pytest.mark.parametrize("kind", ALL)
def test_classifier_free_guidance_beside_it(kind: str) -> None:
    pipe = tiny.PIPES[kind]()
    scale = {"true_cfg_scale": 3.0} if kind == "flux" else {"guidance_scale": 3.0}
    call = {**scale, "negative_prompt": "ugly"}
    plain, alone = outputs(pipe, kind, **call), outputs(pipe, kind)
    with guided(pipe, NEGATIVE, Nasa(0.6)):
        both = outputs(pipe, kind, **call)
        guided_alone = outputs(pipe, kind)
    if kind in ("flux", "wan"):
        (conditional, unconditional), (_, was) = both, plain
    else:
        (unconditional, conditional), (was, _) = both[0].chunk(2), plain[0].chunk(2)
    torch.testing.assert_close(unconditional, was, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(conditional, guided_alone[0], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(conditional, alone[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_several_weighted_negatives(kind: str) -> None:
    pipe = tiny.PIPES[kind]()
    with guided(pipe, NEGATIVE, Nasa(0.6)):
        one = tiny.draw(pipe, kind)
    with guided(pipe, [Negative(NEGATIVE, 1.0), Negative(NEGATIVE, 1.0)], Nasa(0.6)):
        torch.testing.assert_close(tiny.draw(pipe, kind), one, rtol=1e-4, atol=1e-5)
    with guided(pipe, Negative(NEGATIVE, 0.5), Nasa(1.2)):
        torch.testing.assert_close(tiny.draw(pipe, kind), one, rtol=1e-4, atol=1e-5)
    with guided(pipe, [NEGATIVE, Negative("ugly", 0.5)], Nasa(0.6)):
        assert not torch.allclose(tiny.draw(pipe, kind), one, rtol=1e-3, atol=1e-4)


def mixed(attn: Any, guidance: Any, q: Tensor, texts: Sequence[dict[str, Tensor]], masks: Any, weights: Any) -> Tensor:
    """Several negatives: for NASA and NAG one branch that is their weighted mean, for VSF one prompt of all keys."""
    found = [scores(attn, q, text["to_k"], mask) for text, mask in zip(texts, masks, strict=True)]
    values = [heads(attn, text["to_v"]) for text in texts]
    if isinstance(guidance, Vsf):
        flipped = [-guidance.scale * w * v for w, v in zip(weights, values[1:], strict=True)]
        joined = torch.cat([found[0], *(s + guidance.bias for s in found[1:])], dim=-1).softmax(-1)
        return merge(joined @ torch.cat([values[0], *flipped], dim=2))
    z_pos, *branches = (merge(s.softmax(-1) @ v) for s, v in zip(found, values, strict=True))
    z_neg = sum(w * z for w, z in zip(weights, branches, strict=True)) / sum(weights)
    if isinstance(guidance, Nasa):
        return z_pos - guidance.scale * z_neg
    far = guidance.scale * z_pos - (guidance.scale - 1) * z_neg
    ratio = far.abs().sum(-1, keepdim=True) / z_pos.abs().sum(-1, keepdim=True)
    return guidance.alpha * far * ratio.clamp(max=guidance.tau) / ratio + (1 - guidance.alpha) * z_pos


@pytest.mark.parametrize("guidance", GUIDANCES, ids=lambda g: g.name)
@pytest.mark.parametrize("kind", ["pixart", "sd"])
def test_several_negatives_are_the_formula(kind: str, guidance: Any) -> None:
    pipe = tiny.PIPES[kind]()
    masks = text_masks(pipe, kind, "a fox", NEGATIVE, "ugly, red")
    texts = [captured(pipe, kind, text).seen for text in (NEGATIVE, "ugly, red")]
    with Capture(tiny.denoiser(pipe)) as run, guided(pipe, [NEGATIVE, Negative("ugly, red", 0.5)], guidance):
        tiny.draw(pipe, kind)
    for layer, (attn, seen) in enumerate(zip(run.layers, run.seen, strict=True)):
        own = [seen, *(text[layer] for text in texts)]
        wanted = mixed(attn, guidance, seen["to_q"], own, masks, (1.0, 0.5))
        torch.testing.assert_close(seen["out"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_schedule_of_steps_and_layers(kind: str) -> None:
    pipe = tiny.PIPES[kind]()
    noise = noise_of(kind, 1)
    plain, firsts = tiny.draw(pipe, kind, latents=noise), []
    for schedule in (ScaleSchedule(last_step=0.5), EVERYWHERE, ScaleSchedule(last_layer=0.5)):
        seen: list[Tensor] = []
        handle = tiny.denoiser(pipe).register_forward_hook(lambda m, a, out, seen=seen: seen.append((a, out[0])))
        with guided(pipe, NEGATIVE, Nasa(0.6, schedule=schedule)):
            result = tiny.draw(pipe, kind, latents=noise)
        handle.remove()
        assert not torch.equal(result, plain)
        firsts.append((seen[0][1], result))
    assert torch.equal(firsts[0][0], firsts[1][0])  # the first step is guided either way
    assert not torch.equal(firsts[0][1], firsts[1][1])  # the second is not
    assert not torch.equal(firsts[2][0], firsts[1][0])


def add_lora(model: Any, targets: Sequence[str]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, lora_alpha=2, target_modules=list(targets), init_lora_weights=False)
    inject_adapter_in_model(config, model, "a")  # PixArt's transformer has no add_adapter of its own


@pytest.mark.parametrize("kind", CROSS)
def test_lora_also_changes_the_negative(kind: str) -> None:
    pipe = tiny.PIPES[kind]()
    masks = text_masks(pipe, kind, "a fox", NEGATIVE)
    add_lora(tiny.denoiser(pipe), ["to_q", "to_k", "to_v"])
    name = "attention_kwargs" if kind == "wan" else "cross_attention_kwargs"
    for call in ({},) if kind == "pixart" else ({}, {name: {"scale": 0.3}}):  # PixArt's pipeline takes no scale
        negative, run = captured(pipe, kind, NEGATIVE, **call), captured(pipe, kind, "a fox", Nasa(0.7), **call)
        for attn, seen, other in zip(run.layers, run.seen, negative.seen, strict=True):
            wanted = expected(attn, Nasa(0.7), seen["to_q"], seen, other, masks)
            torch.testing.assert_close(seen["out"], wanted, rtol=1e-5, atol=1e-5)


def test_a_published_few_step_lora_of_wan(tmp_path: Path) -> None:
    """A step distillation LoRA in its published naming, through the pipeline's own loader."""
    from safetensors.torch import save_file

    pipe = tiny.wan_pipe()
    plain = tiny.draw(pipe, "wan")
    g, state = torch.Generator().manual_seed(0), {}
    for part in ("self_attn", "cross_attn"):
        for name in "qkvo":
            for block in range(2):
                key = f"diffusion_model.blocks.{block}.{part}.{name}"
                state[f"{key}.lora_down.weight"] = torch.randn(2, 24, generator=g)
                state[f"{key}.lora_up.weight"] = torch.randn(24, 2, generator=g)
                state[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "few_steps.safetensors")
    pipe.load_lora_weights(str(tmp_path), weight_name="few_steps.safetensors")
    assert not torch.allclose(tiny.draw(pipe, "wan"), plain)
    negative, run = captured(pipe, "wan", NEGATIVE), captured(pipe, "wan", "a fox", Nasa(0.7))
    for attn, seen, other in zip(run.layers, run.seen, negative.seen, strict=True):
        wanted = expected(attn, Nasa(0.7), seen["to_q"], seen, other, (None, None))
        # weights of order one make numbers of order ten, and the last digits with them
        torch.testing.assert_close(seen["out"], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    pipe = tiny.PIPES[kind]()
    noise = noise_of(kind, 1)
    with guided(pipe, NEGATIVE, Nasa(0.5)):
        full = tiny.draw(pipe, kind, num_inference_steps=1, latents=noise)
    pipe.to(dtype)
    with guided(pipe, NEGATIVE, Nasa(0.5)) as scope:
        half = tiny.draw(pipe, kind, num_inference_steps=1, latents=noise.to(dtype))
    assert scope.effect is not None
    assert (half.float() - full).norm() / full.norm() < 0.05


def smallest(kind: str) -> Any:
    """A pipeline whose denoiser has as few layers as its class allows: compiling is slow."""
    pipe = tiny.PIPES[kind]()
    torch.manual_seed(1)
    if kind == "sd":
        blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
        pipe.unet = tiny.unet(**blocks, block_out_channels=(8,), mid_block_type=None, norm_num_groups=2)
    elif kind == "flux":
        pipe.transformer = tiny.flux_transformer(num_layers=1, num_single_layers=1)
    elif kind == "pixart":
        pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
    else:
        pipe.transformer.blocks = pipe.transformer.blocks[:1]
    return pipe


@pytest.mark.parametrize("kind", ["pixart", "sd", "flux", "wan"])
def test_compiles_without_a_graph_break(kind: str) -> None:
    pipe = smallest(kind)
    with guided(pipe, NEGATIVE, Nasa(0.5)) as scope:
        eager = tiny.draw(pipe, kind, num_inference_steps=1)
    effect = scope.effect
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    torch._dynamo.reset()
    setattr(pipe, name, torch.compile(getattr(pipe, name), backend="eager", fullgraph=True))
    with guided(pipe, NEGATIVE, Nasa(0.5)) as scope:
        torch.testing.assert_close(tiny.draw(pipe, kind, num_inference_steps=1), eager, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    assert scope.effect is not None
    assert effect is not None
    assert scope.effect.relative_change == pytest.approx(effect.relative_change, rel=1e-3)
