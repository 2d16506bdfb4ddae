"""Counts the FLOPs of guidance on the paper's models at their true sizes, without weights.

    python research/count_flops.py [--output FILE]

docs/method/cost.md quotes the tables. Models live on the meta device: torch's counter sees every matrix product,
nothing is computed. A multiplication and an addition are two operations.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode
from true_sizes import SUBJECTS, Subject, randn

from causvid_adapter.sizes import WanSizes
from nasa_video.backbones.joint import JointFormula, NegativeMass, PositiveMass, WholeOutput
from nasa_video.bench.flops import ChunkLoop, mean_chunk_flops, pass_flops, prompt_flops, text_flops
from nasa_video.guidance.attention import SdpaAttend, folded_tokens
from nasa_video.guidance.methods import Guidance, Nag, Nasa, Vsf
from nasa_video.guidance.state import EffectMeter
from nasa_video.integrations.diffusers.guided import guided, make_backbone
from nasa_video.models.presets import find_preset

PAPER = 1.89
"""Per cent, arXiv 2412.02687."""


@dataclass(frozen=True)
class Row:
    """FLOPs of one call of the denoiser, and of the negative's keys, which are made once a prompt."""

    plain: int
    methods: dict[str, int]
    keys: int


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
        keys = counted(lambda: backbone.use([subject.negative]))
    return Row(plain, methods, keys)


def per_cent(value: float, base: float) -> str:
    """A change, signed."""
    return f"{100 * (value / base - 1):+.2f} %"


