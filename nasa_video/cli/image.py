"""``nasa-video image``: a prompt and its negatives to a picture, or to a sweep over scales."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasa_video.cli.console import effect_text, emit_json, say
from nasa_video.cli.options import AsJsonOption, DeviceOption, GuidanceOption, NegOption, guidance_of, negatives_of

if TYPE_CHECKING:
    from nasa_video.guidance.methods import Guidance
    from nasa_video.guidance.state import Effect
    from nasa_video.guidance.terms import Negative
    from nasa_video.images.pipeline import ImagePipeline


def image(
    prompt: Annotated[str, typer.Argument(help="What the picture should show.")],
    neg: NegOption = None,
    guidance: GuidanceOption = None,
    model: Annotated[str | None, typer.Option(help="Preset or preset file.", show_default="dmd2-sdxl-4step")] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="FILE.png, .jpg or .webp; several get numbers.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same picture.")] = 0,
    count: Annotated[int, typer.Option(help="Pictures, with the seeds from --seed on.", min=1, max=64)] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the model's own by default.", min=1)] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels.", min=8)] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels.", min=8)] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="One picture of a sweep over scales: a column a scale, a row a seed.")
    ] = False,
    scales: Annotated[
        str | None, typer.Option(help="Scales of --grid, such as 0,0.25,0.5; around the model's own by default.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="The model's own weights on this machine: a folder, a state dict or a LoRA.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Folder of the base pipeline in diffusers' layout, instead of the hub's.")
    ] = None,
    device: DeviceOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Draw a picture that shows PROMPT and steers away from every --neg, with a one-step or few-step model."""
    from nasa_video.errors import InputError
    from nasa_video.guidance.terms import as_negatives
    from nasa_video.images.pipeline import ImagePipeline
    from nasa_video.images.presets import DEFAULT_IMAGE_MODEL, find_image_preset

    if not prompt.strip():
        raise InputError("the prompt is empty; say what the picture should show")
    preset = find_image_preset(model or DEFAULT_IMAGE_MODEL)
    negatives = as_negatives(negatives_of(neg))
    method = guidance_of(guidance) or "nasa"
    method = f"nasa{method}" if method.startswith(":") else method
    chosen = None if method == "none" else preset.make_guidance(method)
    sweep = _read_scales(scales) if scales else preset.sweep("nasa" if method == "none" else method)
    if (grid or scales) and (not negatives or chosen is None):
        raise InputError("a sweep over scales needs something to steer away from: give --neg, and a --guidance")
    path = Path(output or _default_name(prompt))
    run = _Run(
        prompt,
        negatives,
        chosen,
        method.partition(":")[0].partition(",")[0],
        preset.name,
        seed,
        count,
        steps,
        width,
        height,
    )
    columns = [preset.make_guidance(method, one) for one in sweep] if grid or scales else []  # a wrong one fails here
    pipeline = ImagePipeline.from_preset(preset, base=base, weights=weights, device=device)
    result = run.sweep(pipeline, columns, path) if columns else run.single(pipeline, path)
    if as_json:
        emit_json(result)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What was asked for."""

    prompt: str
    negatives: tuple[Negative, ...]
    guidance: Guidance | None
    method: str
    model: str
    seed: int
    count: int
    steps: int | None
    width: int | None
    height: int | None

    def single(self, pipeline: ImagePipeline, path: Path) -> dict[str, Any]:
        """Draw and write; returns what ``--json`` prints."""
        from nasa_video.files.images import save_image

        pictures = self._draw(pipeline, self.guidance)
        paths = [path if self.count == 1 else path.with_stem(f"{path.stem}-{i}") for i in range(self.count)]
        for index, (one, picture) in enumerate(zip(paths, pictures.images, strict=True)):
            save_image(picture, one, self._metadata(self.guidance, self.seed + index, pictures.effect))
        say(", ".join(str(one) for one in paths) + f": {self.model}, seed {self.seed}")
        _say_effect(pictures.effect)
        return self._result([str(one) for one in paths], pictures.effect)

    def sweep(self, pipeline: ImagePipeline, columns: list[Guidance], path: Path) -> dict[str, Any]:
        """Draw every scale and write one picture."""
        from nasa_video.files.images import save_image
        from nasa_video.files.sheets import label_grid

        drawn = [self._draw(pipeline, one) for one in columns]
        rows = [(f"seed {self.seed + row}", [pictures.images[row] for pictures in drawn]) for row in range(self.count)]
        labels = [[f"{one.label} {one.scale:g}" for one in columns]] * self.count
        caption = f"{self.model}: {self.prompt} | without: " + ", ".join(n.text for n in self.negatives)
        effect = next((pictures.effect for pictures in reversed(drawn) if pictures.effect), None)
        metadata = self._metadata(self.guidance, self.seed, effect) | {"scales": [one.scale for one in columns]}
        save_image(label_grid(rows, labels, caption), path, metadata)
        say(f"{path}: {self.model}, {self.method} at {', '.join(f'{one.scale:g}' for one in columns)}")
        _say_effect(effect)
        return self._result([str(path)], effect) | {"scales": metadata["scales"]}

    def _draw(self, pipeline: ImagePipeline, guidance: Guidance | None) -> Any:
        return pipeline.draw(
            self.prompt,
            self.negatives,
            guidance,
            seed=self.seed,
            count=self.count,
            steps=self.steps,
            width=self.width,
            height=self.height,
        )

    def _metadata(self, guidance: Guidance | None, seed: int, effect: Effect | None) -> dict[str, Any]:
        from nasa_video import __version__
        from nasa_video.guidance.methods import spell

        return {
            "nasa_video_image": {
                "prompt": self.prompt,
                "negatives": [dataclasses.asdict(one) for one in self.negatives],
                "guidance": spell(guidance) if guidance else None,
                "model": self.model,
                "seed": seed,
                "steps": self.steps,
                "effect": dataclasses.asdict(effect) if effect else None,
                "version": __version__,
            }
        }

    def _result(self, outputs: list[str], effect: Effect | None) -> dict[str, Any]:
        return {
            "outputs": outputs,
            "model": self.model,
            "seed": self.seed,
            "guidance": self.method if self.negatives and self.guidance else "none",
            "effect": dataclasses.asdict(effect) if effect else None,
        }


def _say_effect(effect: Effect | None) -> None:
    if effect is not None:
        say(effect_text(effect))


def _read_scales(text: str) -> tuple[float, ...]:
    from nasa_video.errors import InputError

    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--scales takes numbers such as 0,0.25,0.5, got {text!r}") from None
    if len(scales) > 20:
        raise InputError(f"--scales takes at most 20 scales, got {len(scales)}")
    return scales


def _default_name(prompt: str) -> str:
    """A name from the prompt that no file has yet."""
    stem = "-".join(re.findall(r"[a-z0-9]+", prompt.lower())[:8])[:60] or "picture"
    name, number = f"{stem}.png", 2
    while Path(name).exists():
        name, number = f"{stem}-{number}.png", number + 1
    return name
