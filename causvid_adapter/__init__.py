"""Chunk-wise causal generation with diffusers' Wan transformers: CausVid, Self-Forcing and their relatives.

Parts are loaded when they are first used: ``causvid_adapter.window`` and ``causvid_adapter.errors`` need no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from causvid_adapter.accelerate.compile import compile_generator
    from causvid_adapter.accelerate.static_cache import StaticKVCache
    from causvid_adapter.cache import KVCache
    from causvid_adapter.checkpoint import load_generator
    from causvid_adapter.errors import CausvidAdapterError, CheckpointError, ShapeError
    from causvid_adapter.mask import block_causal_mask
    from causvid_adapter.model import CausalWan
    from causvid_adapter.noise import GivenNoise, NoiseSource, SeededNoise
    from causvid_adapter.sampler import ChunkSampler, ModelCall
    from causvid_adapter.schedule import FlowMatchSchedule
    from causvid_adapter.vae import StreamingDecoder, StreamingEncoder, denormalize, normalize
    from causvid_adapter.window import OnChange, Window

_HOMES = {
    "CausalWan": "model",
    "CausvidAdapterError": "errors",
    "CheckpointError": "errors",
    "ChunkSampler": "sampler",
    "FlowMatchSchedule": "schedule",
    "GivenNoise": "noise",
    "KVCache": "cache",
    "ModelCall": "sampler",
    "NoiseSource": "noise",
    "OnChange": "window",
    "SeededNoise": "noise",
    "ShapeError": "errors",
    "StaticKVCache": "accelerate.static_cache",
    "StreamingDecoder": "vae",
    "StreamingEncoder": "vae",
    "Window": "window",
    "block_causal_mask": "mask",
    "compile_generator": "accelerate.compile",
    "denormalize": "vae",
    "load_generator": "checkpoint",
    "normalize": "vae",
}
__all__ = [
    "CausalWan",
    "CausvidAdapterError",
    "CheckpointError",
    "ChunkSampler",
    "FlowMatchSchedule",
    "GivenNoise",
    "KVCache",
    "ModelCall",
    "NoiseSource",
    "OnChange",
    "SeededNoise",
    "ShapeError",
    "StaticKVCache",
    "StreamingDecoder",
    "StreamingEncoder",
    "Window",
    "block_causal_mask",
    "compile_generator",
    "denormalize",
    "load_generator",
    "normalize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
