"""LoRA files for Wan generators, in the namings in which they are published."""

from __future__ import annotations

import re
from pathlib import Path

from diffusers.loaders import WanLoraLoaderMixin
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from causvid_adapter.checkpoint import WRAPPERS, read_state_dict
from causvid_adapter.errors import CheckpointError
from causvid_adapter.model import CausalWan

# Trainers' own prefixes, and the adapter's name that PEFT puts before "weight".
_PEFT_PREFIX = re.compile(r"^(base_model\.model\.)?(model\.)*")
_ADAPTER_NAME = re.compile(r"\.(lora_[AB])\.[^.]+\.weight$")
_LORA_KEY = re.compile(r"\.lora_([AB]|down|up)\.")
# Kohya joins the parts of a name by underscores, of which some names have their own.
_KOHYA_NAME = re.compile(
    r"^lora_unet_(?:blocks_(?P<block>\d+)_)?"
    r"(?P<part>self_attn|cross_attn|ffn|time_embedding|text_embedding|time_projection|head)_(?P<rest>\w+)"
)
# Whole differences beside the low-rank ones, as the extracted LoRAs of CausVid and Self-Forcing have them.
_DIFFERENCES = {".diff": ".weight", ".diff_b": ".bias"}


def merge_lora(model: CausalWan, path: Path, scale: float = 1.0) -> None:
    """Add a LoRA to the generator's weights, times ``scale``.

    Takes diffusers' keys (``transformer.blocks…``), those of ComfyUI and its trainers (``diffusion_model.…`` with
    ``lora_down``/``lora_up`` and ``alpha``), Kohya's (``lora_unet_…``), and plain PEFT state dicts on Wan's own names,
    also under ``generator_lora`` as LongLive has it. ComfyUI's ``.diff`` and ``.diff_b`` (of norms too, which diffusers
    drops) are added as they are.

    Raises:
        CheckpointError: no LoRA, or one for another model; the message lists the first few keys without a place.
    """
    state = _without_kohya(_read(path))
    differences = _take_differences(state)
    try:
        converted: dict[str, Tensor] = WanLoraLoaderMixin.lora_state_dict(state)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} has LoRA keys that diffusers cannot place: {error}") from error
    changes = _pair(converted, path)
    for name, difference in differences.items():
        changes[name] = changes[name] + difference if name in changes else difference
    parameters = dict(model.transformer.named_parameters())
    lost = sorted(name for name in changes if name not in parameters)
    if lost:
        raise CheckpointError(
            f"{path} is a LoRA of another model: {len(lost)} of {len(changes)} weights have no place here: "
            f"{', '.join(lost[:4])}"
        )
    misshaped = [name for name, change in changes.items() if change.shape != parameters[name].shape]
    if misshaped:
        raise CheckpointError(f"{path} is a LoRA of another size of model: {', '.join(misshaped[:4])} do not fit")
    for name, change in changes.items():
        parameter = parameters[name]
        parameter.data += (scale * change).to(parameter.device, parameter.dtype)


def _without_kohya(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Kohya's names as ComfyUI's, which diffusers' converter takes also where a file covers some layers only."""

    def rename(match: re.Match[str]) -> str:
        block = "" if match["block"] is None else f"blocks.{match['block']}."
        return f"diffusion_model.{block}{match['part']}.{match['rest']}"

    return {_KOHYA_NAME.sub(rename, name): value for name, value in state.items()}


def _take_differences(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove ComfyUI's whole differences from a file's state; returns them by diffusers' parameter names."""
    taken = {}
    for name in list(state):
        stem, dot, kind = name.rpartition(".")
        if dot + kind in _DIFFERENCES and stem.startswith("diffusion_model."):
            taken[stem.removeprefix("diffusion_model.") + _DIFFERENCES[dot + kind]] = state.pop(name).float()
    converted: dict[str, Tensor] = convert_wan_transformer_to_diffusers(taken)
    return converted


def _pair(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The change of each parameter, B A in float32, from diffusers' keys; ``lora_B.bias`` changes the bias."""
    changes: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix("transformer.")
        if name.endswith(".lora_B.weight"):
            down = state.get(key.replace(".lora_B.", ".lora_A."))
            if down is None or down.shape[0] != value.shape[1]:
                raise CheckpointError(f"{path}: {name} has no lora_A of its rank; the file is damaged")
            changes[name.replace(".lora_B.weight", ".weight")] = value.float() @ down.float()
        elif name.endswith(".lora_B.bias"):
            changes[name.replace(".lora_B.bias", ".bias")] = value.float()
        elif not name.endswith(".lora_A.weight"):
            raise CheckpointError(f"{path}: {name} is of a kind of LoRA that cannot be merged here")
    return changes


def _read(path: Path) -> dict[str, Tensor]:
    loaded = read_state_dict(path)
    inner = loaded.get("generator_lora", loaded)
    state = {str(name): value for name, value in dict(inner).items() if isinstance(value, Tensor)}
    if not any(_LORA_KEY.search(name) for name in state):
        raise CheckpointError(f"{path} holds no LoRA weights; a whole generator goes to --model")
    if any(name.startswith(("diffusion_model.", "lora_unet_", "transformer.")) for name in state):
        return state
    renamed = {}
    for name, value in state.items():
        plain = _ADAPTER_NAME.sub(r".\1.weight", _PEFT_PREFIX.sub("", WRAPPERS.sub("", name)))
        renamed[("transformer." if ".attn1." in plain or ".attn2." in plain else "diffusion_model.") + plain] = value
    return renamed
