"""Counts the FLOPs of guidance on the paper's models at their true sizes, without weights, and writes docs/flops.md.

    python scripts/count_flops.py [--output docs/flops.md]

Models live on the meta device: torch's counter sees every matrix product, nothing is computed. A multiplication and an
addition are two operations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nasa_video.attention import SdpaAttend
from nasa_video.backbones.joint import JointFormula, NegativeMass, PositiveMass, WholeOutput
from nasa_video.backbones.scope import NegativeContext
from nasa_video.flops import ChunkLoop, WanSizes, mean_chunk_flops, prompt_flops
from nasa_video.guidance import Guidance, Nag, Nasa, Vsf
from nasa_video.guided_models import guided, make_backbone
from nasa_video.models import find_preset
from nasa_video.steering import EffectMeter

PAPER = 1.89
"""Per cent, arXiv 2412.02687."""


@dataclass(frozen=True)
class Subject:
    """One model at its true size: how it is made, called with a batch, and what a negative is for it."""

    name: str
    make: Callable[[], Any]
    call: Callable[[Any, int], Any]
    negative: NegativeContext


@dataclass(frozen=True)
class Row:
    """FLOPs of one call of the denoiser, and of the negative's keys, which are made once a prompt."""

    plain: int
    methods: dict[str, int]
    keys: int


def randn(*shape: int) -> Tensor:
    """An empty tensor of that shape."""
    return torch.empty(*shape, device="meta")


def negative(tokens: int, dim: int, pooled: int | None = None, *, masked: bool = False) -> NegativeContext:
    """A negative prompt padded to ``tokens``."""
    mask = torch.ones(1, tokens, dtype=torch.bool, device="meta") if masked else None
    return NegativeContext(randn(1, tokens, dim), mask, None if pooled is None else randn(1, pooled))


def pixart() -> PixArtTransformer2DModel:
    """PixArt-XL-2-512x512."""
    return PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28,
        cross_attention_dim=1152, caption_channels=4096, sample_size=64, patch_size=2,
    )  # fmt: skip


def sd(cross: int, heads: int | tuple[int, ...], linear: bool) -> UNet2DConditionModel:
    """Stable Diffusion 1.5 or 2.1."""
    return UNet2DConditionModel(
        sample_size=64, cross_attention_dim=cross, attention_head_dim=heads, use_linear_projection=linear
    )


def sdxl() -> UNet2DConditionModel:
    """SDXL base."""
    return UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def call_pixart(model: Any, batch: int) -> Any:
    mask = torch.ones(batch, 120, device="meta")
    extra = {"resolution": None, "aspect_ratio": None}
    time = randn(batch)
    return model(randn(batch, 4, 64, 64), randn(batch, 120, 4096), time, extra, encoder_attention_mask=mask)


def call_unet(latent: int, dim: int) -> Callable[[Any, int], Any]:
    def call(model: Any, batch: int) -> Any:
        added = {"text_embeds": randn(batch, 1280), "time_ids": randn(batch, 6)} if dim == 2048 else None
        return model(randn(batch, 4, latent, latent), randn(batch), randn(batch, 77, dim), added_cond_kwargs=added)

    return call


def call_flux(model: Any, batch: int) -> Any:
    return model(
        hidden_states=randn(batch, 4096, 64),
        encoder_hidden_states=randn(batch, 256, 4096),
        pooled_projections=randn(batch, 768),
        timestep=randn(batch),
        img_ids=randn(4096, 3),
        txt_ids=randn(256, 3),
    )


SUBJECTS = [
    Subject("PixArt-alpha 512", pixart, call_pixart, negative(120, 4096, masked=True)),
    Subject("SD 1.5, 512", lambda: sd(768, 8, False), call_unet(64, 768), negative(77, 768)),
    Subject("SD 2.1, 512", lambda: sd(1024, (5, 10, 20, 20), True), call_unet(64, 1024), negative(77, 1024)),
    Subject("SDXL 1024", sdxl, call_unet(128, 2048), negative(77, 2048)),
    Subject("FLUX.1-schnell 1024", FluxTransformer2DModel, call_flux, negative(256, 4096, 768)),
]
METHODS: dict[str, Guidance] = {"NASA": Nasa(0.5), "NAG": Nag(), "VSF": Vsf(negative_padding=True)}
FORMULAS: dict[str, JointFormula] = {"F1": WholeOutput(), "F2": NegativeMass(), "F3": PositiveMass()}


