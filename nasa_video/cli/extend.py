"""``nasa-video extend``: go on from a clip."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nasa_video.cli.console import chunk_progress, emit_json, say, shown_warnings
from nasa_video.cli.generate import default_output
from nasa_video.cli.options import (
    AsJsonOption,
    CompileOption,
    DecoderOption,
    DeviceOption,
    FpsOption,
    GuidanceOption,
    HeightOption,
    LoraOption,
    MemoryOption,
    ModelOption,
    NegOption,
    OffloadOption,
    OutputOption,
    ResumeOption,
    RopeOption,
    ScaleOption,
    SeedOption,
    SinkOption,
    StepsOption,
    WeightsOption,
    WidthOption,
    WindowOption,
)


def extend(
    clip: Annotated[Path, typer.Argument(help="The video to go on from.")],
    prompt: Annotated[str, typer.Argument(help="What it should go on to show.")],
    neg: NegOption = None,
    scale: ScaleOption = None,
    guidance: GuidanceOption = None,
    model: ModelOption = None,
    output: OutputOption = None,
    frames: Annotated[int | None, typer.Option(help="New frames to add.")] = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    width: WidthOption = None,
    height: HeightOption = None,
    fps: FpsOption = None,
    device: DeviceOption = None,
    memory: MemoryOption = None,
    weights: WeightsOption = None,
    offload: OffloadOption = None,
    lora: LoraOption = None,
    decoder: DecoderOption = None,
    compiled: CompileOption = "off",
    window: WindowOption = None,
    sink: SinkOption = None,
    rope: RopeOption = None,
    resume: ResumeOption = False,
    as_json: AsJsonOption = False,
) -> None:
    """Continue CLIP: its frames fill the model's memory, and what comes after them is written behind them."""
    from nasa_video.cli.generation import Request, run
    from nasa_video.recipe import StoredWindow
    from nasa_video.start import StoredStart

    with shown_warnings():
        request = Request(
            prompt=prompt,
            negatives=tuple(neg or ()),
            scale=scale,
            guidance=guidance,
            model=model,
            seed=seed,
            steps=steps,
            width=width,
            height=height,
            fps=fps,
            device=device,
            memory=memory,
            weights=weights,
            offload=offload,
            loras=tuple(lora or ()),
            decoder=decoder,
            compiled=compiled,
            window=StoredWindow(frames=window, sink=sink, rope=rope),
            resume=resume,
            start=StoredStart.of_file("extend", clip, new_frames=frames),
        )
        result = run(request, output or default_output(prompt, None), chunk_progress, say)
    if as_json:
        emit_json(result)
