"""The chunk loop through ``torch.compile``: one graph for every chunk of a video, CUDA graphs by choice."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.activations import GELU
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from causvid_adapter.errors import CausvidAdapterError
from causvid_adapter.model import CausalWan

MOST_GRAPHS = 64
"""Of one model in a session: methods of guidance, shares of their scale, sizes of batches."""


def compile_generator(
    model: CausalWan, *, cuda_graphs: bool = False, backend: str | Callable[..., Any] = "inductor"
) -> None:
    """Compile a generator in place; the first call of a video's size takes the time of compiling.

    Its caches become :class:`~causvid_adapter.StaticKVCache`, so that no chunk is compiled anew, and attention always
    runs over the window's (or the video's) full length: early chunks of a long video without a window do more work.

    Args:
        cuda_graphs: replay each pass as one launch (CUDA only).
        backend: of torch.compile.

    Raises:
        CausvidAdapterError: CUDA graphs without CUDA; no C++ compiler for a CPU; or the weights are offloaded, which no
            graph can follow. At the first call: this machine cannot compile the model.
    """
    if cuda_graphs and model.device.type != "cuda":
        raise CausvidAdapterError(f"CUDA graphs need CUDA, the model is on {model.device.type}; compile without them")
    if hasattr(model.transformer.blocks[0], "_diffusers_hook"):
        raise CausvidAdapterError("offloaded blocks cannot be compiled; leave out one of the two")
    if backend == "inductor" and model.device.type == "cpu" and not has_compiler():
        raise CausvidAdapterError(
            "compiling on a CPU needs a C++ compiler, and none was found; install one (g++ or clang++, on Debian: "
            "apt-get install g++), name it in the environment variable CXX, or go on without compiling"
        )
    # every method of guidance has graphs of its own; beyond its limit torch fails, or goes on uncompiled
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    if model.device.type == "cpu":
        for part in model.transformer.modules():
            if isinstance(part, GELU) and part.approximate == "tanh":
                part.gelu = _tanh_gelu
    model.static_cache = True
    model.cuda_graphs = cuda_graphs
    mode: dict[str, Any] = {"mode": "reduce-overhead"} if cuda_graphs else {"backend": backend}
    compiled = torch.compile(model.transformer.forward, fullgraph=True, **mode)

    def forward(*inputs: Any, **options: Any) -> Any:
        try:
            return compiled(*inputs, **options)  # type: ignore[no-untyped-call]
        except TorchDynamoException as error:
            reason = " ".join(str(error).strip().partition("\n\n")[0].split())[:300]
            raise CausvidAdapterError(
                f"torch.compile failed on this machine ({reason}); go on without compiling"
            ) from error

    model.transformer.forward = forward


def _tanh_gelu(x: Tensor) -> Tensor:
    """GELU with tanh, written with the logistic function: compiled for a CPU, it takes a third of the time."""
    wide = x.float()
    return (wide * torch.sigmoid(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))).to(x.dtype)


def has_compiler() -> bool:
    """Whether this machine can compile what torch.compile writes for a CPU."""
    named = os.environ.get("CXX")
    return any(map(shutil.which, (named,) if named else ("g++", "clang++", "cl")))
