"""Everything that makes one video, in a form that is stored in the file and makes it again."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from nasa_video.errors import InputError
from nasa_video.guidance.methods import METHODS, Guidance
from nasa_video.guidance.schedule import ScaleSchedule
from nasa_video.guidance.terms import Negative
from nasa_video.models.placement import Placement
from nasa_video.models.presets import OnChange, SamplerSettings, Strict
from nasa_video.video.inputs import StoredStart
from nasa_video.video.timeline import Timeline, older_on_change


class StoredNegative(Strict):
    """A negative prompt and its weight."""

    text: str
    weight: float = 1.0


class StoredGuidance(Strict):
    """A guidance method and all of its settings."""

    method: str
    settings: dict[str, Any]


class StoredLora(Strict):
    """A LoRA file and its scale."""

    path: str
    scale: float = 1.0


class StoredWindow(Strict):
    """What of the model's own window, sink (latent frames) and positions was replaced; None is the model's."""

    frames: int | None = None
    sink: int | None = None
    rope: str | None = None

    def of(self, sampler: SamplerSettings) -> SamplerSettings:
        """The loop with what is replaced."""
        return sampler.with_window(self.frames, self.sink, self.rope)

    def over(self, other: StoredWindow) -> StoredWindow:
        """This, and the other's where this says nothing."""
        return other.model_copy(update=self.model_dump(exclude_none=True))


class Recipe(Strict):
    """What ``generate`` was asked for. ``width`` and ``height`` are the model's pixels, before upscaling."""

    prompt: str
    negatives: tuple[StoredNegative, ...] = ()
    guidance: StoredGuidance | None = None
    model: str
    seed: int
    steps: int
    first_steps: int | None = None
    frames: int
    width: int
    height: int
    fps: float
    timeline: Timeline | None = None
    on_change: OnChange = "keep"
    fold_padding: bool = True
    decoder: str = "full"
    compare: bool = False
    rollout: int | None = None
    window: StoredWindow = StoredWindow()
    start: StoredStart | None = None
    loras: tuple[StoredLora, ...] = ()
    placement: Placement = Placement()
    version: str = ""

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, data: Any) -> Any:
        return older_on_change(data, "recompute_window")

    @property
    def anything_negative(self) -> bool:
        """Whether there is something to steer away from, at any time of the video."""
        return bool(self.negatives) or (
            self.timeline is not None and any(entry.negatives for entry in self.timeline.timeline)
        )

    @classmethod
    def of_metadata(cls, metadata: dict[str, Any], source: str) -> Recipe:
        """The recipe in a file's metadata.

        Raises:
            InputError: the file was not made by nasa-video, or by one that this version cannot read.
        """
        data = metadata.get("nasa_video")
        if not isinstance(data, dict):
            raise InputError(
                f"{source} carries no recipe: it was not written by nasa-video, or its metadata was removed"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(
                f"the recipe in {source} cannot be read ({error.error_count()} errors): {error}"
            ) from error

    def to_metadata(self) -> dict[str, Any]:
        """The form in which a sink stores it."""
        return {"nasa_video": self.model_dump(mode="json")}


def store_guidance(guidance: Guidance | None) -> StoredGuidance | None:
    """The method with all its settings, as JSON has them: what is read back is equal to what was stored."""
    if guidance is None:
        return None
    return StoredGuidance(method=guidance.name, settings=json.loads(json.dumps(dataclasses.asdict(guidance))))


def restore_guidance(stored: StoredGuidance | None) -> Guidance | None:
    """The inverse of :func:`store_guidance`.

    Raises:
        InputError: the stored settings are not ones of that method.
    """
    if stored is None:
        return None
    settings = dict(stored.settings)
    try:
        if "schedule" in settings:
            # JSON has no tuples.
            parts: dict[str, Any] = {
                key: tuple(v) if isinstance(v, list) else v for key, v in settings["schedule"].items()
            }
            settings["schedule"] = ScaleSchedule(**parts)
        return METHODS[stored.method](**settings)
    except (KeyError, TypeError) as error:
        raise InputError(f"the stored guidance {stored.method!r} is unknown to this version: {error}") from error


def store_negatives(negatives: tuple[Negative, ...]) -> tuple[StoredNegative, ...]:
    """Negatives in their stored form."""
    return tuple(StoredNegative(text=n.text, weight=n.weight) for n in negatives)


def restore_negatives(stored: tuple[StoredNegative, ...]) -> tuple[Negative, ...]:
    """The inverse of :func:`store_negatives`."""
    return tuple(Negative(n.text, n.weight) for n in stored)


def parse_lora(text: str) -> StoredLora:
    """``FILE`` or ``FILE:SCALE``.

    Raises:
        InputError: no such file, or a scale that is no number.
    """
    head, colon, tail = text.rpartition(":")
    path, scale = (text, 1.0)
    if colon and not Path(text).exists():
        try:
            path, scale = head, float(tail)
        except ValueError:
            raise InputError(f"the LoRA {text!r} is no file and {tail!r} no scale; expected FILE or FILE:0.8") from None
    if not math.isfinite(scale) or abs(scale) > 10:
        raise InputError(f"the scale of a LoRA must be from -10 to 10, got {scale:g}")
    if not Path(path).is_file():
        raise InputError(f"LoRA file {path} does not exist")
    return StoredLora(path=path, scale=scale)
