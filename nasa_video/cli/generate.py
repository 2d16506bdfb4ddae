"""``nasa-video generate``: a prompt and its negatives to a video file."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nasa_video.cli.console import chunk_progress, emit_json, loading_line, say, shown_warnings
from nasa_video.cli.lean import start_lean
from nasa_video.cli.options import (
    OUTPUT,
    SHOWN,
    SIZE,
    SPEED,
    START,
    AsJsonOption,
    AttentionOption,
    ModelOptions,
    OnChangeOption,
    OutputOption,
    PromptArgument,
    TimelineOption,
    VideoOptions,
    grouped,
    option,
    requested,
    run_options,
)

if TYPE_CHECKING:
    from nasa_video.video.request import StartFile


@dataclass(frozen=True)
class StartOptions:
    """What a video starts from beside noise."""

    image: Annotated[Path | None, option("Start from this still; --frames counts the new ones.", panel=START)] = None
    video: Annotated[Path | None, option("Redraw this clip.", panel=START)] = None
    strength: Annotated[
        float | None, option("How much of --video is redrawn, above 0 to 1.", panel=START, default="0.6")
    ] = None
    source: Annotated[
        Path | None, option("Make this file again; other options replace its own.", "--from", panel=START)
    ] = None

    @property
    def start(self) -> StartFile | None:
        """The file that is named."""
        from nasa_video.video.request import StartFile

        if self.image is not None and self.video is not None:
            raise typer.BadParameter("a video starts from one of them", param_hint="--image, --video")
        if self.strength is not None and self.video is None:
            raise typer.BadParameter("it is for a clip that is redrawn; give --video", param_hint="--strength")
        if self.image is not None:
            return StartFile.of_file("image", self.image)
        if self.video is not None:
            return StartFile.of_file("redraw", self.video, 0.6 if self.strength is None else self.strength)
        return None


@grouped
def generate(
    video: VideoOptions,
    model: ModelOptions,
    start: StartOptions,
    prompt: PromptArgument = None,
    output: OutputOption = None,
    frames: Annotated[int | None, option("Length in frames.", panel=SIZE, default="the model's")] = None,
    timeline: TimelineOption = None,
    on_change: OnChangeOption = None,
    extend_prompt: Annotated[
        bool, option("Write into PROMPT what it leaves open (sprites).", "--extend-prompt", panel=SHOWN)
    ] = False,
    compare: Annotated[bool, option("Unguided and guided side by side.", "--compare", panel=OUTPUT)] = False,
    preview: Annotated[bool, option("Watch in a browser.", "--preview", panel=OUTPUT)] = False,
    rollout: Annotated[
        int | None, option("Frames after which it starts again; 0: never.", panel=SIZE, default="the model's")
    ] = None,
    attention: AttentionOption = "sdpa",
    fold: Annotated[bool | None, option("Compute equal padding keys once.", panel=SPEED, default="fold")] = None,
    decode_ahead: Annotated[int, option("Chunks decoded in a thread.", panel=SPEED, min=0, max=4)] = 0,
    split: Annotated[bool, option("One video on all processes of a torchrun.", "--split", panel=SPEED)] = False,
    as_json: AsJsonOption = False,
) -> None:
    """Make a video that shows PROMPT and steers away from every --neg."""
    if as_json and output == "-":
        raise typer.BadParameter("the video and the object both want standard output; use -o FILE", param_hint="--json")
    said = {
        "prompt": prompt, "frames": frames, "start": start.start, "on_change": on_change, "compare": compare or None,
        "rollout": rollout, "extend_prompt": extend_prompt or None, "fold_padding": fold,
    }  # fmt: skip
    request = requested({**said, **video.said, **model.said}, start.source, timeline)
    loading = model.loading(attention=attention, decode_ahead=decode_ahead)
    with shown_warnings(), loading_line(request.model), ExitStack() as stack:
        start_lean(request, loading)
        from nasa_video.cli.generation import run

        options = run_options(video, loading)
        if split:
            import dataclasses

            from nasa_video.jobs.processes import process_group

            own = stack.enter_context(process_group(model.device))
            loading = dataclasses.replace(loading, device=own.device(model.device))
            options = run_options(video, loading, split, own.rank)
        watch = None
        if preview and options.rank == 0:
            from nasa_video.serve.preview import Preview

            watch = stack.enter_context(Preview(say)).watch
        result = run(request, output or default_output(prompt, start.source), options, chunk_progress, say, watch)
    if as_json and options.rank == 0:
        emit_json(result)


def default_output(prompt: str | None, source: Path | None) -> str:
    """A name from the prompt that no file has yet; a file is only replaced when -o names it."""
    from nasa_video.files.atomic import slug

    stem = source.stem[:60] if source is not None else slug(prompt or "")
    name, number = f"{stem}.mp4", 2
    while Path(name).exists():
        name, number = f"{stem}-{number}.mp4", number + 1
    return name
