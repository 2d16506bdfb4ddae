"""Low-rank adapters by PEFT: added, switched, and written so that our own loader takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nasa_video.errors import InputError
from nasa_video.train.settings import Lora


def add_lora(model: nn.Module, settings: Lora, seed: int) -> None:
    """Freeze a model and put a trainable adapter into the named projections; it starts as the identity.

    Raises:
        InputError: no projection has such a name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    config = LoraConfig(r=settings.rank, lora_alpha=settings.scaling, target_modules=list(settings.targets))
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise InputError(f"a LoRA on {', '.join(settings.targets)} fits no layer of this model: {error}") from error
    finally:
        torch.random.set_rng_state(state)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data = parameter.data.float()


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The model without its adapter inside the scope.

    PEFT's own switch also changes what requires a gradient, which sharded parameters must not do in between
    (huggingface/peft 1442, 2977); this one sets a plain boolean that the layers look at.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def save_lora(path: Path, trained: dict[str, Tensor], settings: Lora) -> None:
    """Write an adapter under diffusers' names, scaled so that a loader's scale of 1 is the trained one.

    Args:
        trained: the adapter's parameters by their names in the model, on the CPU.
    """
    scale = settings.scaling / settings.rank
    tensors = {}
    for name, value in trained.items():
        key = "transformer." + name.removeprefix("transformer.").replace(".default.", ".")
        tensors[key] = (value * scale if ".lora_B." in key else value).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
