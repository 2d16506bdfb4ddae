"""Draws the README's pictures from the shipped model (seeds 0 to 2, none chosen): make_pictures.py [FOLDER]."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from nasa_video import VideoPipeline
from nasa_video.files.frames import Frames
from nasa_video.files.sheets import contact_sheet, side_by_side
from nasa_video.files.sinks import open_sink
from nasa_video.sprites.prompt_extension import extend_prompt

EXAMPLES = {
    "blurry": ("a big red star on a light background, blurry", "blurry"),
    "colour": ("a big blue ball on a dark background", "blue"),
    "background": ("a big yellow heart moving up on a starry background", "starry background"),
}
SEEDS = (0, 1, 2)


METHODS = ("nasa", "nasa-centred")


def video(pipeline: VideoPipeline, prompt: str, negative: str | None, method: str, seed: int) -> Frames:
    """All frames of one video, at the model's own scale."""
    guidance = pipeline.guidance(method) if negative else None
    chunks = pipeline.stream(prompt, negative=negative, guidance=guidance, seed=seed)
    return np.concatenate([chunk.frames for chunk in chunks])


def of_seeds(pipeline: VideoPipeline, prompt: str, extended: bool) -> list[tuple[str, Frames]]:
    """What one short prompt becomes, as it is or with --extend-prompt, by seed."""
    texts = {seed: extend_prompt(prompt, seed, pipeline.text_encoder) if extended else prompt for seed in range(6)}
    return [(f'"{text}", seed {seed}', video(pipeline, text, None, "none", seed)) for seed, text in texts.items()]


def main() -> None:
    """One contact sheet and one side-by-side video an example, and sheets of a short prompt."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = VideoPipeline.from_pretrained("sprites")
    for name, (prompt, negative) in EXAMPLES.items():
        rows, wide = [], []
        for seed in SEEDS:
            videos = [video(pipeline, prompt, None, "none", seed)]
            rows.append((f'"{prompt}", seed {seed}', videos[0]))
            for method in METHODS:
                videos.append(video(pipeline, prompt, negative, method, seed))
                scale = pipeline.guidance(method).scale
                rows.append((f'the same with --neg "{negative}" --guidance {method}, scale {scale:g}', videos[-1]))
            labels = ["without", *(f"--neg {negative}, {method}" for method in METHODS)]
            wide.append(side_by_side(videos, labels, scale=2))
        contact_sheet(rows, columns=5).save(folder / f"{name}.png")
        with open_sink(folder / f"{name}.mp4", pipeline.preset.video.fps) as sink:
            sink.write(np.concatenate(wide))
        print(folder / f"{name}.png", folder / f"{name}.mp4")
    for name, extended in (("variety", False), ("extended", True)):
        contact_sheet(of_seeds(pipeline, "a star", extended), columns=5).save(folder / f"{name}.png")
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
