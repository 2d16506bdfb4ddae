"""What a model shows of what prompts leave open, and whether its noise decides it: the tables of docs/variety.md.

    python scripts/measure_variety.py student base --noise          names in nasa_video/sprites/weights, or files
    python scripts/measure_variety.py old.safetensors --mean new.safetensors --share 0.5 --share 0.62
    python scripts/measure_variety.py base --teacher 16 --scale 1.75
    python scripts/measure_variety.py student --told --noise

Prints, in percent, the shares among "a circle" to "a ring", how many captions that state everything are right, and in
how many videos an attribute has the value that the start noise stands for, beside what chance would give.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from causvid_adapter import CausalWan
from causvid_adapter.noise import SeededNoise
from nasa_video.sprites.captions import Caption, full_caption
from nasa_video.sprites.detectors import Detector
from nasa_video.sprites.world import ATTRIBUTES, SHAPES, Scenes, sample_scenes
from nasa_video.text import WordLlamaEncoder
from nasa_video.training.assessment import Studio, accuracy, held_out_prompts, spread
from nasa_video.training.attention import trainable
from nasa_video.training.choices import CHUNK_LATENTS, NoiseChoices

WEIGHTS = Path(__file__).resolve().parent.parent / "nasa_video" / "sprites" / "weights"
PLACES = {"student": "transformer", "base": "teacher/transformer"}
FIRST_SEED = 7000
ACCURACY_SEED = 77
Make = Callable[[Sequence[str], Sequence[int]], Tensor]


def read(name: str) -> dict[str, Tensor]:
    """Weights of a name in the package, or of a file."""
    folder = WEIGHTS / PLACES[name] if name in PLACES else None
    path = folder / "diffusion_pytorch_model.safetensors" if folder else Path(name)
    if not path.exists():
        raise typer.BadParameter(f"{name} is neither one of {', '.join(PLACES)} nor a file")
    return {key: value.float() for key, value in load_file(path).items()}


def model_of(weights: dict[str, Tensor]) -> CausalWan:
    """The shipped architecture with these weights."""
    config = WanTransformer3DModel.load_config(WEIGHTS / PLACES["student"])
    transformer = WanTransformer3DModel.from_config(config)
    transformer.load_state_dict(weights)
    return trainable(transformer).eval().requires_grad_(False)


def stood_for(seeds: Sequence[int], latent_size: tuple[int, int, int], videos: int) -> Scenes:
    """What the start noise of these seeds stands for, with `videos` of each shape."""
    scenes = sample_scenes(len(seeds), torch.Generator().manual_seed(0))
    scenes = replace(scenes, shape=torch.arange(len(SHAPES)).repeat_interleave(videos))
    captions = [Caption("", frozenset({"shape"}))] * len(seeds)
    return NoiseChoices(latent_size).settle(SeededNoise(seeds, latent_size)(range(CHUNK_LATENTS), 0), scenes, captions)


def agreement(found: dict[str, list[str]], shown: Scenes) -> dict[str, str]:
    """By attribute: percent of videos that show what their noise stands for, and percent by chance.

    By chance is what the same videos would give with the noise of one another.
    """
    table = {}
    for name in set(ATTRIBUTES) - {"shape"}:
        labels = list(ATTRIBUTES[name])
        # two objects' colours are read as "red and blue": not one of the values, left out
        pairs = [
            (labels.index(label), int(v))
            for label, v in zip(found[name], getattr(shown, name), strict=True)
            if label in labels
        ]
        values, wanted = (
            torch.nn.functional.one_hot(torch.tensor(column), len(labels)).float()
            for column in zip(*pairs, strict=True)
        )
        hit, chance = (values * wanted).sum(1).mean(), (values.mean(0) * wanted.mean(0)).sum()
        table[name] = f"{100 * float(hit):.0f} ({100 * float(chance):.0f})"
    return {name: table[name] for name in ATTRIBUTES if name in table}


def measure(
    first: Annotated[list[str], typer.Argument(help="student, base, or .safetensors files.")],
    mean: Annotated[str, typer.Option(help="A second model, to average the first ones with.")] = "",
    share: Annotated[list[float] | None, typer.Option(help="What the second one counts.")] = None,
    timesteps: Annotated[str, typer.Option(help="Of the loop.")] = "1000,750,500,250",
    teacher: Annotated[int, typer.Option(help="Euler steps of the bidirectional teacher in place of the loop.")] = 0,
    scale: Annotated[float, typer.Option(help="The teacher's classifier-free guidance, 1 is none.")] = 1.0,
    videos: Annotated[int, typer.Option(help="For each shape.")] = 24,
    captions: Annotated[int, typer.Option(help="That state everything.")] = 96,
    noise_too: Annotated[bool, typer.Option("--noise", help="Also whether the noise decides.")] = False,
    told: Annotated[
        bool, typer.Option("--told", help="Prompts state what the noise stands for: what reading it would give.")
    ] = False,
) -> None:
    """Prints the shares, the accuracy and the agreement with the noise, model by model."""
    try:
        steps = tuple(float(t) for t in timesteps.split(","))
    except ValueError:
        raise typer.BadParameter(f"--timesteps takes numbers with commas between, got {timesteps}") from None
    vae = AutoencoderKLWan.from_pretrained(WEIGHTS / "vae", low_cpu_mem_usage=False).float().eval()
    studio, detector = Studio(vae, WordLlamaEncoder(24)), Detector.load(WEIGHTS / "detector.safetensors")
    texts = [f"a {shape}" for shape in SHAPES for _ in range(videos)]
    seeds = range(FIRST_SEED, FIRST_SEED + len(texts))
    decided = stood_for(seeds, studio.latent_size, videos)
    if told:
        texts = [full_caption(decided.row(i), random.Random(i)).text for i in range(len(texts))]
    prompts = held_out_prompts(captions, ACCURACY_SEED)
    for name in first:
        for part in (share or [0.5]) if mean else [0.0]:
            weights, other = read(name), read(mean) if mean else None
            model = model_of({k: v.lerp(other[k], part) for k, v in weights.items()} if other else weights)

            def make(texts: Sequence[str], seeds: Sequence[int], model: CausalWan = model) -> Tensor:
                if teacher:
                    return studio.whole(model, texts, seeds, teacher, scale)
                return studio.stream(model, texts, seeds, steps)

            sampler = f"{teacher} Euler steps, guidance {scale:g}" if teacher else f"timesteps {timesteps}"
            print(f"\n{name}{f', {part:.0%} of {mean}' if mean else ''}, {sampler}, {len(texts)} videos")
            frames = make(texts, seeds)
            for attribute in ATTRIBUTES:
                values = spread(detector, frames, attribute).items()
                print(f"  {attribute}: " + ", ".join(f"{value} {100 * shown:.0f}" for value, shown in values))
            shown = make([p.text for p in prompts], range(captions))
            right = accuracy(detector, shown, prompts)
            print("  right (of): " + ", ".join(f"{a} {100 * hit:.0f} ({n})" for a, (hit, n) in right.items()))
            found = detector.detect(shown)
            whole = sum(all(found[a][i] == v for a, v in p.stated.items()) for i, p in enumerate(prompts))
            print(f"  everything right: {100 * whole / captions:.0f} ({captions})")
            if noise_too:
                table = agreement(detector.detect(frames), decided)
                print("  as the noise says (by chance): " + ", ".join(f"{a} {value}" for a, value in table.items()))


if __name__ == "__main__":
    typer.run(measure)
