"""Options that belong together: a command takes one dataclass, and whoever calls it types its fields as options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_type_hints

from nasa_video.cli.options import (
    CompileOption,
    DecoderOption,
    DeviceOption,
    FirstStepsOption,
    FpsOption,
    GuidanceOption,
    HeightOption,
    LoraOption,
    MemoryOption,
    ModelOption,
    NegOption,
    OffloadOption,
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


@dataclass(frozen=True)
class LoadOptions:
    """Which model, and how it is loaded."""

    model: ModelOption = None
    lora: LoraOption = None
    device: DeviceOption = None
    memory: MemoryOption = None
    weights: WeightsOption = None
    offload: OffloadOption = None
    decoder: DecoderOption = None
    compiled: CompileOption = "off"

    @property
    def asked(self) -> dict[str, Any]:
        """As the fields of a ``generation.Request``."""
        asked = dict(vars(self))
        loras = tuple(asked.pop("lora") or ())
        return {**asked, "loras": loras}


@dataclass(frozen=True)
class VideoOptions:
    """What a video shows, and in which size and loop it is made."""

    neg: NegOption = None
    scale: ScaleOption = None
    guidance: GuidanceOption = None
    seed: SeedOption = None
    steps: StepsOption = None
    first_steps: FirstStepsOption = None
    width: WidthOption = None
    height: HeightOption = None
    fps: FpsOption = None
    window: WindowOption = None
    sink: SinkOption = None
    rope: RopeOption = None
    resume: ResumeOption = False

    @property
    def asked(self) -> dict[str, Any]:
        """As the fields of a ``generation.Request``."""
        from nasa_video.video.recipe import StoredWindow

        asked = dict(vars(self))
        negatives = tuple(asked.pop("neg") or ())
        window = StoredWindow(frames=asked.pop("window"), sink=asked.pop("sink"), rope=asked.pop("rope"))
        return {**asked, "negatives": negatives, "window": window}


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