def counted(work: Callable[[], Any]) -> int:
    """FLOPs of some work."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return int(counter.get_total_flops())


def measure(subject: Subject) -> Row:
    """All methods on one model."""
    with torch.device("meta"):
        model = subject.make().requires_grad_(False)
        plain = counted(lambda: subject.call(model, 1))
        methods = {}
        for name, guidance in METHODS.items():
            with guided(model, subject.negative, guidance):
                methods[name] = counted(lambda: subject.call(model, 1))
        if isinstance(model, FluxTransformer2DModel):
            for name, formula in FORMULAS.items():
                with guided(model, subject.negative, Nasa(0.5), joint=formula):
                    methods[f"NASA {name}"] = counted(lambda: subject.call(model, 1))
        methods["CFG"] = counted(lambda: subject.call(model, 2))
        backbone = make_backbone(model, Nasa(0.5), SdpaAttend(), EffectMeter())
        with nullcontext():
            keys = counted(lambda: backbone.use([subject.negative]))
    return Row(plain, methods, keys)


def per_cent(value: float, base: float) -> str:
    """A change, signed."""
    return f"{100 * (value / base - 1):+.2f} %"


def image_table() -> tuple[list[str], dict[str, Row]]:
    """Markdown rows of the image models."""
    lines = [
        "| model | none, TFLOP | NASA | NAG | VSF | CFG | negative's keys, once a prompt | NASA with keys made each step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = {}
    for subject in SUBJECTS:
        row = rows[subject.name] = measure(subject)
        cells = [per_cent(row.methods[name], row.plain) for name in ("NASA", "NAG", "VSF", "CFG")]
        every = per_cent(row.methods["NASA"] + row.keys, row.plain) if row.keys else "the same"
        once = f"{row.keys / 1e9:.1f} GFLOP" if row.keys else "none: streams"
        lines.append(f"| {subject.name} | {row.plain / 1e12:.3f} | {' | '.join(cells)} | {once} | {every} |")
    return lines, rows


def wan_table() -> list[str]:
    """Markdown rows of Wan 2.1 1.3B as CausVid runs it: 832 x 480, 3 latent frames a chunk, mean over 7 chunks."""
    preset = find_preset("causvid")
    config = preset.components.config
    assert config is not None
    sizes = WanSizes.of(config)
    sampler = preset.sampler
    tokens = sizes.tokens_per_frame(preset.video.height // 8, preset.video.width // 8)
    loop = ChunkLoop(tokens, sampler.frames_per_chunk, sampler.default_steps, sampler.window_frames)
    positive, short = 21, 11  # 20 real tokens and 10, each with one key for all of its padding
    cases = {
        "none, padded (the public model)": ((512,),),
        "none, folded": ((positive,),),
        "NASA, padded": ((512, 512),),
        "NASA, folded": ((positive, short),),
        "NAG, folded": ((positive, short),),
        "VSF, folded, negative without padding": ((positive, short - 1),),
        "CFG, padded": ((512,), (512,)),
        "CFG, folded": ((positive,), (short,)),
    }
    base = mean_chunk_flops(sizes, loop, 7, cases["none, padded (the public model)"])
    lines = ["| Wan 2.1 1.3B, causal, a chunk | TFLOP | against the public model |", "|---|---|---|"]
    for name, branches in cases.items():
        flops = mean_chunk_flops(sizes, loop, 7, branches)
        lines.append(f"| {name} | {flops / 1e12:.2f} | {per_cent(flops, base)} |")
    lines.append(f"\nKeys of one 512-token prompt, once: {prompt_flops(sizes, 512) / 1e12:.2f} TFLOP; ")
    lines[-1] += f"of 11 folded tokens: {prompt_flops(sizes, 11) / 1e9:.1f} GFLOP."
    return lines


def flux_table(row: Row) -> list[str]:
    """The joint formulas."""
    lines = ["| NASA on FLUX.1-schnell | cost |", "|---|---|"]
    names = {"F1": "whole output", "F2": "negative's own mass", "F3": "positive's mass"}
    for key, title in names.items():
        lines.append(f"| {key}, {title} | {per_cent(row.methods[f'NASA {key}'], row.plain)} |")
    return lines


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "flops.md")
    options = parser.parse_args()
    table, rows = image_table()
    parts = ["\n".join(table), "\n".join(flux_table(rows["FLUX.1-schnell 1024"])), "\n".join(wan_table())]
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
