"""Chunk-wise causal generation with diffusers' Wan transformers: CausVid, Self-Forcing and their relatives."""

from causvid_adapter.accelerate.compile import compile_generator
from causvid_adapter.accelerate.static_cache import StaticKVCache
from causvid_adapter.cache import KVCache
from causvid_adapter.checkpoint import load_generator
from causvid_adapter.errors import CausvidAdapterError, CheckpointError, ShapeError
from causvid_adapter.mask import block_causal_mask
from causvid_adapter.model import CausalWan
from causvid_adapter.noise import GivenNoise, NoiseSource, SeededNoise
from causvid_adapter.sampler import ChunkSampler, ModelCall, OnChange
from causvid_adapter.schedule import FlowMatchSchedule
from causvid_adapter.vae import StreamingDecoder, StreamingEncoder, denormalize, normalize

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
    "block_causal_mask",
    "compile_generator",
    "denormalize",
    "load_generator",
    "normalize",
]
