"""Generator weights in the formats in which CausVid, Self-Forcing and their relatives are published."""

from __future__ import annotations

import inspect
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from causvid_adapter.errors import CheckpointError
from causvid_adapter.model import CausalWan

StateDict = dict[str, Tensor]

# Most specific first: a Self-Forcing file carries both, and its EMA weights are the published model.
TOP_KEYS = ("generator_ema", "generator", "state_dict", "model_state_dict", "model")
WRAPPERS = re.compile(r"(^|(?<=\.))(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
PREFIX = re.compile(r"^(model\.diffusion_model\.|diffusion_model\.|model\.)")
ORIGINAL_NAMES = {"in_dim": "in_channels", "out_dim": "out_channels", "ffn_dim": "ffn_dim", "freq_dim": "freq_dim",
                  "text_dim": "text_dim", "num_layers": "num_layers", "num_heads": "num_attention_heads",
                  "eps": "eps", "cross_attn_norm": "cross_attn_norm"}  # fmt: skip
IGNORED_ORIGINAL_NAMES = {"model_type", "text_len", "window_size", "qk_norm", "dim", "patch_size", "_class_name",
                          "_diffusers_version", "_name_or_path"}  # fmt: skip


def load_generator(
    path_or_id: str | Path,
    config: Mapping[str, Any] | str | Path | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> CausalWan:
    """Load a causal generator.

    Args:
        path_or_id: a ``.pt``/``.pth``/``.bin`` file (read with ``weights_only=True``), a ``.safetensors`` file, a
            folder in diffusers' layout, or ``owner/name/path/in/repository`` on the hub.
        config: of the transformer, with diffusers' names or Wan's own (a mapping, or a JSON file); None reads the
            sizes off the weights, with Wan's head size of 128.
        dtype: of the weights; None keeps the file's.

    Raises:
        CheckpointError: the file is missing, broken, carries code, is of another model, or has missing, extra or
            mis-shaped keys; the message lists the first few.
    """
    path = _locate(path_or_id)
    if path.is_dir():
        transformer = _from_folder(path, dtype)
    else:
        state = to_diffusers(unwrap(read_state_dict(path)), source=str(path_or_id))
        transformer = build_transformer(state, _read_config(config), source=str(path_or_id))
        if dtype is not None:
            cast_like_diffusers(transformer, dtype)
    return CausalWan(transformer.to(device).requires_grad_(False)).eval()


def cast_like_diffusers(transformer: WanTransformer3DModel, dtype: torch.dtype) -> None:
    """Cast as diffusers' ``from_pretrained`` does: what Wan computes in float32 stays in float32."""
    for name, parameter in transformer.named_parameters():
        keep = any(part in name.split(".") for part in WanTransformer3DModel._keep_in_fp32_modules)
        parameter.data = parameter.data.to(torch.float32 if keep else dtype)


def load_weights(module: nn.Module, state: StateDict, path: Path, what: str) -> None:
    """Give a module its weights; ``what`` says what it is, for the message.

    Raises:
        CheckpointError: keys or shapes are not the module's.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        rows = [line.strip() for line in str(error).splitlines()[1:4]]
        raise CheckpointError(f"{path} does not fit {what}: {'; '.join(rows)}") from error


def read_state_dict(path: Path) -> dict[str, Any]:
    """Read a checkpoint file without running code from it."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        if path.suffix == ".safetensors" or _starts_like_safetensors(path):
            return dict(load_file(path))
        with warnings.catch_warnings(action="ignore"):  # about what follows as an error anyway
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); download it again") from error
    except pickle.UnpicklingError as error:
        # torch's own message goes on to advise weights_only=False, which is not ours to pass on.
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is None:
            raise CheckpointError(f"{path} is no checkpoint: neither safetensors nor a file of torch.save") from error
        raise CheckpointError(
            f"{path} holds more than tensors and was not opened, since it could run code ({code[1]}); "
            "ask for a safetensors file, or one saved from a plain state dict"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        # Whatever the unpickler makes of arbitrary bytes.
        raise CheckpointError(
            f"{path} is not a readable checkpoint ({type(error).__name__}: {str(error).split('. ')[0].strip()}); "
            "is the download complete?"
        ) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a state dict")
    return dict(loaded)


def read_shapes(path: Path) -> dict[str, Any]:
    """What :func:`read_state_dict` gives, without reading the numbers: safetensors become tensors on "meta"."""
    if not path.is_file() or not (path.suffix == ".safetensors" or _starts_like_safetensors(path)):
        return read_state_dict(path)  # which maps the file, and reads no page that is not looked at
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); download it again") from error


def _starts_like_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def unwrap(checkpoint: Mapping[str, Any]) -> StateDict:
    """The generator's tensors, without top-level keys, prefixes and the infixes that FSDP and compile leave."""
    found: Mapping[str, Any] = checkpoint
    for key in TOP_KEYS:
        if isinstance(checkpoint.get(key), Mapping):
            found = unwrap(checkpoint[key]) if key in ("state_dict", "model_state_dict", "model") else checkpoint[key]
            break
    tensors = {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
    return {PREFIX.sub("", WRAPPERS.sub("", name)): value for name, value in tensors.items()}


def to_diffusers(state: StateDict, source: str = "the checkpoint") -> StateDict:
    """Rename Wan's own keys to diffusers'; keys that are diffusers' already stay."""
    if any(name.startswith("condition_embedder.") for name in state):
        return state
    if not any(re.match(r"blocks\.\d+\.self_attn\.", name) for name in state):
        raise CheckpointError(f"{source} is no Wan generator: it looks like {describe(state)}")
    converted: StateDict = convert_wan_transformer_to_diffusers(dict(state))
    return converted


def build_transformer(
    state: StateDict, config: Mapping[str, Any] | None = None, source: str = "the checkpoint"
) -> WanTransformer3DModel:
    """A transformer with exactly these weights (keys in diffusers' names)."""
    settings = dict(config) if config is not None else infer_config(state)
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**settings)
    expected = {name: tuple(p.shape) for name, p in transformer.state_dict().items()}
    missing = expected.keys() - state.keys()
    extra = state.keys() - expected.keys()
    misshaped = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    _refuse_misfit(source, missing, extra, misshaped, f" It looks like {describe(state)}.")
    # The rotary tables are computed, not stored: build them for real, and only then take the weights over.
    transformer = transformer.to_empty(device="cpu")
    transformer.rope = type(transformer.rope)(
        transformer.config.attention_head_dim, transformer.config.patch_size, transformer.config.rope_max_seq_len
    )
    transformer.load_state_dict(state, strict=True, assign=True)
    return transformer


def _refuse_misfit(
    source: str, missing: Iterable[str], extra: Iterable[str], misshaped: Iterable[str], hint: str = ""
) -> None:
    parts = [
        f"{len(rows)} {what}: {', '.join(rows[:4])}{', …' if len(rows) > 4 else ''}"
        for what, names in (("missing", missing), ("unknown", extra), ("of another shape", misshaped))
        if (rows := sorted(names))
    ]
    if parts:
        raise CheckpointError(f"{source} does not fit the model; {'; '.join(parts)}.{hint}")


def infer_config(state: StateDict, head_dim: int = 128) -> dict[str, Any]:
    """Sizes of a Wan transformer, read off its weights; heads are ``head_dim`` wide, as in every published Wan."""
    try:
        dim, in_channels, *patch = state["patch_embedding.weight"].shape
        layers = 1 + max(int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in state) if m)
        settings: dict[str, Any] = {
            "patch_size": tuple(patch),
            "num_attention_heads": dim // head_dim,
            "attention_head_dim": head_dim,
            "in_channels": in_channels,
            "out_channels": state["proj_out.weight"].shape[0] // (patch[0] * patch[1] * patch[2]),
            "text_dim": state["condition_embedder.text_embedder.linear_1.weight"].shape[1],
            "freq_dim": state["condition_embedder.time_embedder.linear_1.weight"].shape[1],
            "ffn_dim": state["blocks.0.ffn.net.0.proj.weight"].shape[0],
            "num_layers": layers,
        }
    except KeyError as error:
        raise CheckpointError(f"the checkpoint has no {error}: it looks like {describe(state)}") from error
    if dim % head_dim:
        raise CheckpointError(f"width {dim} is no multiple of Wan's head size {head_dim}; give the config explicitly")
    if "condition_embedder.image_embedder.norm1.weight" in state:
        settings["image_dim"] = state["condition_embedder.image_embedder.norm1.weight"].shape[0]
        settings["added_kv_proj_dim"] = dim
    if "condition_embedder.image_embedder.pos_embed" in state:
        settings["pos_embed_seq_len"] = state["condition_embedder.image_embedder.pos_embed"].shape[1]
    return settings


