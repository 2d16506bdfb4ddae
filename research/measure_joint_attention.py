"""Compares F1, F2 and F3 of NASA, NAG and VSF by pictures that a tiny few-step FLUX draws.

    python research/measure_joint_attention.py [--folder runs/joint] [--seeds 0 1] [--seconds 60]
                                             [--page docs/method/joint_attention.md]

Each method's scale is chosen on half of the prompts and reported on the other half. Everything is kept in the folder
as it is made: --seconds of CPU time end a run, and the next one goes on. Nothing here speaks about the real FLUX's
pictures; see docs/method/joint_attention.md.
"""

# B samples, S image tokens, C values of a patch

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from joint_tables import METHODS, Method, choose, section, write_page
from joint_world import COUNTS, PAD, Text, World, sample, train, word_numbers
from torch import Tensor

from nasa_video.backbones.base import NegativeContext
from nasa_video.integrations.diffusers.guided import guided

CANDIDATES = {"open": 16, "conflict": 6, "other": 6, "empty": 6}
"""Noises tried a question: without the word, few show what it names."""
KEPT = {"choose": 1, "report": 2}
"""How many of those that show it are kept a question."""


@dataclass(frozen=True)
class Cases:
    """Samples of one kind of question that all show the unwanted thing without guidance.

    Attributes:
        noise: (B, 16, 12).
        prompt, negative: words, (B, 3).
        shown: labels of the unguided picture, (B, 3).
        prop: index of the property that the negative names, or would if it were not empty, (B,).
        question: number of the (prompt, negative), (B,): samples of one are alike.
        limit: root mean square distance that 95 % of the unguided pictures of the choosing half stay below.
    """

    noise: Tensor
    prompt: Tensor
    negative: Tensor
    shown: Tensor
    prop: Tensor
    question: Tensor
    limit: float


def find_questions(half: str) -> tuple[Tensor, Tensor]:
    """All (shape, colour, background) of one half, (Q, 3), each with every property to be removed, (Q,)."""
    triples = torch.cartesian_prod(*(torch.arange(n) for n in COUNTS))
    triples = triples[triples.sum(dim=1) % 2 == (half == "report")]
    return triples.repeat_interleave(3, dim=0), torch.arange(3).repeat(len(triples))


def find_cases(model: Any, world: World, text: Text, half: str, kind: str, steps: int, limit: float) -> Cases:
    """Samples whose unguided picture shows all that the triple says.

    Kinds: ``open``: the prompt leaves out what the negative names; ``conflict``: the prompt asks for it; ``other``:
    the negative names another value, that nobody asked for; ``empty``: the negative is padding alone.
    """
    triples, props = find_questions(half)
    row = torch.arange(len(triples))
    prompt = word_numbers(triples)
    named = triples.clone()
    if kind == "open":
        prompt[row, props] = PAD
    if kind == "other":
        named[row, props] = (triples[row, props] + 1) % torch.tensor(COUNTS)[props]
    negative = torch.zeros_like(prompt)
    if kind != "empty":
        negative[row, props] = word_numbers(named)[row, props]
    g = torch.Generator().manual_seed(10 * steps + (half == "report"))
    tried = CANDIDATES[kind]
    noise = torch.randn(len(row) * tried, 16, 12, generator=g)
    owner = row.repeat_interleave(tried)
    found, far = world.nearest(sample(model, noise, text(prompt[owner]), steps))
    right = (found == triples[owner]).all(dim=1) & (far <= limit)
    rank = right.view(-1, tried).cumsum(dim=1).flatten()
    kept = right & (rank <= KEPT[half])
    owner = owner[kept]
    return Cases(noise[kept], prompt[owner], negative[owner], triples[owner], props[owner], owner, limit)


def ordinary_distance(model: Any, world: World, text: Text, steps: int) -> tuple[float, float]:
    """95th percentile of the unguided pictures' distances, and the share of prompts that they show."""
    triples, _ = find_questions("choose")
    g = torch.Generator().manual_seed(99 + steps)
    labels = triples[::3].repeat(16, 1)
    noise = torch.randn(len(labels), 16, 12, generator=g)
    found, far = world.nearest(sample(model, noise, text(word_numbers(labels)), steps))
    return float(far.quantile(0.95)), float((found == labels).all(dim=1).float().mean())


