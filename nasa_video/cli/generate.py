"""``nasa-video generate``: a prompt and its negatives to a video file."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasa_video.cli.console import chunk_progress, emit_json, say, shown_warnings
from nasa_video.cli.option_groups import LoadOptions, VideoOptions, grouped
from nasa_video.cli.options import AsJsonOption, OnChangeOption, OutputOption

if TYPE_CHECKING:
    from nasa_video.video.inputs import StoredStart


@dataclass(frozen=True)
class GuideOptions:
    """Where and how strongly guidance acts inside a pass."""

    guide_steps: Annotated[str, typer.Option(help="Share of the steps that are guided, FIRST:LAST.")] = "0:1"
    guide_layers: Annotated[str, typer.Option(help="Share of the layers that are guided, FIRST:LAST.")] = "0:1"
    scale_steps: Annotated[
        str, typer.Option(help="Shares of the scale over the steps, such as 1,0.5,0 (falling).", show_default="1")
    ] = ""
    scale_layers: Annotated[
        str, typer.Option(help="Shares of the scale over the layers, such as 0,1 (rising).", show_default="1")
    ] = ""
    guide_clean: Annotated[bool, typer.Option(help="Guide the pass that writes the keys for later chunks.")] = True
    neg_padding: Annotated[
        bool | None, typer.Option(help="Whether the negative's padding takes part; the method's own choice by default.")
    ] = None
    fold: Annotated[bool | None, typer.Option(help="Compute equal padding keys once (exact).", show_default="fold")] = (
        None
    )
    attention: Annotated[str, typer.Option(help="sdpa or xformers.")] = "sdpa"

    @property
    def asked(self) -> dict[str, Any]:
        """As the fields of a ``generation.Request``."""
        return {
            **vars(self),
            "guide_steps": _share(self.guide_steps, "--guide-steps"),
            "guide_layers": _share(self.guide_layers, "--guide-layers"),
            "scale_steps": _shares(self.scale_steps, "--scale-steps"),
            "scale_layers": _shares(self.scale_layers, "--scale-layers"),
        }


@dataclass(frozen=True)
class StartOptions:
    """What a video starts from beside noise."""

    image: Annotated[
        Path | None, typer.Option(help="Start from this picture; --frames then counts the new frames.")
    ] = None
    video: Annotated[Path | None, typer.Option(help="Redraw this clip (video to video).")] = None
    strength: Annotated[float, typer.Option(help="How much of --video is redrawn, above 0 to 1.")] = 0.6

    def stored(self, frames: int | None) -> StoredStart | None:
        """The start of a video of so many (new) frames."""
        from nasa_video.video.inputs import StoredStart

        if self.image is not None and self.video is not None:
            raise typer.BadParameter("a video starts from one of them", param_hint="--image, --video")
        if self.image is not None:
            return StoredStart.of_file("image", self.image, new_frames=frames)
        if self.video is not None:
            return StoredStart.of_file("redraw", self.video, self.strength, frames)
        return None


@grouped
def generate(
    video: VideoOptions,
    load: LoadOptions,
    start: StartOptions,
    guide: GuideOptions,
    prompt: Annotated[str | None, typer.Argument(help="What the video should show.")] = None,
    output: OutputOption = None,
    frames: Annotated[int | None, typer.Option(help="Length in frames.")] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="YAML file: prompts, negatives and scales at seconds.", show_default=False)
    ] = None,
    on_change: OnChangeOption = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Unguided and guided side by side, and a contact sheet PNG.")
    ] = False,
    source: Annotated[
        Path | None, typer.Option("--from", help="Make the video of this file again; other options replace its own.")
    ] = None,
    decode_ahead: Annotated[
        int, typer.Option(min=0, max=4, help="Chunks decoded in a thread while the model goes on.")
    ] = 0,
    rollout: Annotated[
        int | None,
        typer.Option(
            help="Frames after which a long video starts anew from its last chunk; 0: never.",
            show_default="the model's",
        ),
    ] = None,
    extend_prompt: Annotated[
        bool,
        typer.Option("--extend-prompt", help="Write into PROMPT what it leaves open, as the seed has it (sprites)."),
    ] = False,
    split: Annotated[
        bool, typer.Option("--split", help="One video on all processes of a torchrun, each with its GPU.")
    ] = False,
    preview: Annotated[bool, typer.Option("--preview", help="Watch it in a browser while it is made.")] = False,
    as_json: AsJsonOption = False,
) -> None:
    """Make a video that shows PROMPT and steers away from every --neg."""
    from nasa_video.cli.generation import Request, run

    if as_json and output == "-":
        raise typer.BadParameter("the video and the object both want standard output; use -o FILE", param_hint="--json")
    request = Request(
        prompt=prompt,
        frames=frames,
        start=start.stored(frames),
        timeline=timeline,
        on_change=on_change,
        compare=compare,
        source=source,
        decode_ahead=decode_ahead,
        rollout=rollout,
        split=split,
        extend_prompt=extend_prompt,
        **video.asked,
        **load.asked,
        **guide.asked,
    )
    with shown_warnings(), ExitStack() as stack:
        watch = None
        if split:
            from nasa_video.jobs.processes import process_group

            own = stack.enter_context(process_group(load.device))
            request = dataclasses.replace(request, device=own.device(load.device), rank=own.rank)
        if preview and request.rank == 0:
            from nasa_video.serve.preview import Preview

            watch = stack.enter_context(Preview(say)).watch
        result = run(request, output or default_output(prompt, source), chunk_progress, say, watch)
    if as_json and request.rank == 0:
        emit_json(result)


def default_output(prompt: str | None, source: Path | None) -> str:
    """A name from the prompt that no file has yet; a file is only replaced when -o names it."""
    from nasa_video.files.atomic import slug

    stem = source.stem[:60] if source is not None else slug(prompt or "")
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
