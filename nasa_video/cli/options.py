"""Options that several commands share, in panels; a command takes dataclasses of them, and their fields are options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from causvid_adapter.window import OnChange, read_on_change

if TYPE_CHECKING:
    from nasa_video.cli.generation import RunOptions
    from nasa_video.video.request import LoadOptions, VideoRequest

SHOWN, NEGATIVES, SIZE = "What is shown", "Negatives", "Size and length"
START, MODEL, SPEED, OUTPUT = "Starting from", "Model", "Memory and speed", "Output"


def option(help: str, *names: str, panel: str | None = None, default: Any = None, **more: Any) -> Any:
    """A Typer option; ``default`` is shown as it is."""
    if default is not None:
        more["show_default"] = default
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def default_command(name: str) -> type[TyperGroup]:
    """A group in which ``GROUP WORD`` is ``GROUP NAME WORD``, unless the word is one of its commands or options."""

    class WithDefault(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            own = {option for parameter in self.get_params(ctx) for option in parameter.opts}
            if args and args[0] not in self.commands and args[0] not in own:
                args = [name, *args]
            return super().parse_args(ctx, args)

    return WithDefault


PromptArgument = Annotated[str | None, typer.Argument(help="What the video should show.", show_default=False)]
NegOption = Annotated[
    list[str] | None,
    option('What must not be there: "blurry, rain:0.4"; may be repeated.', "--neg", panel=NEGATIVES, default=False),
]
GuidanceOption = Annotated[
    list[str] | None,
    option(
        "How negatives act: nasa, nasa-centred, nag, vsf, cfg or none, with its scale and settings.",
        panel=NEGATIVES,
        default="the model's own",
        metavar="METHOD[:SCALE][,SETTING=VALUE]",
    ),
]
ModelOption = Annotated[str | None, option("Preset, folder, or hub id.", panel=MODEL, default="sprites")]
OutputOption = Annotated[
    str | None,
    option("FILE.mp4, .webm, .gif, a folder DIR/ of PNG files, or - for a stream.", "-o", "--output", panel=OUTPUT),
]
SeedOption = Annotated[int | None, option("Same seed, same video.", panel=SHOWN, default="0")]
TimelineOption = Annotated[
    Path | None, option("YAML file: prompts and negatives at seconds.", panel=SHOWN, default=False)
]
StepsOption = Annotated[int | None, option("Denoising steps a chunk.", panel=MODEL, default="the model's")]
FirstChunkStepsOption = Annotated[
    int | None, option("Steps of chunks that show something new.", panel=MODEL, default="as the others")
]
DeviceOption = Annotated[str | None, option("cpu, cuda, cuda:1 ...", panel=SPEED, default="cuda if there is one")]
AttentionOption = Annotated[str, option("sdpa or xformers.", panel=SPEED)]
AsJsonOption = Annotated[bool, option("One JSON object on the last line.", "--json", panel=OUTPUT)]
MemoryOption = Annotated[
    str | None, option("full, auto, or the gigabytes of the card: 24, 16 ...", panel=SPEED, default="full")
]


def _on_change(value: str) -> OnChange:
    try:
        return read_on_change(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


OnChangeOption = Annotated[
    OnChange | None,
    option(
        "Where texts change, the window's frames: kept, cached again, or generated again.",
        panel=SHOWN,
        default="the model's",
        parser=_on_change,
        metavar="[keep|recache|regenerate]",
    ),
]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is loaded."""

    model: ModelOption = None
    lora: Annotated[
        list[str] | None, option("LoRA FILE or FILE:SCALE; may be repeated.", panel=MODEL, default=False)
    ] = None
    decoder: Annotated[str | None, option("full, or tiny: fast, for previews.", panel=MODEL, default="full")] = None
    device: DeviceOption = None
    memory: MemoryOption = None
    weights: Annotated[str | None, option("plain, int8 or fp8.", panel=SPEED, default="as --memory")] = None
    offload: Annotated[
        bool | None,
        option("Keep blocks in host memory.", "--offload/--no-offload", panel=SPEED, default="as --memory"),
    ] = None
    compiled: Annotated[
        str, option("off, on (torch.compile) or graphs (and CUDA graphs).", "--compile", panel=SPEED)
    ] = "off"

    @property
    def said(self) -> dict[str, Any]:
        """As the fields of a request."""
        return {"model": self.model, "loras": self.lora, "decoder": self.decoder}

    def loading(self, **more: Any) -> LoadOptions:
        """How the model is loaded."""
        from nasa_video.video.request import LoadOptions

        return LoadOptions(
            **{
                "device": self.device, "memory": self.memory, "weights": self.weights, "offload": self.offload,
                "compile": self.compiled, **more,
            }
        )  # fmt: skip


@dataclass(frozen=True)
class VideoOptions:
    """What a video shows, and in which size and loop it is made."""

    neg: NegOption = None
    guidance: GuidanceOption = None
    seed: SeedOption = None
    width: Annotated[int | None, option("In pixels, as the model makes it.", panel=SIZE, default="the model's")] = None
    height: Annotated[int | None, option("In pixels, as the model makes it.", panel=SIZE, default="the model's")] = None
    fps: Annotated[float | None, option("Frames a second of the file.", panel=SIZE, default="the model's")] = None
    steps: StepsOption = None
    first_chunk_steps: FirstChunkStepsOption = None
    window: Annotated[
        int | None, option("Latent frames remembered; 0: all.", panel=MODEL, default="the model's", min=0)
    ] = None
    sink: Annotated[
        int | None, option("First latent frames that stay remembered.", panel=MODEL, default="the model's", min=0)
    ] = None
    rope: Annotated[
        str | None, option("Positions: absolute, or inside the window.", panel=MODEL, default="the model's")
    ] = None
    resume: Annotated[bool, option("Go on after a kill.", "--resume", panel=OUTPUT)] = False

    @property
    def said(self) -> dict[str, Any]:
        """As the fields of a request."""
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _FOLDED}
        window = {"frames": self.window, "sink": self.sink, "rope": self.rope}
        window = {name: value for name, value in window.items() if value is not None}
        return {**said, "negatives": negatives_of(self.neg), "guidance": guidance_of(self.guidance), "window": window}


