"""One video on several devices, by diffusers' context parallelism (Ulysses).

diffusers' hooks split a pass's tokens over the processes before the first block and bring them together behind the
last; in self-attention the processes exchange tokens for heads, so each holds the history of its own heads only.
Everything else (text keys, timesteps, noise) is the same everywhere. Every process makes the same calls.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from diffusers.hooks.context_parallel import apply_context_parallel
from diffusers.models._modeling_parallel import ContextParallelConfig, ContextParallelInput, ContextParallelOutput
from torch.distributed.device_mesh import init_device_mesh

from causvid_adapter.attention import CausalSelfAttention, HeadExchange
from causvid_adapter.errors import CausvidAdapterError
from causvid_adapter.model import CausalWan

# Of diffusers' own plan for Wan, without its rotary tables (rotation happens when a process has all tokens of its
# heads) and without timesteps a token (those are for training).
_PLAN = {
    "blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3, split_output=False)},
    "proj_out": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


def parallelise(model: CausalWan) -> None:
    """Split every pass of a generator over the processes of the default group, in place.

    ``WanTransformer3DModel.enable_parallelism`` asks for an accelerator, so its hooks are applied here directly; that
    is the same on CUDA, and works on CPUs with gloo as well.

    Raises:
        CausvidAdapterError: there is no group of processes, or the heads do not divide among them.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise CausvidAdapterError(
            "splitting a video needs a group of processes; start it with: torchrun --nproc-per-node N -m nasa_video …"
        )
    world, heads = dist.get_world_size(), model.transformer.config.num_attention_heads
    if heads % world:
        fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise CausvidAdapterError(f"{heads} heads cannot be shared by {world} processes; use one of {fits}")
    if model.static_cache or hasattr(model.transformer.blocks[0], "_diffusers_hook"):
        raise CausvidAdapterError("a compiled or offloaded model cannot be split; leave out one of the two")
    if world == 1:
        return
    device = model.device
    mesh = init_device_mesh(device.type, (1, world), mesh_dim_names=("ring", "ulysses"))
    config = ContextParallelConfig(ulysses_degree=world, mesh=mesh)
    config.setup(dist.get_rank(), world, torch.device(device), mesh)
    apply_context_parallel(model.transformer, config, _PLAN)
    exchange = HeadExchange(mesh["ulysses"].get_group(), world)
    for block in model.transformer.blocks:
        processor = block.attn1.processor
        assert isinstance(processor, CausalSelfAttention)
        processor.exchange = exchange
    model.processes = world
