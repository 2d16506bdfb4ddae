"""Variants of NASA side by side on the shipped model, on the choosing prompts: docs/method/formulas.md quotes it.

    python research/measure_variants.py --n 48

For every variant the share of videos that lost the unwanted feature, that held everything else, and both. A variant is
worth having where it beats plain NASA at every scale, not at one.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import typer
from torch import Tensor

from nasa_video.evaluation.cases import MAIN, attributes_of, build_cases
from nasa_video.evaluation.removal import KINDS, Method, SpritesJudge, cells, removal_table
from nasa_video.evaluation.report import summary
from nasa_video.guidance.attention import Attend, TextKeys
from nasa_video.guidance.formulas import nasa, projection_coefficient, shares
from nasa_video.guidance.methods import CentredNasa, Guidance, GuidedAttention, Nag, Nasa, Vsf
from nasa_video.guidance.schedule import EVERYWHERE, ScaleSchedule
from nasa_video.sprites.captions import caption_stating, value_names
from nasa_video.sprites.world import ATTRIBUTES, FLAWS, sample_scenes
from nasa_video.video.pipeline import VideoPipeline

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


@dataclass(frozen=True)
class NasaVariant(Nasa):
    """``Z = Z+ - scale B``, where B is not the negative's whole attention output.

    own: B = sum of p_i v_i over the negative's own tokens; padding stays in the softmax, so that a query that does not
    care for the negative gives its mass to the padding and is left alone. Without it B is the whole output.
    `keep_norm` gives every token the norm of Z+ back.
    """

    own: bool = False
    keep_norm: bool = False

    def __call__(
        self, q: Tensor, positive: TextKeys, negatives: Sequence[tuple[TextKeys, float]], attend: Attend
    ) -> GuidedAttention:
        """Guide one layer; folded keys, whose last one is the padding."""
        z_pos = attend(q, positive)
        subtracted = torch.zeros_like(z_pos)
        for (keys, _), share in zip(negatives, shares(negatives), strict=True):
            if self.own:
                keys = replace(keys, v=torch.cat((keys.v[:, :-1], torch.zeros_like(keys.v[:, -1:])), 1))
            subtracted = subtracted + share * attend(q, keys)
        z = nasa(z_pos, subtracted, scale=self.scale)
        if self.keep_norm:
            z = (z * (_norm(z_pos) / _norm(z).clamp_min(1e-9))).to(z.dtype)
        return GuidedAttention(z, z_pos, torch.zeros((), device=q.device))


@dataclass(frozen=True)
class CentredVariant(CentredNasa):
    """``Z = Z+ - S``, where S is made of what a negative adds to the padding, D = Z- - Z0.

    whole: S = scale D, of no token longer than this share of |Z+|.
    project: S = scale D + project P, where P is the part of Z+ - Z0 that points along D: what the prompt says itself of
    what the negative names. `by_head` takes lengths and parts head by head, not of a token's whole output.
    """

    whole: float | None = None
    project: float = 0.0
    by_head: bool = False

    @property
    def active(self) -> bool:
        """False where nothing is subtracted."""
        return self.scale > 0 or self.project > 0

    def __call__(
        self, q: Tensor, positive: TextKeys, negatives: Sequence[tuple[TextKeys, float]], attend: Attend
    ) -> GuidedAttention:
        """Guide one layer."""
        over = (-1,) if self.by_head else (-2, -1)
        z_pos = attend(q, positive)
        z = z_pos
        for keys, weight in negatives:
            assert keys.padding_v is not None
            added = attend(q, keys) - keys.padding_v
            step = self.scale * weight * added
            if self.whole is not None:
                longest = self.whole * z_pos.norm(dim=over, keepdim=True)
                step = step * (longest / step.norm(dim=over, keepdim=True).clamp_min(1e-9)).clamp(max=1)
            along = ((z_pos - keys.padding_v) * added).sum(over, keepdim=True).clamp_min(0)
            part = along / added.square().sum(over, keepdim=True).clamp_min(1e-9) * added
            z = z - step - self.project * weight * part
        return GuidedAttention(z.to(z_pos.dtype), z_pos, torch.zeros((), device=q.device))


class Parts:
    """No guidance: lets through what the prompt says, and notes what NASA would subtract of it."""

    scale = 1.0
    negative_padding = True
    schedule = EVERYWHERE
    active = True
    name: ClassVar[str] = "nasa"

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(
        self, q: Tensor, positive: TextKeys, negatives: Sequence[tuple[TextKeys, float]], attend: Attend
    ) -> GuidedAttention:
        """Note |Z-|, |Z0| and |Z- - Z0| in multiples of |Z+|, means over the layer's tokens, and the conflict c.

        The latter's mean is weighted by what it multiplies, |Z- - Z0|^2 of a token and head.
        """
        z_pos, (keys, _) = attend(q, positive), negatives[0]
        assert keys.padding_v is not None
        z_neg, z_empty = attend(q, keys), keys.padding_v.expand_as(z_pos)
        lengths = [_norm(z).mean() for z in (z_neg, z_empty, z_neg - z_empty, z_pos)]
        weight = (z_neg - z_empty).square().sum(-1, keepdim=True)
        conflict = (weight * projection_coefficient(z_pos - z_empty, z_neg - z_empty)).sum() / weight.sum()
        self.seen.append(torch.stack([*(length / lengths[3] for length in lengths[:3]), conflict]))
        # a run whose guidance changes nothing is refused: the effect is told wrongly, the output is not changed
        return GuidedAttention(z_pos, 2 * z_pos, torch.zeros((), device=q.device))


def what_is_subtracted(attributes: Sequence[str], steps: int, n: int = 8) -> str:
    """By kind of case and attribute: the lengths of NASA's branch and of its two parts in multiples of |Z+|, and c."""
    pipeline = VideoPipeline.from_pretrained("sprites")
    lines = ["| case | attribute | whole branch Z- | padding Z0 | Z- - Z0 | conflict c |", "|---|---|---|---|---|---|"]
    for kind in KINDS:
        for attribute in (name for name in attributes_of(kind) if name in attributes):
            parts, cases = Parts(), build_cases(attribute, kind, n, "choose")
            chunks = pipeline.stream_batch(
                [case.prompt for case in cases],
                seeds=[case.seed for case in cases],
                negatives=[(case.negative,) for case in cases],
                guidance=parts,  # type: ignore[arg-type]
                frames=9,
                steps=steps,
            )
            list(chunks)
            means = torch.stack(parts.seen).mean(0).tolist()
            lines.append(f"| {kind} | {attribute} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return "\n".join(lines) + "\n"


THREE = {"weather": "snow", "noisy": "noisy", "border": "border"}


def several_negatives(steps: int, n: int) -> str:
    """Three things that the prompt states, forbidden by three negatives or by one list of them."""
    pipeline, judge = VideoPipeline.from_pretrained("sprites"), SpritesJudge()
    prompts, kept = [], []
    for seed in range(n):
        names = {"count": 0, "texture": 0, "weather": ATTRIBUTES["weather"].index("snow"), **dict.fromkeys(FLAWS, 0)}
        scene = sample_scenes(1, torch.Generator().manual_seed(seed)).replace(**{**names, "noisy": 1, "border": 1})
        row = scene.row(0)
        prompts.append(caption_stating(row, frozenset({*MAIN, *THREE}), random.Random(seed)).text)
        kept.append({name: value_names(row)[name] for name in MAIN})
    tried: list[Guidance | None] = [
        None,
        Nasa(1.0),
        CentredNasa(1.0),
        CentredNasa(0.5),
        CentredNasa(0.35, conflict=3.0),
    ]
    tried.append(Vsf(1.0))
    tried.append(Nag(1.5, 2.5, 0.5, negative_padding=False))
    lines = ["| | negatives | all three removed | all else held | both |", "|---|---|---|---|---|"]
    for guidance in tried:
        ways = {"three": tuple(THREE.values()), "one list": (", ".join(THREE.values()),)}
        for way, terms in ways.items() if guidance else (("none", ()),):
            removed, held = [], []
            for start in range(0, n, 24):
                part = slice(start, min(n, start + 24))
                chunks = pipeline.stream_batch(
                    prompts[part],
                    seeds=list(range(n)[part]),
                    negatives=[terms] * len(prompts[part]) if guidance else None,
                    guidance=guidance,
                    frames=33,
                    steps=steps,
                )
                videos = np.concatenate([chunk.frames for chunk in chunks], axis=1)
                for found, wanted in zip(judge(list(videos)), kept[part], strict=True):
                    removed.append(all(found[name] != value for name, value in THREE.items()))
                    held.append(all(found[name] == value for name, value in wanted.items()))
            both = sum(r and h for r, h in zip(removed, held, strict=True))
            label = f"{guidance.name} {guidance.scale:g}" if guidance else "none"
            if isinstance(guidance, CentredNasa) and guidance.conflict:
                label += f", conflict {guidance.conflict:g}"
            counts = (sum(removed), sum(held), both)
            lines.append(f"| {label} | {way} | {' | '.join(f'{count / n:.0%}' for count in counts)} |")
    return "\n".join(lines) + "\n"


def _norm(x: Tensor) -> Tensor:
    norms: Tensor = x.float().flatten(-2).norm(dim=-1)
    return norms[..., None, None]


def methods(only: str) -> list[Method]:
    """Everything that is tried, or what has one of these words in its label (with commas between)."""
    tried: list[tuple[str, Guidance | None]] = [("none", None)]
    tried += [(f"NASA:{scale:g}", Nasa(scale)) for scale in (0.5, 0.75, 1.0, 1.25)]
    tried.append(("NASA, no padding:0.1", Nasa(0.1, negative_padding=False)))
    tried.append(("NASA, norm kept:1", NasaVariant(1.0, keep_norm=True)))
    tried += [(f"centred:{scale:g}", CentredNasa(scale)) for scale in (0.5, 0.75, 1.0, 1.25, 1.5)]
    tried.append(("own tokens:1.25", NasaVariant(1.25, own=True)))
    for scale, limit in ((1.25, 0.3), (1.25, 0.4), (1.25, 0.5), (2.0, 0.4), (2.0, 0.5)):
        tried.append((f"centred, at most {limit:g} |Z+|:{scale:g}", CentredVariant(scale, whole=limit)))
    for scale, project in ((0.0, 1.0), (0.25, 1.0), (0.5, 0.5), (0.5, 1.0), (0.75, 0.5)):
        label = f"centred, and {project:g} times the prompt's part:{scale:g}"
        tried.append((label, CentredVariant(scale, project=project)))
    label = "centred, and 1 times the prompt's part, by head:0.5"
    tried.append((label, CentredVariant(0.5, project=1.0, by_head=True)))
    for conflict, scales in (
        (1.0, (0.5, 0.75, 1.0)),
        (2.0, (0.25, 0.35, 0.5, 0.55, 0.75)),
        (3.0, (0.25, 0.3, 0.35, 0.4)),
        (4.0, (0.25, 0.35)),
    ):
        tried += [
            (f"centred, conflict {conflict:g}:{scale:g}", CentredNasa(scale, conflict=conflict)) for scale in scales
        ]
    tried += [(f"VSF:{scale:g}", Vsf(scale)) for scale in (0.7, 1.0, 1.4)]
    tried += [(f"NAG, no padding:{scale:g}", Nag(scale, 2.5, 0.5, negative_padding=False)) for scale in (1.5, 2)]
    schedules = {
        "first half of the steps": ScaleSchedule(last_step=0.5),
        "last half of the steps": ScaleSchedule(first_step=0.5),
        "first half of the layers": ScaleSchedule(last_layer=0.5),
        "last half of the layers": ScaleSchedule(first_layer=0.5),
        "clean pass unguided": ScaleSchedule(clean_pass=False),
    }
    tried += [(f"centred, {name}:1", CentredNasa(1.0, schedule=schedule)) for name, schedule in schedules.items()]
    words = only.split(",")
    return [Method(label, guidance) for label, guidance in tried if any(word in label for word in words)]


def _share(index: int, processes: int, n: int, attributes: list[str], steps: int, only: str, folder: Path) -> list[Row]:
    """Every process's share of the cells, with a journal of its own."""
    torch.set_num_threads(1)
    pipeline = VideoPipeline.from_pretrained("sprites")
    plan = [
        cell
        for kind in KINDS
        for cell in cells(methods(only), [steps], [kind], [a for a in attributes_of(kind) if a in attributes])
    ]
    done = 0

    def tell(cell: object, row: Row) -> None:
        nonlocal done
        done += 1
        if index == 0:
            print(f"{done} of {len(plan[index::processes])} cells in this process", end="\r", flush=True)

    mine = plan[index::processes]
    journal = folder / f"{steps}-steps-{index}.jsonl"
    return removal_table(
        pipeline, mine, SpritesJudge(), n=n, split="choose", frames=33, batch=24, journal=journal, tell=tell
    )


def _markdown(rows: list[Row], n: int, attributes: str, steps: int, only: str) -> str:
    lines = [
        f"{n} videos a cell, {steps} steps, attributes {attributes}; removed / held / both in %, and the mean of both.",
        "",
        "| | unmentioned | stated | conflict | mean | out of range |",
        "|---|---|---|---|---|---|",
    ]
    by_label: dict[str, dict[str, Row]] = {}
    for row in summary(rows):
        by_label.setdefault(row["label"], {})[row["case"]] = row
    for label, kinds in ((method.label, by_label[method.label]) for method in methods(only)):
        shares = [
            " / ".join(f"{100 * kinds[kind][column]:.0f}" for column in ("removed", "held", "both"))
            if kind in kinds
            else ""
            for kind in KINDS
        ]
        mean = sum(row["both"] for row in kinds.values()) / len(kinds)
        out = sum(row["out_of_range"] for row in kinds.values()) / len(kinds)
        lines.append(f"| {label} | {' | '.join(shares)} | {100 * mean:.1f} | {out:.2%} |")
    return "\n".join(lines) + "\n"


def main(
    n: Annotated[int, typer.Option("--n", help="Videos a cell.")] = 48,
    attributes: Annotated[str, typer.Option(help="Comma list.")] = "colour,background,shape,weather,blurry,border",
    steps: Annotated[int, typer.Option(help="Few-step count.")] = 4,
    processes: Annotated[int, typer.Option(help="Processes side by side.")] = os.cpu_count() or 1,
    only: Annotated[str, typer.Option(help="Words, with commas: variants with one of them in their label.")] = "",
    folder: Annotated[Path, typer.Option(help="Where finished cells are kept.")] = ROOT / "runs" / "variants",
    docs: Annotated[Path, typer.Option(help="Where the tables are written.")] = ROOT / "runs" / "variants",
) -> None:
    """Measures all variants; a rerun goes on where it stopped."""
    path = files("nasa_video.sprites") / "weights" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    folder = folder / weights
    folder.mkdir(parents=True, exist_ok=True)
    shares = [(i, processes, n, attributes.split(","), steps, only, folder) for i in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        rows = [row for part in pool.starmap(_share, shares, chunksize=1) for row in part]
    command = f"python research/measure_variants.py --n {n} --steps {steps} --attributes {attributes}"
    command += f' --only "{only}"' if only else ""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    table = f"""# Variants of NASA, {steps} steps

    {command}

The shipped student (SHA-256 {weights}...), commit {commit.stdout.strip()}, choosing prompts; docs/method/formulas.md
says what follows.

{_markdown(rows, n, attributes, steps, only)}
## What NASA subtracts, in multiples of |Z+|

Means over tokens, layers, steps and the first chunks of 8 unguided videos; c weighted by what it multiplies.

{what_is_subtracted(attributes.split(","), steps)}
## Three negatives at once

Prompts that state snow, noise and a border; {n} videos a row. NASA and NAG share their scale among the negatives.

{several_negatives(steps, n)}"""
    (docs / f"method-{steps}-steps.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    typer.run(main)