def describe(state: Mapping[str, Any]) -> str:
    """Say what model a state dict looks like, for an error message."""
    names = [name for name, value in state.items() if isinstance(value, Tensor)]
    if not names:
        return "an empty state dict"
    text = "\n".join(names)
    signs = {
        r"lora_(A|B|down|up)": "a LoRA (load it with --lora, on top of a generator)",
        r"^(encoder|decoder)\.(down|up)samples|^decoder\.up_blocks": "a Wan VAE",
        r"double_blocks|single_transformer_blocks": "FLUX",
        r"down_blocks\.\d|input_blocks\.\d": "a Stable Diffusion UNet",
        r"encoder\.block\.\d+\.layer|^blocks\.\d+\.attn\.(q|k)\.weight[\s\S]*pos_embedding": "a T5 text encoder",
        r"caption_projection": "PixArt",
    }
    for pattern, what in signs.items():
        if re.search(pattern, text, re.MULTILINE):
            return what
    layers = {int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", name) for name in names) if m}
    width = next((state[n].shape[0] for n in ("patch_embedding.weight", "patch_embedding.bias") if n in state), None)
    if layers and width:
        return f"a Wan transformer of width {width} with {max(layers) + 1} layers"
    return f"something with {len(names)} tensors such as {', '.join(names[:3])}"


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate Wan's own config names; diffusers' names pass through."""
    known = set(inspect.signature(WanTransformer3DModel.__init__).parameters) - {"self"}
    if "dim" not in config:
        given = {k: v for k, v in config.items() if not k.startswith("_")}
        unknown = sorted(given.keys() - known)
        if unknown:
            raise CheckpointError(f"unknown config entries {unknown}; expected those of WanTransformer3DModel")
        return given
    unknown = sorted(config.keys() - ORIGINAL_NAMES.keys() - IGNORED_ORIGINAL_NAMES)
    if unknown:
        raise CheckpointError(f"unknown config entries {unknown}; expected those of Wan's config.json")
    if "num_heads" not in config or config["dim"] % config["num_heads"]:
        raise CheckpointError(f"the config needs num_heads that divides dim = {config['dim']}")
    settings = {ORIGINAL_NAMES[k]: v for k, v in config.items() if k in ORIGINAL_NAMES}
    settings["patch_size"] = tuple(config.get("patch_size", (1, 2, 2)))
    settings["attention_head_dim"] = config["dim"] // config["num_heads"]
    return settings


def _read_config(config: Mapping[str, Any] | str | Path | None) -> dict[str, Any] | None:
    if config is None:
        return None
    if isinstance(config, Mapping):
        return diffusers_config(config)
    try:
        loaded = json.loads(Path(config).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config} is no readable JSON config: {error}") from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{config} holds a {type(loaded).__name__}, not a config")
    return diffusers_config(loaded)


def _locate(path_or_id: str | Path) -> Path:
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    parts = str(path_or_id).split("/")
    if isinstance(path_or_id, Path) or len(parts) < 3 or path.suffix not in (".pt", ".pth", ".bin", ".safetensors"):
        raise CheckpointError(
            f"{path_or_id} does not exist; give a file, a diffusers folder, or owner/name/path/to/file.pt of the hub"
        )
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path_or_id} is not here and the hub cannot be reached or has no such file ({type(error).__name__}); "
            "download it on another machine and give its path"
        ) from error


def _from_folder(folder: Path, dtype: torch.dtype | None) -> WanTransformer3DModel:
    # A pipeline's folder holds its transformer in a folder of that name.
    inner = folder / "transformer"
    try:
        transformer, found = WanTransformer3DModel.from_pretrained(
            inner if inner.is_dir() else folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder} is no diffusers folder of a Wan transformer: {reason}") from error
    # diffusers fills what is missing with random numbers and goes on.
    _refuse_misfit(
        str(folder), found["missing_keys"], found["unexpected_keys"], [str(row[0]) for row in found["mismatched_keys"]]
    )
    return transformer