def image_table() -> tuple[list[str], dict[str, Row]]:
    """Markdown rows of the image models."""
    lines = [
        "| model, a step | none, TFLOP | NASA | NAG | VSF | CFG | negative's keys, once | NASA, keys every step |",
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
    loop = ChunkLoop(tokens, sampler.frames_per_chunk, sampler.default_steps, sampler.window)
    positive = folded_tokens(torch.tensor([20]))
    cases = {
        "none, padded (the public model)": ((512,),),
        "none, folded": ((positive,),),
        "NASA, padded": ((512, 512),),
        "NASA, folded": ((positive, WAN_NEGATIVE),),
        "NAG, folded": ((positive, WAN_NEGATIVE),),
        "VSF, folded, negative without padding": ((positive, WAN_NEGATIVE),),
        "CFG, padded": ((512,), (512,)),
        "CFG, folded": ((positive,), (WAN_NEGATIVE,)),
    }
    base = mean_chunk_flops(sizes, loop, 7, cases["none, padded (the public model)"])
    lines = ["| Wan 2.1 1.3B, causal, a chunk | TFLOP | against the public model |", "|---|---|---|"]
    for name, branches in cases.items():
        flops = mean_chunk_flops(sizes, loop, 7, branches)
        lines.append(f"| {name} | {flops / 1e12:.2f} | {per_cent(flops, base)} |")
    lines.append(f"\nKeys of one 512-token prompt, once: {prompt_flops(sizes, 512) / 1e12:.2f} TFLOP; ")
    lines[-1] += f"of {WAN_NEGATIVE} folded keys: {prompt_flops(sizes, WAN_NEGATIVE) / 1e9:.1f} GFLOP."
    return lines


WAN_FRAMES, WAN_TEXT, WAN_NEGATIVE = 21, 512, folded_tokens(torch.tensor([10]))
"""Latent frames of 81; text tokens of the public model; keys of a negative of 10 tokens."""


def wan_config(size: str) -> dict[str, Any]:
    """Config of Wan 2.1 1.3B or 14B, text to video."""
    config = find_preset("causvid").components.config
    assert config is not None
    large = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
    return {**config, **(large if size == "14B" else {})}


def count_wan(config: Mapping[str, Any]) -> int:
    """One unguided step of diffusers' own model on 81 frames of 832 x 480, by torch's counter."""
    with torch.device("meta"):
        model = WanTransformer3DModel(**config).requires_grad_(False)
        latents = randn(1, config["in_channels"], WAN_FRAMES, 60, 104)
        return counted(lambda: model(latents, randn(1), randn(1, WAN_TEXT, config["text_dim"])))


def bidirectional_table() -> list[str]:
    """Markdown rows of the bidirectional Wan 2.1, a step; the formula is held against the counter first."""
    lines = [
        "| Wan 2.1, bidirectional, 81 frames of 832 x 480, a step | none, TFLOP | NASA, folded | NAG, folded "
        "| VSF, no padding | CFG | NASA, padded, keys every step |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in ("1.3B", "14B"):
        config = wan_config(size)
        sizes = WanSizes.of(config)
        tokens = WAN_FRAMES * sizes.tokens_per_frame(60, 104)
        keys = prompt_flops(sizes, WAN_TEXT)  # diffusers' loop makes the prompt's keys anew at every step
        own = keys - text_flops(sizes, 1)  # which a pass counts with one token

        def step(*negative: int, sizes: WanSizes = sizes, tokens: int = tokens, own: int = own) -> int:
            return pass_flops(sizes, tokens, tokens, (WAN_TEXT, *negative)) + own

        plain = step()
        seen = count_wan(config)
        if abs(seen - plain) > 1e-3 * seen:
            raise RuntimeError(f"Wan {size}: {plain:,} operations by formula, {seen:,} by the counter")
        cells = [per_cent(step(WAN_NEGATIVE), plain)] * 3  # of NASA, NAG and VSF, whose formulas are no products
        cells += [per_cent(2 * plain, plain), per_cent(step(WAN_TEXT) + keys, plain)]
        lines.append(f"| {size} | {plain / 1e12:.2f} | {' | '.join(cells)} |")
    return lines


def flux_table(row: Row) -> list[str]:
    """The joint formulas."""
    lines = ["| NASA on FLUX.1-schnell | cost |", "|---|---|"]
    names = {"F1": "whole output", "F2": "negative's own mass", "F3": "positive's mass"}
    for key, title in names.items():
        lines.append(f"| {key}, {title} | {per_cent(row.methods[f'NASA {key}'], row.plain)} |")
    return lines


def length_table(row: Row, tokens: int) -> list[str]:
    """PixArt by the length of its text: all that text costs is linear in it; ``row`` was counted at ``tokens``."""
    lines = ["| PixArt-alpha 512, text tokens | NASA, keys kept | NASA, keys every step |", "|---|---|---|"]
    attention, keys = row.methods["NASA"] - row.plain, row.keys
    for length in (77, 80, 120, 300):
        share = length / tokens
        plain = row.plain + (share - 1) * (attention + keys)
        kept, every = plain + share * attention, plain + share * (attention + keys)
        lines.append(f"| {length} | {per_cent(kept, plain)} | {per_cent(every, plain)} |")
    return lines


def explained(rows: Mapping[str, Row]) -> dict[str, str]:
    """The counted figures that the explanations name."""
    named = {"pixart": "PixArt-alpha 512", "sd15": "SD 1.5, 512", "sd21": "SD 2.1, 512", "sdxl": "SDXL 1024"}
    flux = rows["FLUX.1-schnell 1024"]
    figures = {f"f{i}": per_cent(flux.methods[f"NASA F{i}"], flux.plain) for i in (1, 2)}
    for name, title in named.items():
        row = rows[title]
        figures[name] = per_cent(row.methods["NASA"], row.plain)
        figures[f"{name}_every"] = per_cent(row.methods["NASA"] + row.keys, row.plain)
        figures[f"{name}_plain"] = f"{row.plain / 1e9:,.0f}"
    return figures


TEXT = """# What guidance costs, in FLOPs

Written by `python research/count_flops.py`. Image models are counted by torch's `FlopCounterMode` on the meta
device, at their true size, batch 1, with our own guidance installed; Wan by the formulas of
`nasa_video/bench/flops.py`, which tests (and, for the bidirectional model, this script) hold against the same
counter. A multiplication and an addition are two operations. Only matrix products and convolutions count: norms,
softmax and the guidance formulas themselves are linear in the width and left out, as everywhere. Text encoders and
the VAE are left out; they are the same for every method but for the encoding of one more prompt.

The paper (arXiv 2412.02687) reports **+{paper} %** for NASA and +100 % for CFG.

## Image models

{images}

"Keys every step" is NASA as published: the negative's keys and values are projected again in every call. They
depend on the prompt alone, so here they are made once a prompt; a one-step model gains nothing from that on its
first picture, and does on every further one.

Why these are not {paper} %:

- **NASA, NAG and VSF cost the same here.** All three are one more attention over the text, 4 S N dim in a layer
  (S image tokens, N text tokens): PixArt 28 x 4 x 1024 x 120 x 1152 = 15.9 GFLOP of {pixart_plain}. They differ
  in what is done with the two outputs, which is not counted.
- **SD 1.5 and 2.1 are lower ({sd15} and {sd21}; {sd15_every} and {sd21_every} with keys every step).** Most of a
  UNet is convolutions and the self-attention of 4,096 tokens, and CLIP has 77 tokens.
- **SDXL is as low ({sdxl})**, although its layers are many: its text attention sits where the picture has 4,096
  and 1,024 tokens, and its 70 layers project keys from 2,048 wide text, which is why keys every step cost more
  ({sdxl_every}).
- **PixArt is the nearest**, and depends on the length of its text, as published by its pipeline 120:

{lengths}

- We have not read which model and text length the paper's figure is for. Its own way of counting (keys in every
  call) gives {sd15_every} (SD 1.5) to {pixart_every} (PixArt at 120 tokens); PixArt with a text of 77 to 80 tokens
  would be at it. The figure is thus confirmed in size, not in its second digit.
- **CFG is +100 %** by construction: the denoiser runs twice.

## FLUX: joint attention

{flux}

FLUX has no cross-attention, and here guidance is not cheap: the negative has a text stream of its own (256
tokens beside 4,096 of the image) through every block, with its projections, MLPs and its own queries over the
whole picture: nearly all of F2's {f2}. F2 and F3 add only Q_image x K_text-, since the image's part of the
softmax is shared. F1 (and NAG, which is published that way) computes a second attention of the image over
[negative text; image], hence {f1}. VSF appends the negative's keys to the one softmax. NAG's public code runs
the single blocks' whole sequence twice, and its authors report +87 % of time.

## Wan 2.1 1.3B, causal, 832 x 480, a chunk of three latent frames

{wan}

Mean over 7 chunks, each its steps and the clean pass, keys of prompts made once; 20 real tokens in the prompt
and 10 in the negative. Wan attends to all 512 padded tokens. Padded keys are equal, so that m of them act like
one whose score carries log m: folded, the guided model costs less than the public unguided one. The positive
prompt is folded too; that is where the gain comes from.

## Wan 2.1, bidirectional, in diffusers' own pipelines

{bidirectional}

`guided(pipe, ...)` leaves the positive prompt to the pipeline, which makes its keys anew at every step; the negative's
are made once, folded, outside the steps. Far below {paper} %: a step is mostly the self-attention of 32,760 tokens,
and a folded negative has {short} keys. Unlike in our own chunk loop there is no gain, since the positive prompt's
padding stays. The last column is NASA as published, on the padded negative.
"""


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/flops.md"))
    options = parser.parse_args()
    table, rows = image_table()
    text = TEXT.format(
        **explained(rows),
        paper=PAPER,
        short=WAN_NEGATIVE,
        images="\n".join(table),
        lengths="\n".join(f"  {line}" for line in length_table(rows["PixArt-alpha 512"], 120)),
        flux="\n".join(flux_table(rows["FLUX.1-schnell 1024"])),
        wan="\n".join(wan_table()),
        bidirectional="\n".join(bidirectional_table()),
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