_FOLDED = ("neg", "guidance", "window", "sink", "rope", "resume")


def negatives_of(texts: Sequence[str] | None) -> list[str] | None:
    """What ``--neg`` was given; an empty one is an error, and none is "not said"."""
    from nasa_video.errors import InputError

    if any(not text.strip() for text in texts or ()):
        raise InputError("a negative prompt must not be empty; leave out --neg to run without one")
    return [_without_surrogates(text) for text in texts] if texts else None


def guidance_of(spellings: Sequence[str] | None) -> Any:
    """The one spelling of everything that ``--guidance`` and its older companions were given."""
    from nasa_video.video.request import change_guidance

    found: Any = None
    for spelling in sorted(spellings or (), key=lambda text: text.startswith(":")):  # the method before its settings
        found = spelling if found is None else change_guidance(found, spelling)
    return found


def requested(said: dict[str, Any], source: Path | None = None, timeline: Path | None = None) -> VideoRequest:
    """The request of a command: a file's recipe, over it a timeline's, over it the options.

    Raises:
        InputError: a file that cannot be read, or an option that cannot be used.
    """
    from nasa_video.video.request import VideoRequest

    request = VideoRequest()
    if source is not None:
        from nasa_video.files.metadata import read_metadata

        request = VideoRequest.of_metadata(read_metadata(source), str(source))
    if timeline is not None:
        request = request.merged(VideoRequest.read_timeline(timeline))
    stated = {name: value for name, value in said.items() if value is not None and value != {}}
    if isinstance(stated.get("prompt"), str):
        stated["prompt"] = _without_surrogates(stated["prompt"])
    return request.merged(VideoRequest.read(stated))


def _without_surrogates(text: str) -> str:
    # Bytes of the command line that are no UTF-8 arrive as lone surrogates, which neither a tokenizer nor a file takes.
    return text.encode("utf-8", "replace").decode("utf-8")


def run_options(video: VideoOptions, load: LoadOptions, split: bool = False, rank: int = 0) -> RunOptions:
    """How a run is carried out."""
    from nasa_video.cli.generation import RunOptions

    return RunOptions(load, video.resume, split, rank)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer reads it: each parameter that is a dataclass is replaced by its fields."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: p.annotation for name, p in signature.parameters.items() if is_dataclass(p.annotation)
    }

    def run(**given: Any) -> None:
        made = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**given, **made)

    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
            for f in fields(groups[name])
        ]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


# --- what options were called before, and what people who know other programs type

_NAMES = {
    "--first-steps": "--first-chunk-steps",
    "--negative": "--neg",
    "--negative-prompt": "--neg",
    "--negative_prompt": "--neg",
    "--num-inference-steps": "--steps",
    "--num-frames": "--frames",
    "--guidance-scale": "--scale",
    "--out": "--output",
}


def _pair(text: str, names: tuple[str, str], old: str) -> str:
    first, colon, last = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return f"{names[0]}={float(first):g},{names[1]}={float(last):g}"
    except ValueError:
        raise typer.BadParameter(f"expected FIRST:LAST such as 0:0.5, got {text!r}", param_hint=old) from None


def _shares(text: str, name: str, old: str) -> str:
    try:
        return f"{name}={'/'.join(f'{float(share):g}' for share in text.split(',')) if text else 'none'}"
    except ValueError:
        message = f"expected numbers with commas such as 1,0.5,0, got {text!r}"
        raise typer.BadParameter(message, param_hint=old) from None


# Each is a change of the method's spelling now.
_CHANGES: dict[str, Callable[[str], str]] = {
    "--scale": lambda text: text,
    "--guide-steps": lambda text: "," + _pair(text, ("first_step", "last_step"), "--guide-steps"),
    "--guide-layers": lambda text: "," + _pair(text, ("first_layer", "last_layer"), "--guide-layers"),
    "--scale-steps": lambda text: "," + _shares(text, "step_scales", "--scale-steps"),
    "--scale-layers": lambda text: "," + _shares(text, "layer_scales", "--scale-layers"),
}
_SWITCHES = {
    "--guide-clean": ",clean_pass=yes", "--no-guide-clean": ",clean_pass=no",
    "--neg-padding": ",padding=yes", "--no-neg-padding": ",padding=no",
}  # fmt: skip


def modern(words: Sequence[str]) -> list[str]:
    """The words of a command line with options by the names that they have today."""
    written: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            return [*written, word, *rest]
        name, equals, value = word.partition("=")
        name = _NAMES.get(name, name)
        if name in _SWITCHES:
            written += ["--guidance", f":{_SWITCHES[name]}"]
        elif name in _CHANGES:
            written += ["--guidance", f":{_CHANGES[name](value if equals else next(rest, ''))}"]
        else:
            written.append(f"{name}{equals}{value}")
    return written


class Command(TyperCommand):
    """A command that also takes its options by older names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As Click does."""
        return super().parse_args(ctx, modern(args))
