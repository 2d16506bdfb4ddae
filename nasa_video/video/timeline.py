"""What is asked for, chunk by chunk: prompts, negatives and guidance may change while a video runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from nasa_video.errors import InputError
from nasa_video.guidance.methods import Guidance
from nasa_video.guidance.terms import Negative
from nasa_video.models.presets import OnChange, Strict, read_yaml

Negatives = str | Negative | Sequence[str | Negative] | None


def as_negatives(negative: Negatives) -> tuple[Negative, ...]:
    """A tuple of negatives from whatever a caller finds natural; None and "" mean none."""
    if negative is None:
        return ()
    items = [negative] if isinstance(negative, str | Negative) else negative
    return tuple(item if isinstance(item, Negative) else Negative(item) for item in items if item != "")


@dataclass(frozen=True)
class Cue:
    """What one chunk is to show, for every sample of a batch.

    Attributes:
        prompts: one a sample.
        negatives: one tuple a sample; all samples have as many, with the same weights.
        guidance: the method, or None for an unguided chunk.
        on_change: what becomes of the window where this chunk's prompt, negatives or guidance are new; None leaves it
            to the stream.
    """

    prompts: tuple[str, ...]
    negatives: tuple[tuple[Negative, ...], ...]
    guidance: Guidance | None = None
    on_change: OnChange | None = None

    def __post_init__(self) -> None:
        if not self.prompts or any(not prompt.strip() for prompt in self.prompts):
            raise InputError("the prompt must not be empty; say what the video should show")
        if len(self.negatives) != len(self.prompts):
            raise InputError(f"{len(self.prompts)} prompts need as many lists of negatives, got {len(self.negatives)}")
        weights = {tuple(negative.weight for negative in sample) for sample in self.negatives}
        if len(weights) > 1:
            raise InputError("all samples of a batch must have the same number of negatives with the same weights")

    @classmethod
    def of(
        cls,
        prompt: str,
        negative: Negatives = None,
        guidance: Guidance | None = None,
        on_change: OnChange | None = None,
    ) -> Cue:
        """A cue of one sample."""
        return cls((prompt,), (as_negatives(negative),), guidance, on_change)

    @property
    def guided(self) -> bool:
        """Whether guidance has something to steer away from."""
        return self.guidance is not None and self.guidance.active and any(self.negatives)

    @property
    def unguided(self) -> Cue:
        """The same without what guidance needs."""
        return dataclasses.replace(self, negatives=((),) * len(self.prompts), guidance=None)


CueOf = Callable[[int], Cue]
"""Chunk index to cue."""


class TimelineEntry(Strict):
    """From ``at`` seconds on: what is given replaces what was, what is left out stays.

    ``guidance`` is a method's name or "none"; ``on_change`` as in :class:`Cue`.
    """

    at: float = Field(ge=0)
    prompt: str | None = None
    negatives: tuple[str, ...] | None = None
    guidance: str | None = None
    scale: float | None = None
    on_change: OnChange | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, data: Any) -> Any:
        return older_on_change(data, "recompute")


class Timeline(Strict):
    """A video's cues over time, as written in a YAML file; what else it states makes the same video again."""

    model: str | None = None
    seed: int | None = None
    steps: int | None = None
    first_steps: int | None = None
    frames: int | None = None
    timeline: tuple[TimelineEntry, ...] = Field(min_length=1)

    @classmethod
    def read(cls, path: Path) -> Timeline:
        """Read and validate a timeline file.

        Raises:
            InputError: an unknown key, a wrong value, or times that do not rise.
        """
        try:
            timeline = cls.model_validate(read_yaml(path))
        except ValidationError as error:
            rows = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
            raise InputError(f"{path} is not a valid timeline: {rows}") from error
        times = [entry.at for entry in timeline.timeline]
        if times != sorted(set(times)):
            raise InputError(f"{path}: the times must rise, got {', '.join(f'{t:g}' for t in times)}")
        return timeline

    def to_yaml(self) -> str:
        """The file's text."""
        data: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)

    def cues(
        self,
        first: Cue,
        guide: Callable[[Guidance | None, str | None, float | None], Guidance | None],
        seconds_of_chunk: Callable[[int], float],
    ) -> CueOf:
        """Cues by chunk: an entry holds from the first chunk that starts at its time or later.

        Args:
            first: what holds until an entry says otherwise (one sample).
            guide: (the guidance so far, a method's name or None, a scale or None) to the guidance from there on.
            seconds_of_chunk: when a chunk's first frame is shown.
        """
        states: list[tuple[float, Cue]] = []
        cue = first
        for entry in self.timeline:
            cue = Cue.of(
                entry.prompt if entry.prompt is not None else cue.prompts[0],
                cue.negatives[0] if entry.negatives is None else [parse_negative(text) for text in entry.negatives],
                cue.guidance
                if entry.guidance is None and entry.scale is None
                else guide(cue.guidance, entry.guidance, entry.scale),
                cue.on_change if entry.on_change is None else entry.on_change,
            )
            states.append((entry.at, cue))

        def cue_of(chunk: int) -> Cue:
            seconds = seconds_of_chunk(chunk) + 1e-6
            holding = [state for at, state in states if at <= seconds]
            return holding[-1] if holding else first

        return cue_of


def older_on_change(data: Any, name: str) -> Any:
    """``on_change`` in what an older version stored, where a truth value ``name`` stood for it."""
    if not isinstance(data, dict) or name not in data:
        return data
    recompute = data[name]
    rest = {key: value for key, value in data.items() if key != name}
    return rest if recompute is None else {"on_change": "recache" if recompute else "keep", **rest}


def format_negative(negative: Negative) -> str:
    """The inverse of :func:`parse_negative`."""
    if negative.weight == 1 and ":" not in negative.text:
        return negative.text
    return f"{negative.text}:{negative.weight!r}"


def parse_negative(text: str) -> Negative:
    """``TEXT`` or ``TEXT:WEIGHT``; a colon that is part of the text needs a weight behind it ("ratio 16:9:1").

    Raises:
        InputError: empty text, or a weight that is not a positive number.
    """
    head, colon, tail = text.rpartition(":")
    if not colon:
        return Negative(text.strip())
    try:
        weight = float(tail)
    except ValueError:
        return Negative(text.strip())
    if not head.strip():
        raise InputError(f"the negative {text!r} has a weight but no text")
    if not math.isfinite(weight):
        raise InputError(f"the weight in {text!r} must be a number such as 0.4")
    return Negative(head.strip(), weight)
