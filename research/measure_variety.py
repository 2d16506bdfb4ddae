"""What a model shows of what prompts leave open, beside the data: the tables of docs/method/variety.md.

    python research/measure_variety.py student               a name in nasa_video/sprites/weights, or a file
    python research/measure_variety.py student --extended    with prompts as --extend-prompt writes them
    python research/measure_variety.py old.safetensors --mean new.safetensors --share 0.5 --share 0.62
    python research/measure_variety.py base --teacher 16 --scale 1.75
    python research/measure_variety.py opening.safetensors --plan sprites-opening

Prints, in percent, the shares among "a circle" to "a ring" with those of the data in brackets, how far they are apart,
and how many captions that state everything are right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from causvid_adapter import CausalWan, FlowMatchSchedule
from nasa_video.sprites.detectors import Detector
from nasa_video.sprites.prompt_extension import extend_prompt
from nasa_video.sprites.world import ATTRIBUTES, SHAPES
from nasa_video.text import WordLlamaEncoder
from research.sprites.assessment import Studio, accuracy, data_spread, held_out_prompts, spread
from research.sprites.attention import trainable
from research.sprites.plan import TrainingPlan, load_plan

WEIGHTS = Path(__file__).resolve().parent.parent / "nasa_video" / "sprites" / "weights"
PLANS = WEIGHTS.parent.parent.parent / "research" / "configs"
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


def plan_named(name: str) -> TrainingPlan:
    """The plan of a name in research/configs."""
    if not (PLANS / f"{name}.yaml").exists():
        raise typer.BadParameter(f"--plan must be one of {', '.join(sorted(p.stem for p in PLANS.glob('sprites*')))}")
    return load_plan(PLANS / f"{name}.yaml")


def model_of(weights: dict[str, Tensor]) -> CausalWan:
    """The shipped architecture with these weights."""
    config = WanTransformer3DModel.load_config(WEIGHTS / PLACES["student"])
    transformer = WanTransformer3DModel.from_config(config)
    transformer.load_state_dict(weights)
    return trainable(transformer).eval().requires_grad_(False)


def measure(
    first: Annotated[list[str], typer.Argument(help="student, base, or .safetensors files.")],
    mean: Annotated[str, typer.Option(help="A second model, to average the first ones with.")] = "",
    share: Annotated[list[float] | None, typer.Option(help="What the second one counts.")] = None,
    steps: Annotated[int, typer.Option(help="Of the loop, as the plan has them.")] = 4,
    plan: Annotated[str, typer.Option(help="The plan that trained the model, of research/configs.")] = "sprites",
    timesteps: Annotated[str, typer.Option(help="Of the loop, the same for all chunks, such as 1000,750,500.")] = "",
    teacher: Annotated[int, typer.Option(help="Euler steps of the bidirectional teacher in place of the loop.")] = 0,
    scale: Annotated[float, typer.Option(help="The teacher's classifier-free guidance, 1 is none.")] = 1.0,
    videos: Annotated[int, typer.Option(help="For each shape.")] = 24,
    captions: Annotated[int, typer.Option(help="That state everything.")] = 96,
    extended: Annotated[bool, typer.Option("--extended", help="Prompts as --extend-prompt writes them.")] = False,
) -> None:
    """Prints the shares and the accuracy, model by model."""
    trained = plan_named(plan)
    try:
        given = tuple(float(t) for t in timesteps.split(",")) if timesteps else ()
        schedule = FlowMatchSchedule(1.0, given) if given else trained.schedule(steps)
    except ValueError as error:
        raise typer.BadParameter(f"{error}; --timesteps takes falling numbers with commas between") from None
    vae = AutoencoderKLWan.from_pretrained(WEIGHTS / "vae", low_cpu_mem_usage=False).float().eval()
    studio, detector = Studio(vae, WordLlamaEncoder(24)), Detector.load(WEIGHTS / "detector.safetensors")
    texts = [f"a {shape}" for shape in SHAPES for _ in range(videos)]
    seeds = range(FIRST_SEED, FIRST_SEED + len(texts))
    if extended:
        texts = [extend_prompt(text, seed) for text, seed in zip(texts, seeds, strict=True)]
    prompts = held_out_prompts(captions, ACCURACY_SEED)
    for name in first:
        for part in (share or [0.5]) if mean else [0.0]:
            weights, other = read(name), read(mean) if mean else None
            model = model_of({k: v.lerp(other[k], part) for k, v in weights.items()} if other else weights)

            def make(texts: Sequence[str], seeds: Sequence[int], model: CausalWan = model) -> Tensor:
                if teacher:
                    return studio.whole(model, texts, seeds, teacher, scale)
                return studio.stream(model, texts, seeds, schedule)

            sampler = f"{teacher} Euler steps, guidance {scale:g}" if teacher else f"timesteps {timesteps or steps}"
            print(f"\n{name}{f', {part:.0%} of {mean}' if mean else ''}, {sampler}, {len(texts)} videos")
            frames = make(texts, seeds)
            distances = {}
            for attribute in ATTRIBUTES:
                shares, wanted = spread(detector, frames, attribute), data_spread(attribute, {})
                if attribute != "shape":  # the prompts name it
                    distances |= {(attribute, v): abs(share - wanted.get(v, 0)) for v, share in shares.items()}
                values = ", ".join(f"{v} {100 * s:.0f} ({100 * wanted.get(v, 0):.0f})" for v, s in shares.items())
                print(f"  {attribute}: {values}")
            far = ", ".join(f"{a} {v}" for (a, v), distance in distances.items() if distance > 0.1)
            mean_distance = 100 * sum(distances.values()) / len(distances)
            print(f"  apart: {mean_distance:.1f} points in the mean; by more than 10: {far or 'none'}")
            shown = make([p.text for p in prompts], range(captions))
            right = accuracy(detector, shown, prompts)
            print("  right (of): " + ", ".join(f"{a} {100 * hit:.0f} ({n})" for a, (hit, n) in right.items()))
            found = detector.detect(shown)
            whole = sum(all(found[a][i] == v for a, v in p.stated.items()) for i, p in enumerate(prompts))
            print(f"  everything right: {100 * whole / captions:.0f} ({captions})")


if __name__ == "__main__":
    typer.run(measure)
