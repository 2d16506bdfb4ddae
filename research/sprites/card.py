"""Measures a trained sprites model and writes its model card."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from causvid_adapter import CausalWan, FlowMatchSchedule
from nasa_video.sprites.detectors import Detector
from nasa_video.sprites.prompt_extension import extend_prompt
from nasa_video.sprites.world import ATTRIBUTES, FLAWS, SHAPES
from research.sprites.assessment import (
    HeldOutPrompt,
    Studio,
    accuracy,
    data_spread,
    held_out_prompts,
    rare_prompts,
    seconds_for,
    spread,
    switch_accuracy,
)
from research.sprites.detector import detector_accuracy, draw_scenes, rendered_clips
from research.sprites.plan import TrainingPlan
from research.sprites.renderer import render

_SPREAD_ATTRIBUTES = ("colour", "background", "motion", "size", "texture", "count", "weather")


def measure(
    plan: TrainingPlan, studio: Studio, detector: Detector, base: CausalWan, student: CausalWan
) -> dict[str, Any]:
    """Everything that the card reports; prompts and seeds are used for nothing else."""
    settings = plan.evaluation
    prompts = held_out_prompts(settings.prompts, settings.prompt_seed)
    texts, seeds = [p.text for p in prompts], [settings.prompt_seed + i for i in range(len(prompts))]
    rare = rare_prompts(prompts, settings.stated_at_least, settings.prompt_seed + 100)
    results: dict[str, Any] = {"detector": _detector_tables(plan, studio, detector), "accuracy": {}, "spread": {}}
    for count in sorted(plan.student.steps, reverse=True):
        name = f"student, {count} step{'s' if count > 1 else ''}"
        more = [settings.prompt_seed + len(seeds) + i for i in range(len(rare))]
        frames = studio.stream(student, [*texts, *(p.text for p in rare)], [*seeds, *more], plan.schedule(count))
        results["accuracy"][name] = accuracy(detector, frames, [*prompts, *rare])
    first = slice(settings.teacher_prompts)
    prompts, texts, seeds = prompts[first], texts[first], seeds[first]
    results["accuracy"]["base, 4 steps, causal"] = accuracy(
        detector, studio.stream(base, texts, seeds, FlowMatchSchedule(1.0, plan.student.steps[4])), prompts
    )
    name = f"teacher, {settings.teacher_steps} steps, guidance {settings.teacher_scale:g}"
    whole = studio.whole(base, texts, seeds, settings.teacher_steps, settings.teacher_scale)
    results["accuracy"][name] = accuracy(detector, whole, prompts)
    results["spread"] = spread_tables(plan, studio, detector, student)
    results["switches"] = switch_accuracy(detector, studio, student, plan.schedule(4), settings.spread_videos)
    results["speed"] = _speed(plan, studio, student)
    results["long"] = _long_rollout(plan, studio, detector, student, prompts[: settings.long_prompts])
    return results


def _detector_tables(plan: TrainingPlan, studio: Studio, detector: Detector) -> dict[str, dict[str, float]]:
    clips = plan.evaluation.detector_clips
    scenes = draw_scenes(clips, 0.03, torch.Generator().manual_seed(plan.evaluation.prompt_seed + 5))
    device = next(studio.vae.parameters()).device
    decoded = rendered_clips(scenes, studio.vae, device).float() / 127.5 - 1
    rendered = torch.cat([render(scenes[slice(i, i + 32)]) for i in range(0, clips, 32)])
    return {
        "rendered": detector_accuracy(detector, rendered, scenes),
        "encoded and decoded": detector_accuracy(detector, decoded, scenes),
    }


def spread_tables(plan: TrainingPlan, studio: Studio, detector: Detector, student: CausalWan) -> dict[str, Any]:
    """Shares of unstated attributes, by name and column.

    Prompts that name a shape and nothing else, the same prompts extended, and the data.
    """
    n, schedule = plan.evaluation.spread_videos, plan.schedule(4)
    texts = [f"a {shape}" for shape in SHAPES for _ in range(n)]
    # seeds of its own for every video: much of what a prompt leaves open is decided by the noise
    seeds = range(57000, 57000 + len(texts))
    columns = {
        "model": texts,
        "model, prompt extended": [extend_prompt(text, seed) for text, seed in zip(texts, seeds, strict=True)],
    }
    frames = {column: studio.stream(student, prompts, seeds, schedule) for column, prompts in columns.items()}
    tables: dict[str, Any] = {}
    for name in (*_SPREAD_ATTRIBUTES, *FLAWS):
        tables[name] = {column: spread(detector, shown, name) for column, shown in frames.items()}
        tables[name]["data"] = data_spread(name, {})
    stars = slice(n * SHAPES.index("star"), n * (SHAPES.index("star") + 1))
    tables["colour of a star"] = {column: spread(detector, shown[stars], "colour") for column, shown in frames.items()}
    tables["colour of a star"]["data"] = data_spread("colour", {"shape": "star"})
    return tables


def _speed(plan: TrainingPlan, studio: Studio, student: CausalWan) -> dict[str, float]:
    schedule = plan.schedule(4)
    latents = torch.randn(1, 9, *plan.latent_size, device=student.device)
    return {
        "33 frames, 4 steps, decoded (s)": seconds_for(lambda: studio.stream(student, ["a red star"], [1], schedule)),
        "of that, decoding (s)": seconds_for(lambda: studio.decode(latents)),
    }


def _long_rollout(
    plan: TrainingPlan, studio: Studio, detector: Detector, student: CausalWan, prompts: list[HeldOutPrompt]
) -> dict[str, Any]:
    """Accuracy in the last 33 of 285 frames, window of 9 latent frames of which 3 are the sink."""
    texts = [p.text for p in prompts]
    frames = studio.stream(student, texts, range(len(texts)), plan.schedule(4), 72, window_frames=9, sink_frames=3)
    return {name: share for name, (share, _) in accuracy(detector, frames[:, -33:], prompts).items()}


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _table(columns: dict[str, dict[str, float]]) -> str:
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for attribute in ATTRIBUTES:
        if any(attribute in column for column in columns.values()):
            cells = [_percent(column.get(attribute)) for column in columns.values()]
            lines.append(f"| {attribute} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _minutes(folder: Path) -> str:
    parts = []
    for name in ("autoencoder", "detector", "base", "student", "reader", "opening"):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            continue
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        seconds, last = 0.0, 0.0
        for line in lines:  # the clock starts again whenever a run is resumed
            seconds += max(line["seconds"] - last, 0.0) if line["seconds"] >= last else line["seconds"]
            last = line["seconds"]
        parts.append(f"{name} {lines[-1]['step']} iterations, {seconds / 60:.0f} minutes")
    return "; ".join(parts)


def _steps_text(plan: TrainingPlan, count: int) -> str:
    """Timesteps of a number of steps, and those of a first chunk where they differ."""
    schedule = plan.schedule(count)
    text = f"{count}: {[round(t) for t in schedule.timesteps]}"
    if schedule.without_history is schedule:
        return text
    alone = schedule.without_history
    return f"{text}, of a first chunk {[round(t) for t in alone.timesteps]}, {alone.euler_steps} of them Euler's"


def write_card(path: Path, plan: TrainingPlan, results: dict[str, Any], folder: Path) -> None:
    """Writes the model card as Markdown."""
    accuracies = {name: {a: share for a, (share, _) in column.items()} for name, column in results["accuracy"].items()}
    counts, fewer = (
        ", ".join(f"{a} {n}" for a, (_, n) in results["accuracy"][name].items())
        for name in (next(iter(results["accuracy"])), "base, 4 steps, causal")
    )
    spreads = [
        f"| {name} | "
        + " | ".join(", ".join(f"{v} {_percent(s)}" for v, s in column.items()) for column in table.values())
        + " |"
        for name, table in results["spread"].items()
    ]
    switched = ", ".join(f"{name} {_percent(value)}" for name, value in results["switches"].items())
    hardware = (folder / "hardware.txt").read_text(encoding="utf-8").strip()
    speed = "; ".join(f"{name} {value:.2f}" for name, value in results["speed"].items())
    long = ", ".join(f"{name} {_percent(value)}" for name, value in results["long"].items())
    notes_file = folder / "notes.md"
    notes = f"\n## Notes on this run\n{notes_file.read_text(encoding='utf-8')}" if notes_file.exists() else ""
    steps = "; ".join(_steps_text(plan, count) for count in plan.student.steps)
    opened = (
        ". Then the opening: what a prompt leaves open is settled by the noise (docs/method/variety.md)"
        if plan.opening.iterations
        else ""
    )
    path.write_text(
        f"""# Model card: sprites

