from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from causvid_adapter import CheckpointError, checkpoint, load_generator
from causvid_adapter.checkpoint import build_transformer, describe, infer_config, read_state_dict, unwrap

NewWan = Callable[..., WanTransformer3DModel]


class Code:
    """What a malicious pickle holds."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.trace}",)


def config_of(model: WanTransformer3DModel) -> dict[str, Any]:
    return dict(model.config)


def saved(state: dict[str, Tensor], folder: Path) -> Path:
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"


def test_dtype_and_device_and_eval_mode(new_wan: NewWan, tmp_path: Path) -> None:
    model = new_wan()
    loaded = load_generator(saved(model.state_dict(), tmp_path), config_of(model), dtype=torch.bfloat16)
    assert loaded.dtype == loaded.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    # diffusers keeps its sensitive parts in float32.
    assert loaded.transformer.scale_shift_table.dtype == torch.float32
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("image", [{}, {"image_dim": 12, "added_kv_proj_dim": 128, "pos_embed_seq_len": 4}])
def test_sizes_are_read_off_the_weights(new_wan: NewWan, image: dict[str, Any]) -> None:
    model = new_wan(num_attention_heads=1, attention_head_dim=128, out_channels=3, **image)
    rebuilt = build_transformer(model.state_dict())
    assert {**infer_config(model.state_dict())}.items() <= config_of(model).items()
    for name, value in model.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], value)


def test_a_width_that_heads_of_128_do_not_divide_asks_for_a_config(new_wan: NewWan, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"width 48 .* give the config"):
        load_generator(saved(new_wan().state_dict(), tmp_path))


def test_a_config_file_and_wans_own_names_are_understood(new_wan: NewWan, tmp_path: Path) -> None:
    model = new_wan()
    path = saved(model.state_dict(), tmp_path)
    own = {"model_type": "t2v", "dim": 48, "num_heads": 2, "in_dim": 4, "out_dim": 4, "text_dim": 10, "freq_dim": 16,
           "ffn_dim": 40, "num_layers": 2, "eps": 1e-6, "text_len": 8, "patch_size": [1, 2, 2]}  # fmt: skip
    (tmp_path / "own.json").write_text(json.dumps(own))
    (tmp_path / "diffusers.json").write_text(json.dumps(config_of(model)))
    for config in (own, tmp_path / "own.json", str(tmp_path / "diffusers.json")):
        assert load_generator(path, config).transformer.config.attention_head_dim == 24


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_layer": 2}, r"unknown config entries \['num_layer'\]"),
        ({"inner_dim": 2}, r"unknown config entries \['inner_dim'\]"),
        ({"dim": 48, "num_heads": 2, "layers": 3}, r"unknown config entries \['layers'\]"),
        ({"dim": 48}, "num_heads"),
        ({"dim": 48, "num_heads": 5}, "num_heads that divides dim = 48"),
    ],
)
def test_config_entries_that_are_wrong_are_refused(
    new_wan: NewWan, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        load_generator(saved(new_wan().state_dict(), tmp_path), config)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "\udcff"])
def test_config_files_that_are_broken_are_refused(new_wan: NewWan, tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_generator(saved(new_wan().state_dict(), tmp_path), tmp_path / "config.json")


def test_missing_extra_and_misshaped_keys_are_listed(new_wan: NewWan, tmp_path: Path) -> None:
    model = new_wan()
    state = dict(model.state_dict())
    gone = [name for name in state if ".attn2.to_k." in name or ".attn2.to_v." in name]
    for name in gone:
        del state[name]
    state["blocks.0.extra.weight"] = torch.zeros(1)
    state["proj_out.bias"] = torch.zeros(7)
    with pytest.raises(CheckpointError) as caught:
        load_generator(saved(state, tmp_path), config_of(model))
    message = str(caught.value)
    assert f"{len(gone)} missing: {', '.join(sorted(gone)[:4])}, …" in message
    assert sorted(gone)[4] not in message
    assert "1 unknown: blocks.0.extra.weight" in message
    assert "1 of another shape: proj_out.bias (7,) instead of (16,)" in message
    assert "a Wan transformer of width 48 with 2 layers" in message


def test_a_folder_with_missing_weights_is_not_filled_with_random_ones(new_wan: NewWan, tmp_path: Path) -> None:
    model = new_wan()
    model.save_pretrained(tmp_path / "wan")
    state = {name: value for name, value in model.state_dict().items() if "attn2.to_k" not in name}
    save_file(state, tmp_path / "wan" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"4 missing: blocks\.0\.attn2\.to_k\.bias"):
        load_generator(tmp_path / "wan")


def test_folders_of_something_else_are_refused(new_vae: Callable[..., AutoencoderKLWan], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    new_vae().save_pretrained(tmp_path / "vae")
    for name in ("empty", "vae"):
        with pytest.raises(CheckpointError, match=name):
            load_generator(tmp_path / name)


def lora_state() -> dict[str, Tensor]:
    return {f"blocks.0.self_attn.q.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}


@pytest.mark.parametrize(
    ("state", "looks_like"),
    [
        (lora_state(), "a LoRA"),
        ({"transformer." + name: value for name, value in lora_state().items()}, "a LoRA"),
        ({"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, "Stable Diffusion"),
        ({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, "FLUX"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(1)}, "a T5 text encoder"),
        ({"caption_projection.linear_1.weight": torch.zeros(1)}, "PixArt"),
        ({}, "an empty state dict"),
        ({"a": torch.zeros(1), "b": torch.zeros(1)}, "something with 2 tensors such as a, b"),
    ],
)
def test_files_of_other_models_are_called_by_their_name(
    state: dict[str, Tensor], looks_like: str, tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=f"looks like .*{looks_like}"):
        load_generator(tmp_path / "model.pt")


def test_a_vae_is_called_one(new_vae: Callable[..., AutoencoderKLWan], tmp_path: Path) -> None:
    path = saved(new_vae().state_dict(), tmp_path)
    with pytest.raises(CheckpointError, match="looks like a Wan VAE"):
        load_generator(path)
    assert describe({"decoder.upsamples.0.residual.0.gamma": torch.zeros(1)}) == "a Wan VAE"


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_truncated_file_asks_for_a_whole_one(new_wan: NewWan, tmp_path: Path, ending: str, kept: float) -> None:
    whole = tmp_path / f"whole.{ending}"
    state = dict(new_wan().state_dict())
    torch.save({"generator": state}, whole) if ending == "pt" else save_file(state, whole)
    path = tmp_path / f"cut.{ending}"
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * kept)])
    with pytest.raises(CheckpointError, match="download"):
        load_generator(path)


@pytest.mark.parametrize("content", [b"", b"hello, this is a text file\n" * 40, b"<!DOCTYPE html><html>", b"\x00" * 99])
@pytest.mark.parametrize("ending", ["pt", "safetensors", "bin"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, ending: str, content: bytes) -> None:
    path = tmp_path / f"file.{ending}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"file\."):
        load_generator(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_named_and_not_run(tmp_path: Path, zipped: bool) -> None:
    trace = tmp_path / "trace"
    torch.save({"generator": Code(trace)}, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"could run code \(posix\.system\)") as caught:
        load_generator(tmp_path / "evil.pt")
    assert "weights_only" not in str(caught.value)
    assert not trace.exists()


def test_a_bare_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Code(trace), protocol=2))
    with pytest.raises(CheckpointError):
        load_generator(tmp_path / "evil.pt")
    assert not trace.exists()


def test_a_whole_pickled_module_or_a_list_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        load_generator(tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        read_state_dict(tmp_path / "list.pt")


def test_a_path_that_does_not_exist_is_no_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "hf_hub_download", lambda *given: pytest.fail("the hub was asked"))
    for path in ("nowhere.pt", "folder/nowhere.pt", "owner/name/folder", Path("owner/name/model.pt")):
        with pytest.raises(CheckpointError, match="does not exist"):
            load_generator(path)


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(repository: str, file: str) -> str:
        assert (repository, file) == ("owner/name", "folder/model.pt")
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(checkpoint, "hf_hub_download", unreachable)
    with pytest.raises(CheckpointError, match=r"cannot be reached .* give its path"):
        load_generator("owner/name/folder/model.pt")


def test_unwrap_takes_the_ema_and_every_wrapper_off() -> None:
    ema = {"model._fsdp_wrapped_module._orig_mod.blocks.0._checkpoint_wrapped_module.norm3.weight": torch.ones(1)}
    stale = {"model.blocks.0.norm3.weight": torch.zeros(1)}
    assert unwrap({"generator": stale, "generator_ema": ema}) == {"blocks.0.norm3.weight": torch.ones(1)}
    assert unwrap({"state_dict": {"generator": stale}}).keys() == {"blocks.0.norm3.weight"}
    assert unwrap({"generator": stale, "generator_ema": None, "step": 3}) == {"blocks.0.norm3.weight": torch.zeros(1)}
    assert unwrap({"module.model.diffusion_model.head.head.bias": torch.ones(1)}).keys() == {"head.head.bias"}
