"""UMT5 from transformers' folder or from Wan's original ``models_t5_umt5-xxl-enc-bf16.pth``."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from causvid_adapter.checkpoint import read_state_dict, unwrap
from nasa_video.errors import InputError

# Wan's own name of a block's part to transformers' name.
_PARTS = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}


def load_umt5(path: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    """The text encoder, on the CPU, not trainable.

    Raises:
        InputError: the folder is no UMT5 encoder.
        CheckpointError: the file is broken, carries code, or is of another model.
    """
    if path.is_dir():
        try:
            model = UMT5EncoderModel.from_pretrained(path, local_files_only=True, torch_dtype=dtype)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{path} is no folder of a UMT5 encoder: {str(error).strip().splitlines()[0]}") from error
    else:
        model = _from_original(unwrap(read_state_dict(path)), path, dtype)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _from_original(state: dict[str, Tensor], path: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, value in state.items():
        block = re.match(r"blocks\.(\d+)\.(.+)", name)
        if block and block[2] in _PARTS:
            converted[f"encoder.block.{block[1]}.{_PARTS[block[2]]}"] = value
        elif name == "token_embedding.weight":
            converted["shared.weight"] = converted["encoder.embed_tokens.weight"] = value
        elif name == "norm.weight":
            converted["encoder.final_layer_norm.weight"] = value
        else:
            unknown.append(name)
    bias = converted.get("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    if unknown or bias is None or "shared.weight" not in converted:
        raise InputError(f"{path} is no UMT5 encoder of Wan; keys such as {', '.join((unknown or list(state))[:3])}")
    vocabulary, width = converted["shared.weight"].shape
    inner = converted["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0]
    buckets, heads = bias.shape
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        num_heads=heads,
        d_ff=converted["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        num_layers=1 + max(int(m[1]) for m in map(re.compile(r"encoder\.block\.(\d+)").match, converted) if m),
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    try:
        model.load_state_dict({name: value.to(dtype) for name, value in converted.items()}, assign=True)
    except RuntimeError as error:
        rows = [line.strip() for line in str(error).splitlines()[1:4]]
        raise InputError(f"{path} is not a whole UMT5 encoder: {'; '.join(rows)}") from error
    return model
