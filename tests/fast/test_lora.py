"""LoRA files in every naming change the weights by exactly scale * alpha / rank * B A."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from causvid_adapter import CausalWan, CheckpointError
from causvid_adapter.lora import merge_lora

DIM = 48
RANK = 4
FFN = 40
WAN_NAMES = {
    **{f"self_attn.{p}": f"attn1.to_{p}" for p in "qkv"},
    **{f"cross_attn.{p}": f"attn2.to_{p}" for p in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def _factors() -> dict[str, tuple[Tensor, Tensor]]:
    """Wan's module name to (A, B), for both layers."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sizes = dict.fromkeys(WAN_NAMES, (DIM, DIM)) | {"ffn.0": (DIM, FFN), "ffn.2": (FFN, DIM)}
    return {
        f"blocks.{i}.{name}": (draw(RANK, fan_in), draw(fan_out, RANK))
        for i in range(2)
        for name, (fan_in, fan_out) in sizes.items()
    }


def _diffusers_name(name: str) -> str:
    for wan, diffusers in WAN_NAMES.items():
        name = name.replace(wan, diffusers)
    return name


def _state(naming: str) -> tuple[dict[str, Tensor], float]:
    """A file's contents and the alpha / rank that it means."""
    state: dict[str, Tensor] = {}
    for name, (a, b) in _factors().items():
        if naming == "diffusers":
            state[f"transformer.{_diffusers_name(name)}.lora_A.weight"] = a
            state[f"transformer.{_diffusers_name(name)}.lora_B.weight"] = b
        elif naming == "comfy":
            state[f"diffusion_model.{name}.lora_down.weight"] = a
            state[f"diffusion_model.{name}.lora_up.weight"] = b
            state[f"diffusion_model.{name}.alpha"] = torch.tensor(2.0)
        elif naming == "kohya":
            flat = "lora_unet_" + name.replace(".", "_")
            state[f"{flat}.lora_down.weight"] = a
            state[f"{flat}.lora_up.weight"] = b
            state[f"{flat}.alpha"] = torch.tensor(2.0)
        else:
            state[f"base_model.model.model._fsdp_wrapped_module.{name}.lora_A.default.weight"] = a
            state[f"base_model.model.model._fsdp_wrapped_module.{name}.lora_B.default.weight"] = b
    return state, 2.0 / RANK if naming in ("comfy", "kohya") else 1.0


@pytest.mark.parametrize("naming", ["diffusers", "comfy", "kohya", "peft"])
@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_every_naming_is_merged_with_its_scale(
    new_wan: Callable[..., WanTransformer3DModel], tmp_path: Path, naming: str, scale: float
) -> None:
    model = CausalWan(new_wan())
    before = {name: value.clone() for name, value in model.transformer.state_dict().items()}
    state, alpha_over_rank = _state(naming)
    if naming == "peft":
        path = tmp_path / "lora.pt"
        torch.save({"generator_lora": state}, path)
    else:
        path = tmp_path / "lora.safetensors"
        save_file(state, path)
    merge_lora(model, path, scale)
    after = model.transformer.state_dict()
    assert after.keys() == before.keys(), "no adapter is left behind"
    changed = {f"{_diffusers_name(name)}.weight": (a, b) for name, (a, b) in _factors().items()}
    for name, value in after.items():
        expected = before[name]
        if name in changed:
            a, b = changed[name]
            expected = expected + scale * alpha_over_rank * b @ a
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_whole_differences_are_added_where_they_belong(
    new_wan: Callable[..., WanTransformer3DModel], tmp_path: Path
) -> None:
    # As in the LoRAs that were extracted from CausVid and Self-Forcing: low rank, biases, norms, and what lies outside
    # of the blocks; a bias without a weight too.
    state, _ = _state("comfy")
    config = new_wan().config
    places = {
        "blocks.0.self_attn.q.diff_b": ("blocks.0.attn1.to_q.bias", DIM),
        "blocks.1.cross_attn.o.diff_b": ("blocks.1.attn2.to_out.0.bias", DIM),
        "blocks.0.ffn.0.diff_b": ("blocks.0.ffn.net.0.proj.bias", FFN),
        "blocks.0.norm3.diff": ("blocks.0.norm2.weight", DIM),
        "blocks.0.norm3.diff_b": ("blocks.0.norm2.bias", DIM),
        "blocks.1.self_attn.norm_k.diff": ("blocks.1.attn1.norm_k.weight", DIM),
        "time_projection.1.diff_b": ("condition_embedder.time_proj.bias", 6 * DIM),
        "text_embedding.0.diff_b": ("condition_embedder.text_embedder.linear_1.bias", DIM),
        "head.head.diff_b": ("proj_out.bias", 4 * config.out_channels),
        "patch_embedding.diff_b": ("patch_embedding.bias", DIM),
    }
    for key, (_, size) in places.items():
        state[f"diffusion_model.{key}"] = torch.linspace(1, 2, size)
    head = (torch.randn(RANK, DIM), torch.randn(4 * config.out_channels, RANK))
    state["diffusion_model.head.head.lora_down.weight"], state["diffusion_model.head.head.lora_up.weight"] = head
    save_file(state, tmp_path / "lora.safetensors")
    model = CausalWan(new_wan())
    before = {name: value.clone() for name, value in model.transformer.state_dict().items()}
    merge_lora(model, tmp_path / "lora.safetensors", 0.5)
    after = model.transformer.state_dict()
    for place, size in places.values():
        torch.testing.assert_close(after[place], before[place] + 0.5 * torch.linspace(1, 2, size), msg=place)
    torch.testing.assert_close(after["proj_out.weight"], before["proj_out.weight"] + 0.5 * head[1] @ head[0])
    low_rank = {f"{_diffusers_name(name)}.weight" for name in _factors()}
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == low_rank | {place for place, _ in places.values()} | {"proj_out.weight"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"blocks.0.self_attn.q.weight": torch.ones(2)}, "holds no LoRA weights"),
        (lambda s: {k.replace("blocks.1", "blocks.7"): v for k, v in s.items()}, "LoRA of another model"),
        (lambda s: {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in s.items()}, "another size of model"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_model_alone(
    new_wan: Callable[..., WanTransformer3DModel],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    model = CausalWan(new_wan())
    before = {name: value.clone() for name, value in model.transformer.state_dict().items()}
    save_file(change(_state("diffusers")[0]), tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match=message):
        merge_lora(model, tmp_path / "lora.safetensors")
    after = model.transformer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
