"""Picks one of several students by prompts that no card is measured on, and writes it.

    python research/choose_weights.py new.safetensors student --share 0.25 --share 0.5 --output best.safetensors

The candidates are the models, names in nasa_video/sprites/weights or files, and means of the first and each of the
others with every share. The best is right about everything that a caption states most often, mean over 4, 2 and 1 steps
and over two kinds of captions: those of the world's scenes, and as many again of scenes with a rare attribute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKLWan
from measure_variety import WEIGHTS, model_of, plan_named, read
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import save_file

from causvid_adapter import FlowMatchSchedule
from nasa_video.sprites.detectors import Detector
from nasa_video.text import WordLlamaEncoder
from research.sprites.assessment import HeldOutPrompt, Studio, accuracy, held_out_prompts, rare_prompts

PROMPT_SEED = 4242


def choose(
    models: Annotated[list[str], typer.Argument(help="student, base, or .safetensors files.")],
    output: Annotated[Path, typer.Option(help="Where the best one is written, in float16.")],
    share: Annotated[list[float] | None, typer.Option(help="What the second model of a mean counts.")] = None,
    prompts: Annotated[
        int, typer.Option(help="Captions that state everything; as many again are of what is rare.")
    ] = 300,
    plan: Annotated[
        str, typer.Option(help="The plan that trained them, of research/configs: it has their steps.")
    ] = "sprites",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Prints every candidate's accuracies and writes the best."""
    trained = plan_named(plan)
    vae = AutoencoderKLWan.from_pretrained(WEIGHTS / "vae", low_cpu_mem_usage=False).float().eval().to(device)
    studio, detector = Studio(vae, WordLlamaEncoder(24)), Detector.load(WEIGHTS / "detector.safetensors")
    detector.network.to(device)
    first = read(models[0])
    candidates = {name: read(name) for name in models}
    for name in models[1:]:
        for part in share or []:
            mean = {key: value.lerp(candidates[name][key], part) for key, value in first.items()}
            candidates[f"{models[0]} and {part:.0%} of {name}"] = mean
    usual = held_out_prompts(prompts, PROMPT_SEED)
    rare = rare_prompts([], max(1, prompts // 9), PROMPT_SEED)  # nine attributes are rare
    steps = trained.student.steps
    scores = {}
    with Progress() as progress:
        task = progress.add_task("candidates", total=len(candidates) * len(steps))
        for name, weights in candidates.items():
            # float16 is what the package holds
            model = model_of({key: value.half().float() for key, value in weights.items()}).to(torch.device(device))
            columns = {}
            for count in steps:
                columns[count] = _measured(studio, detector, model, trained.schedule(count), usual, rare)
                progress.advance(task)
            everything = [column[kind] for column in columns.values() for kind in ("usual", "rare")]
            scores[name] = sum(everything) / len(everything)
            table = Table("", *(f"{count} steps" for count in columns), title=f"{name}: {100 * scores[name]:.1f}")
            for row in next(iter(columns.values())):
                table.add_row(row, *(f"{100 * column[row]:.1f}" for column in columns.values()))
            progress.console.print(table)
    best = max(scores, key=lambda name: scores[name])
    print(f"best: {best}")
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in candidates[best].items()}, output)


def _measured(
    studio: Studio,
    detector: Detector,
    model: torch.nn.Module,
    schedule: FlowMatchSchedule,
    usual: list[HeldOutPrompt],
    rare: list[HeldOutPrompt],
) -> dict[str, float]:
    """Shares right: everything by kind of captions, and each attribute over both."""
    both = [*usual, *rare]
    frames = studio.stream(model, [p.text for p in both], range(len(both)), schedule)  # type: ignore[arg-type]
    found = detector.detect(frames)
    right = [all(found[a][i] == value for a, value in p.stated.items()) for i, p in enumerate(both)]
    shares = {"usual": sum(right[: len(usual)]) / len(usual), "rare": sum(right[len(usual) :]) / len(rare)}
    return shares | {name: share for name, (share, _) in accuracy(detector, frames, both).items()}


if __name__ == "__main__":
    typer.run(choose)
