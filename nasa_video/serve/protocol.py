"""The messages of the WebSocket and the bodies of the HTTP requests; see ``docs/reference/live_protocol.md``."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from nasa_video.guidance.methods import Guidance, parse_guidance
from nasa_video.guidance.terms import Negative
from nasa_video.models.presets import OnChange, Strict
from nasa_video.serve.settings import MAX_NEGATIVE, MAX_NEGATIVES, MAX_PROMPT
from nasa_video.video.pipeline import VideoPipeline
from nasa_video.video.request import PromptState

PROTOCOL = 2
"""Raised when a client written for the last one would no longer understand the server."""
MAX_SEED = 2**53 - 1
"""Largest whole number that a browser holds exactly."""


def _with_content(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text.strip()


def _known_method(spelling: str) -> str:
    parse_guidance(spelling)
    return spelling


Prompt = Annotated[str, Field(max_length=MAX_PROMPT), AfterValidator(_with_content)]
Method = Annotated[str, Field(max_length=400), AfterValidator(_known_method)]
Scale = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
MediaKind = Literal["mp4", "webm", "av1", "jpeg"]


class NegativeTerm(Strict):
    """One negative and its weight."""

    text: Annotated[str, Field(max_length=MAX_NEGATIVE), AfterValidator(_with_content)]
    weight: float = Field(default=1.0, gt=0, le=100, allow_inf_nan=False)


Terms = Annotated[tuple[NegativeTerm, ...], Field(max_length=MAX_NEGATIVES)]


class Wanted(Strict):
    """What the next chunk is to show; the whole of it."""

    prompt: Prompt
    negatives: Terms = ()
    guidance: Method | None = None
    """None takes the model's own."""
    scale: Scale | None = None
    on_change: OnChange | None = None
    """None takes the model's own."""

    def guidance_of(self, pipeline: VideoPipeline) -> Guidance | None:
        """The method with this model's settings; None for "none"."""
        return None if self.guidance == "none" else pipeline.guidance(self.guidance, self.scale)

    def state(self, pipeline: VideoPipeline) -> PromptState:
        """As the pipeline takes it.

        Raises:
            InputError: a scale that the method cannot take.
        """
        negatives = [Negative(term.text, term.weight) for term in self.negatives]
        on_change = self.on_change or pipeline.preset.sampler.on_change
        return PromptState.of(self.prompt, negatives, self.guidance_of(pipeline), on_change)


class Start(Wanted):
    """Begin a stream in place of the one that runs."""

    type: Literal["start"]
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    model: str | None = Field(default=None, max_length=400)
    steps: int | None = Field(default=None, ge=1, le=200)
    first_steps: int | None = Field(default=None, ge=1, le=200)
    """Of the first chunk, and of each that shows something new; None takes ``steps``."""
    frames: int | None = Field(default=None, ge=1)
    """None streams without end."""
    compare: bool = False
    media: Annotated[tuple[MediaKind, ...], Field(min_length=1, max_length=4)] = ("jpeg",)


class Update(Strict):
    """Change what the next chunk shows; what is left out stays. The answer to it, yes or no, carries its ``id``."""

    type: Literal["update"]
    id: int | None = Field(default=None, ge=0, le=MAX_SEED)
    prompt: Prompt | None = None
    negatives: Terms | None = None
    guidance: Method | None = None
    scale: Scale | None = None
    on_change: OnChange | None = None

    def applied_to(self, wanted: Wanted) -> Wanted:
        """The result; a new method without a scale takes the model's own."""
        changes = {name: getattr(self, name) for name in self.model_fields_set - {"type", "id"}}
        changes = {name: value for name, value in changes.items() if value is not None}
        if "guidance" in changes and changes["guidance"] != wanted.guidance:
            changes.setdefault("scale", None)
        return wanted.model_copy(update=changes)


class Media(Strict):
    """Send the pictures in another way from the next chunk on."""

    type: Literal["media"]
    media: Annotated[tuple[MediaKind, ...], Field(min_length=1, max_length=4)]


class Position(Strict):
    """How far the viewer is: the number of frames shown so far. Generation waits for it."""

    type: Literal["position"]
    stream: str = Field(max_length=64)
    frame: int = Field(ge=0, le=MAX_SEED)


class Command(Strict):
    """Hold generation, go on, or end the stream."""

    type: Literal["pause", "resume", "stop"]


ClientMessage = Start | Update | Media | Position | Command
_MESSAGES: TypeAdapter[ClientMessage] = TypeAdapter(Annotated[ClientMessage, Field(discriminator="type")])


class MessageError(ValueError):
    """A message that is none; the text says where."""


def parse_message(text: str | bytes) -> ClientMessage:
    """A client's message.

    Raises:
        MessageError: no JSON, an unknown type or key, or a value out of range.
    """
    try:
        return _MESSAGES.validate_json(text)
    except ValidationError as error:
        raise MessageError(explain(error)) from None


def explain(error: ValidationError) -> str:
    """The first few faults of a message, without the message itself."""
    # The first part of a place is the message's type, which pydantic adds.
    faults = [(".".join(str(part) for part in e["loc"][1:]), e["msg"]) for e in error.errors(include_input=False)]
    return "; ".join(f"{place}: {what}" if place else what for place, what in faults[:3])[:400]


class VideoRequest(Wanted):
    """Body of ``POST /v1/videos``."""

    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    model: str | None = Field(default=None, max_length=400)
    steps: int | None = Field(default=None, ge=1, le=200)
    first_steps: int | None = Field(default=None, ge=1, le=200)
    frames: int | None = Field(default=None, ge=1)
    """None takes the model's own length."""


def describe_state(state: PromptState) -> dict[str, Any]:
    """A prompt state as the server's messages carry it."""
    return {
        "prompt": state.prompts[0],
        "negatives": [dataclasses.asdict(negative) for negative in state.negatives[0]],
        "guidance": state.guidance.name if state.guidance else "none",
        "scale": state.guidance.scale if state.guidance else None,
        "on_change": state.on_change,
    }
