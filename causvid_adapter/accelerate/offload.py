"""A generator whose blocks wait in the host's memory, by diffusers' group offloading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from causvid_adapter.model import CausalWan

# The name under which diffusers registers its hook.
_HOOK = "group_offloading"


def offload_blocks(model: CausalWan, device: torch.device, folder: Path | None = None) -> None:
    """Keep the transformer's blocks off the device, and bring each there for its turn; the numbers stay the same.

    On CUDA the next block is copied while one computes. Text keys are made through :func:`resident`.

    Args:
        device: where it computes.
        folder: keeps the weights in files there; None keeps them in the host's memory. On a CPU what is read may lie at
            an address for which kernels sum in another order: the last digits can differ.
    """
    from diffusers.hooks import apply_group_offloading  # late: it imports peft and torch's compiler

    apply_group_offloading(
        model.transformer,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
        offload_to_disk_path=None if folder is None else str(folder),
    )


def is_offloaded(model: nn.Module) -> bool:
    """Whether a transformer's own weights wait elsewhere."""
    return _group(model) is not None


@contextmanager
def resident(module: nn.Module) -> Iterator[None]:
    """Hold the weights of a transformer's own parts, or of one of its blocks, on the device inside the scope.

    Diffusers' hooks act on ``forward`` alone; whoever uses a projection by itself asks here. A module that is not
    offloaded is there already.
    """
    group = _group(module)
    if group is None:
        yield
        return
    group.onload_()
    if group.stream is not None:
        group.stream.synchronize()
    try:
        yield
    finally:
        group.offload_()


def _group(module: nn.Module) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(_HOOK)
    return None if hook is None else hook.group