Written by `research/train_sprites.py`; every number is measured by the detectors on prompts and seeds that nothing was
chosen on.

- **What**: a causal few-step video model of 64 x 64 pictures, {plan.base.frames_per_chunk} latent frames a chunk:
  diffusers' `WanTransformer3DModel` and `AutoencoderKLWan`, text by wordllama token embeddings ({plan.text_tokens}
  tokens). `weights/transformer` is the student, `weights/teacher/transformer` the multi-step base, `weights/vae` the
  autoencoder, `weights/detector.safetensors` what measures them.
- **Steps** (timesteps as they are, not warped; trained with shift {plan.base.shift:g}): {steps}.
- **Data**: {plan.dataset.clips} clips and {plan.dataset.short_clips} first chunks of others, drawn by
  `nasa_video.sprites.world`, captioned anew at every use; captions whose SHA-1 is a multiple of 20 are never
  trained on.
- **Recipe**: {_minutes(folder)}. Flow matching: {100 * plan.base.short_share:.0f} % of
  the batches are first chunks alone, the others whole clips, bidirectional or block-causal, and in
  {100 * plan.base.switched_share:.0f} % of these the scene and its caption change between two chunks. Then self-forcing
  distribution matching with the teacher's guidance at {plan.student.teacher_scale:g}{opened}.
- **Hardware**: {hardware}. **Speed** ({platform.machine()}, {torch.get_num_threads()} threads): {speed}.
- **Licence**: Apache-2.0, weights and data.

## Accuracy on held-out captions that state everything, %
{_table(accuracies)}

Prompts that state each attribute: {counts}; of base and teacher {fewer}.
Of two objects shapes and colours are compared as sets: which object has which colour is not measured.

Three chunks after the text changed one value in the middle of a video (n = {plan.evaluation.spread_videos} each), the
new value is shown: {switched}.

In the last 33 of 285 frames (window 9, sink 3 latent frames, n = {plan.evaluation.long_prompts}): {long}.

## Spread: attributes that the prompt does not state, %
Prompts "a circle" to "a ring", {plan.evaluation.spread_videos} each, 4 steps; extended as by
`--extend-prompt`, which writes what a prompt leaves open, drawn by the video's seed.

| | model | model, prompt extended | data |
|---|---|---|---|
{chr(10).join(spreads)}

## The detectors' own accuracy on unseen clips, %
{_table(results["detector"])}
{notes}""",
        encoding="utf-8",
    )
