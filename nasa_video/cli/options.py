"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from causvid_adapter.window import OnChange, read_on_change

NegOption = Annotated[
    list[str] | None,
    typer.Option("--neg", help="What must not be there: TEXT or TEXT:WEIGHT. Give it once a term.", show_default=False),
]
ScaleOption = Annotated[float | None, typer.Option(help="Strength of the guidance; the model's own by default.")]
GuidanceOption = Annotated[
    str | None, typer.Option(help="nasa, nasa-centred, nag, vsf, cfg or none.", show_default="the model's own")
]
ModelOption = Annotated[str | None, typer.Option(help="Preset, folder, or hub id.", show_default="sprites")]
OutputOption = Annotated[
    str | None,
    typer.Option("-o", "--output", help="FILE.mp4, .webm, .gif, a folder DIR/ of PNG files, or - for a stream."),
]
SeedOption = Annotated[int | None, typer.Option(help="Same seed, same video.", show_default="0")]
StepsOption = Annotated[int | None, typer.Option(help="Denoising steps a chunk.")]
FirstStepsOption = Annotated[
    int | None,
    typer.Option(help="Steps of the first chunk, and of each that shows something new.", show_default="as the others"),
]
FpsOption = Annotated[float | None, typer.Option(help="Frames a second of the file.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...", show_default="cuda if there is one")]
AsJsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on the last line.")]
MemoryOption = Annotated[
    str | None,
    typer.Option(help="full, auto, or the gigabytes of the card: 24, 16, 12 ...", show_default="full"),
]
WeightsOption = Annotated[
    str | None, typer.Option(help="plain, int8 or fp8 weights; what --memory chooses by default.", show_default=False)
]
LoraOption = Annotated[
    list[str] | None, typer.Option("--lora", help="LoRA FILE or FILE:SCALE; may be given more than once.")
]
DecoderOption = Annotated[
    str | None, typer.Option(help="full, or tiny: a fast decoder for previews.", show_default="full")
]
CompileOption = Annotated[str, typer.Option("--compile", help="off, on (torch.compile) or graphs (and CUDA graphs).")]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Keep what is needed to go on after a kill, and go on where it is there.")
]
WidthOption = Annotated[int | None, typer.Option(help="Width in pixels, as the model makes it.")]
HeightOption = Annotated[int | None, typer.Option(help="Height in pixels, as the model makes it.")]
WindowOption = Annotated[
    int | None,
    typer.Option(
        min=0, help="Latent frames (4 pictures each) that are remembered; 0: all.", show_default="the model's"
    ),
]
SinkOption = Annotated[
    int | None,
    typer.Option(min=0, help="First latent frames that never leave the window.", show_default="the model's"),
]
RopeOption = Annotated[
    str | None,
    typer.Option(
        help="Positions: absolute (of the whole video) or window (inside the window: those the model was trained on).",
        show_default="the model's",
    ),
]


def _on_change(value: str) -> OnChange:
    try:
        return read_on_change(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


OnChangeOption = Annotated[
    OnChange | None,
    typer.Option(
        parser=_on_change,
        metavar="[keep|recache|regenerate]",
        help="Where prompt, negatives or guidance change, the window's frames: keep, recache (the same frames, read "
        "under the new text) or regenerate (made again for it, unseen).",
        show_default="the model's",
    ),
]
OffloadOption = Annotated[
    bool | None,
    typer.Option(
        "--offload/--no-offload", help="Keep the blocks in the host's memory; as --memory chooses.", show_default=False
    ),
]
