"""How a model's parts are stored and where they wait: 8-bit weights by torchao, offloading by diffusers' hooks."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nasa_video.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from causvid_adapter import CausalWan

WeightKind = Literal["plain", "int8", "fp8"]


@dataclass(frozen=True)
class Placement:
    """Where the parts of a pipeline live, and in how many bits.

    Attributes:
        weights: "plain" keeps the transformer's dtype; "int8" and "fp8" store the blocks' matrices in 8 bits a weight
            (one scale a row) and compute in the transformer's dtype.
        offload: the blocks wait in the host's memory, and come to the device one ahead of their turn. Exact.
        text_on_cpu: the text encoder runs on the CPU. Exact up to rounding.
        half_decoder: the VAE runs in bfloat16 instead of float32.
    """

    weights: WeightKind = "plain"
    offload: bool = False
    text_on_cpu: bool = False
    half_decoder: bool = False

    def __post_init__(self) -> None:
        if self.weights not in ("plain", "int8", "fp8"):
            raise InputError(f"weights must be plain, int8 or fp8, got {self.weights!r}")

    @property
    def description(self) -> str:
        """For people."""
        parts = [f"{self.weights} weights"] if self.weights != "plain" else []
        parts += ["blocks offloaded to the host"] if self.offload else []
        parts += ["text encoder on the CPU"] if self.text_on_cpu else []
        parts += ["VAE in bfloat16"] if self.half_decoder else []
        return ", ".join(parts) or "everything on the device"


RESIDENT = Placement()
# From exact and fast to what takes least: a budget gets the first that fits.
LADDER = (
    RESIDENT,
    Placement(text_on_cpu=True),
    Placement(text_on_cpu=True, half_decoder=True),
    Placement(text_on_cpu=True, half_decoder=True, weights="int8"),
    Placement(text_on_cpu=True, half_decoder=True, offload=True),
)


def place(model: CausalWan, placement: Placement, device: torch.device, folder: Path | None = None) -> CausalWan:
    """Bring a generator, loaded on the CPU, into its place.

    Args:
        folder: for offloading to disk instead of the host's memory.

    Raises:
        InputError: torchao is needed and not installed.
    """
    if placement.weights != "plain":
        quantise(model, placement.weights)
    if placement.offload:
        from causvid_adapter.accelerate.offload import offload_blocks

        offload_blocks(model, device, folder)
        return model
    return model.to(device)


def is_quantised(name: str, module: nn.Module) -> bool:
    """Whether a module of the transformer's is stored in 8 bits: the matrices of its blocks, no embedding, no norm."""
    from torch import nn

    return name.startswith("blocks.") and isinstance(module, nn.Linear)


def no_torchao(weights: WeightKind) -> InputError:
    """The error of 8-bit weights without the library that stores them."""
    return InputError(f"{weights} weights need torchao: pip install 'nasa-video[quant]', or use --weights plain")


def quantise(model: CausalWan, weights: WeightKind) -> None:
    """Store the blocks' matrices in 8 bits, in place.

    Raises:
        InputError: torchao is not installed.
    """
    # It announces each CUDA extension that it was built without; none of them is needed for stored weights.
    logger = logging.getLogger("torchao")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise no_torchao(weights) from error
    finally:
        logger.setLevel(level)
    config = Int8WeightOnlyConfig() if weights == "int8" else Float8WeightOnlyConfig()
    quantize_(model.transformer, config, filter_fn=lambda module, name: is_quantised(name, module))