def outcomes(model: Any, world: World, text: Text, cases: Cases, method: Method, scale: float, steps: int) -> Any:
    """What became of each sample: is it gone, is all else held, is it still a picture of this world."""
    embeds, pooled = text(cases.negative)
    with guided(model, NegativeContext(embeds, pooled=pooled), method.guidance(scale), joint=method.joint):
        found, far = world.nearest(sample(model, cases.noise, text(cases.prompt), steps))
    same = found == cases.shown
    mine = torch.nn.functional.one_hot(cases.prop, 3).bool()
    return {
        "gone": (~same & mine).any(dim=1).int().tolist(),
        "held": (same | mine).all(dim=1).int().tolist(),
        "whole": (far <= cases.limit).int().tolist(),
        "question": cases.question.tolist(),
    }


Scales = Mapping[str, Sequence[float]]
"""By method."""


class Notebook:
    """Results by cell, written as they are made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def keep(self, key: str, value: Any) -> None:
        """Add one cell."""
        self.cells[key] = value
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(self.cells))
        temporary.replace(self.path)


def work(
    notebook: Notebook, seed: int, model: Any, world: World, text: Text, half: str, steps: int, scales: Scales
) -> Iterator[str]:
    """Make the missing cells of one half; yields after each."""
    if f"{seed} {steps} model" not in notebook.cells:
        limit, right = ordinary_distance(model, world, text, steps)
        notebook.keep(f"{seed} {steps} model", {"limit": limit, "right": right})
    limit = notebook.cells[f"{seed} {steps} model"]["limit"]
    for kind in ("open", "conflict") if half == "choose" else ("open", "conflict", "other", "empty"):
        wanted = {
            f"{seed} {steps} {half} {kind} {method.name} {scale:g}": (method, scale)
            for method in METHODS
            for scale in scales[method.name]
        }
        missing = {key: case for key, case in wanted.items() if key not in notebook.cells}
        if missing:
            cases = find_cases(model, world, text, half, kind, steps, limit)
            for key, (method, scale) in missing.items():
                notebook.keep(key, outcomes(model, world, text, cases, method, scale, steps))
                yield key


def run(
    folder: Path, seeds: Sequence[int], step_counts: Sequence[int], train_steps: int, seconds: float
) -> dict[str, Any] | None:
    """Go on where the folder stands; None where the time ended first."""
    deadline = time.process_time() + seconds
    enough = lambda: time.process_time() > deadline  # noqa: E731
    folder.mkdir(parents=True, exist_ok=True)
    world, text, notebook = World.make(), Text(), Notebook(folder / "cells.json")
    models = {}
    for seed in seeds:
        models[seed] = train(world, text, seed, train_steps, folder / f"model-{seed}.pt", enough)
        if models[seed] is None:
            return None
    for steps in step_counts:
        scales: Scales = {method.name: method.scales for method in METHODS}
        for half in ("choose", "report"):
            for seed, model in models.items():
                for key in work(notebook, seed, model, world, text, half, steps, scales):
                    print(f"{key}: {time.process_time():.0f} s of CPU", flush=True)
                    if enough():
                        return None
            scales = {method.name: [choose(notebook.cells, seeds, steps, method)] for method in METHODS}
    return notebook.cells


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/joint"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 1], help="step counts to sample at")
    parser.add_argument("--train-steps", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="CPU time after which to stop")
    parser.add_argument("--page", type=Path, help="write the tables between this page's marks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = run(options.folder, options.seeds, options.steps, options.train_steps, options.seconds)
    if cells is None:
        print("not finished: run the same command again, it goes on from here")
        return
    text = section(cells, options.seeds, options.steps, options.train_steps)
    print(text)
    if options.page:
        write_page(options.page, text)


if __name__ == "__main__":
    main()
