"""The processes that train together, on accelerate: one CPU or GPU, data parallel, or sharded over many."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from nasa_video.errors import InputError


class DistributedContext:
    """Where this process computes, and what it shares with the others.

    Start several with ``accelerate launch --num_processes N`` on GPUs or ``torchrun`` anywhere (accelerate's launcher
    starts several processes on CPUs through MPI only); accelerate reads their environment and opens the process group
    (gloo on CPUs). Models are sharded by PyTorch's own ``fully_shard``: accelerate shards on accelerators only, and
    what no CPU can run no test here can check.

    Args:
        shard: spread what is trained over the processes.
        precision: "bf16" for autocast to bfloat16, "fp32" for none.
        cpu: compute on the CPU although there is a GPU.

    Raises:
        InputError: sharding was asked of a single process.
    """

    def __init__(self, shard: bool = False, precision: str = "bf16", cpu: bool = False) -> None:
        self._state = PartialState(cpu=cpu or not torch.cuda.is_available())
        self.rank: int = self._state.process_index
        self.size: int = self._state.num_processes
        self.device: torch.device = self._state.device
        self.leads: bool = self.rank == 0  # whether this process writes the files
        self.precision = precision
        self.shard = shard
        if shard and not dist.is_initialized():
            raise InputError(
                "run.shard needs several processes: start with accelerate launch --num_processes N -m nasa_video "
                "train CONFIG (torchrun --nproc-per-node N on CPUs), or give --no-shard"
            )
        self._mesh = init_device_mesh(self.device.type, (self.size,)) if shard else None

    def stream(self, part: int) -> int:
        """Number of a pass within its update: two processes draw what one draws in two accumulated passes."""
        return part * self.size + self.rank

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 matrix products inside the scope, where the precision asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def place(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        """Move a model to the device; with sharding, layer by layer and then the rest.

        Weights keep their precision while they travel: Wan computes its norms and modulations in float32, and autocast
        chooses the rest by operation, so that a sharded run computes what a single one does.
        """
        model.to(self.device)
        if self._mesh is None:
            return
        for layer in layers:
            fully_shard(layer, mesh=self._mesh)
        fully_shard(model, mesh=self._mesh)

    @torch.no_grad()
    def average_gradients(self, model: nn.Module) -> None:
        """Replace every gradient by its mean over the processes; sharded ones were averaged as they were made."""
        if self.size == 1 or isinstance(model, FSDPModule):
            return
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = reduce(torch.cat([g.reshape(-1) for g in gradients]), "mean")
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Means over the processes of numbers that all of them have."""
        if self.size == 1 or not values:
            return values
        numbers = reduce(torch.tensor(list(values.values()), device=self.device), "mean")
        return dict(zip(values, numbers.tolist(), strict=True))

    def wait(self) -> None:
        """Return when every process has come here."""
        self._state.wait_for_everyone()


def whole(value: Any, keep: bool = True) -> Any:
    """Containers of tensors on the CPU, sharded ones put together; every process has to call this.

    Args:
        keep: False gives None for every tensor, in processes that only take part.
    """
    if isinstance(value, Tensor):
        part = value.detach()
        full = part.full_tensor() if isinstance(part, DTensor) else part
        # a copy: what is saved must not change with the weights
        return full.to("cpu", copy=True) if keep else None
    if isinstance(value, dict):
        return {key: whole(entry, keep) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(entry, keep) for entry in value)
    return value


def part_like(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, on the device and in the shards of another of its shape."""
    if isinstance(like, DTensor):
        return distribute_tensor(full.to(like.device), like.device_mesh, like.placements)
    return full.to(like.device)
