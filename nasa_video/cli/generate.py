"""``nasa-video generate``: a prompt and its negatives to a video file."""

from __future__ import annotations

import dataclasses
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from nasa_video.cli.console import chunk_progress, emit_json, say, shown_warnings
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


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video should show.")] = None,
    neg: NegOption = None,
    scale: ScaleOption = None,
    guidance: GuidanceOption = None,
    model: ModelOption = None,
    output: OutputOption = None,
    seed: SeedOption = None,
    steps: StepsOption = None,
    frames: Annotated[int | None, typer.Option(help="Length in frames.")] = None,
    width: WidthOption = None,
    height: HeightOption = None,
    fps: FpsOption = None,
    device: DeviceOption = None,
    timeline: Annotated[
        Path | None, typer.Option(help="YAML file: prompts, negatives and scales at seconds.", show_default=False)
    ] = None,
    recompute: Annotated[
        bool, typer.Option(help="When the prompt changes, make the window's keys again under the new one.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Unguided and guided side by side, and a contact sheet PNG.")
    ] = False,
    source: Annotated[
        Path | None, typer.Option("--from", help="Make the video of this file again; other options replace its own.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Start from this picture; --frames then counts the new frames.")
    ] = None,
    video: Annotated[Path | None, typer.Option(help="Redraw this clip (video to video).")] = None,
    strength: Annotated[float, typer.Option(help="How much of --video is redrawn, above 0 to 1.")] = 0.6,
    lora: LoraOption = None,
    resume: ResumeOption = False,
    guide_steps: Annotated[str, typer.Option(help="Share of the steps that are guided, FIRST:LAST.")] = "0:1",
    guide_layers: Annotated[str, typer.Option(help="Share of the layers that are guided, FIRST:LAST.")] = "0:1",
    scale_steps: Annotated[
        str, typer.Option(help="Shares of the scale over the steps, such as 1,0.5,0 (falling).", show_default="1")
    ] = "",
    scale_layers: Annotated[
        str, typer.Option(help="Shares of the scale over the layers, such as 0,1 (rising).", show_default="1")
    ] = "",
    guide_clean: Annotated[bool, typer.Option(help="Guide the pass that writes the keys for later chunks.")] = True,
    neg_padding: Annotated[
        bool | None, typer.Option(help="Whether the negative's padding takes part; the method's own choice by default.")
    ] = None,
    fold: Annotated[
        bool | None, typer.Option(help="Compute equal padding keys once (exact).", show_default="fold")
    ] = None,
    decoder: DecoderOption = None,
    attention: Annotated[str, typer.Option(help="sdpa or xformers.")] = "sdpa",
    memory: MemoryOption = None,
    weights: WeightsOption = None,
    offload: OffloadOption = None,
    decode_ahead: Annotated[
        int, typer.Option(min=0, max=4, help="Chunks decoded in a thread while the model goes on.")
    ] = 0,
    compiled: CompileOption = "off",
    window: WindowOption = None,
    sink: SinkOption = None,
    rope: RopeOption = None,
    rollout: Annotated[
        int | None,
        typer.Option(
            help="Frames after which a long video starts anew from its last chunk; 0: never.",
            show_default="the model's",
        ),
    ] = None,
    split: Annotated[
        bool, typer.Option("--split", help="One video on all processes of a torchrun, each with its GPU.")
    ] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Watch it in a browser while it is made.")] = False,
    as_json: AsJsonOption = False,
) -> None:
    """Make a video that shows PROMPT and steers away from every --neg."""
    from nasa_video.cli.generation import Request, run
    from nasa_video.recipe import StoredWindow
    from nasa_video.start import StoredStart

    if as_json and output == "-":
        raise typer.BadParameter("the video and the object both want standard output; use -o FILE", param_hint="--json")
    if image is not None and video is not None:
        raise typer.BadParameter("a video starts from one of them", param_hint="--image, --video")
    start = None
    if image is not None:
        start = StoredStart.of_file("image", image, new_frames=frames)
    elif video is not None:
        start = StoredStart.of_file("redraw", video, strength, frames)
    request = Request(
        prompt=prompt,
        negatives=tuple(neg or ()),
        scale=scale,
        guidance=guidance,
        model=model,
        seed=seed,
        steps=steps,
        frames=frames,
        width=width,
        height=height,
        fps=fps,
        device=device,
        timeline=timeline,
        recompute=recompute,
        compare=compare,
        source=source,
        start=start,
        loras=tuple(lora or ()),
        guide_steps=_share(guide_steps, "--guide-steps"),
        guide_layers=_share(guide_layers, "--guide-layers"),
        scale_steps=_shares(scale_steps, "--scale-steps"),
        scale_layers=_shares(scale_layers, "--scale-layers"),
        guide_clean=guide_clean,
        neg_padding=neg_padding,
        fold=fold,
        attention=attention,
        decoder=decoder,
        memory=memory,
        weights=weights,
        offload=offload,
        decode_ahead=decode_ahead,
        compiled=compiled,
        rollout=rollout,
        window=StoredWindow(frames=window, sink=sink, rope=rope),
        split=split,
        resume=resume,
    )
    with shown_warnings(), ExitStack() as stack:
        watch = None
        if split:
            from nasa_video.distributed import process_group

            own = stack.enter_context(process_group(device))
            request = dataclasses.replace(request, device=own.device(device), rank=own.rank)
        if preview and request.rank == 0:
            from nasa_video.serve.preview import Preview

            watch = stack.enter_context(Preview(say)).watch
        result = run(request, output or default_output(prompt, source), chunk_progress, say, watch)
    if as_json and request.rank == 0:
        emit_json(result)


def default_output(prompt: str | None, source: Path | None) -> str:
    """A name from the prompt that no file has yet; a file is only replaced when -o names it."""
    words = source.stem if source is not None else "-".join(re.findall(r"[a-z0-9]+", (prompt or "").lower())[:8])
    stem = words[:60] or "video"
    name, number = f"{stem}.mp4", 2
    while Path(name).exists():
        name, number = f"{stem}-{number}.mp4", number + 1
    return name


def _share(text: str, option: str) -> tuple[float, float]:
    first, colon, last = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return float(first), float(last)
    except ValueError:
        raise typer.BadParameter(f"expected FIRST:LAST such as 0:0.5, got {text!r}", param_hint=option) from None


def _shares(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(share) for share in text.split(",")) if text else ()
    except ValueError:
        raise typer.BadParameter(
            f"expected numbers with commas such as 1,0.5,0, got {text!r}", param_hint=option
        ) from None
