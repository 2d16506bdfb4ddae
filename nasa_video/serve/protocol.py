"""The messages of the WebSocket and the bodies of the HTTP requests; see ``docs/reference/live_protocol.md``.

What is asked for is a :class:`VideoRequest` or a part of one, within limits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import from_json

from nasa_video.errors import InputError
from nasa_video.guidance.methods import METHODS, Settings, parse_guidance, spell
from nasa_video.models.presets import Strict, VideoPreset
from nasa_video.serve.settings import MAX_ENTRIES, MAX_GUIDANCE, MAX_NEGATIVE, MAX_NEGATIVES, MAX_PROMPT
from nasa_video.text.vocabulary import find_vocabulary
from nasa_video.video.request import PromptRequest, PromptState, VideoRequest

PROTOCOL = 3
"""Raised when a client written for the last one would no longer understand the server."""
MAX_SEED = 2**53 - 1
"""Largest whole number that a browser holds exactly."""
_RANGES = {"seed": (0, MAX_SEED), "steps": (1, 200), "first_chunk_steps": (1, 200), "frames": (1, MAX_SEED)}

MediaKind = Literal["mp4", "webm", "av1", "jpeg"]
MediaKinds = Annotated[tuple[MediaKind, ...], Field(min_length=1, max_length=4)]


class ServedRequest(VideoRequest):
    """Body of ``POST /v1/videos``: of a video's fields those that open no file and need no other memory plan."""

    allowed: ClassVar[frozenset[str]] = frozenset((*PromptRequest.model_fields, *_RANGES, "model", "timeline"))

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, data: Any) -> Any:
        """Before any of it is read: nothing that is sent becomes a path."""
        if isinstance(data, dict) and (refused := sorted((set(VideoRequest.model_fields) - cls.allowed) & set(data))):
            raise InputError(f"{refused[0]} cannot be chosen here; leave it out")
        return data

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        entries = self.timeline or ()
        if self.prompt is None and not (entries and entries[0].prompt):
            raise InputError("prompt: say what the video should show")
        if len(entries) > MAX_ENTRIES:
            raise InputError(f"a timeline has at most {MAX_ENTRIES} entries, got {len(entries)}")
        check_limits(self)
        for entry in entries:
            check_limits(entry)
        for name, (low, high) in _RANGES.items():
            if (value := getattr(self, name)) is not None and not low <= value <= high:
                raise InputError(f"{name} must be from {low} to {high}, got {value}")
        if self.model is not None and len(self.model) > MAX_GUIDANCE:
            raise InputError("model: choose one of those that GET /models lists as offered")
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> Any:
        made = handler.resolve_ref_schema(handler(schema))
        own = set(cls.model_fields) - set(VideoRequest.model_fields)
        made["properties"] = {name: p for name, p in made["properties"].items() if name in cls.allowed | own}
        return made


class Start(ServedRequest):
    """Begin a stream in place of the one that runs; without ``frames`` it has no end."""

    allowed = (ServedRequest.allowed | {"compare"}) - {"timeline"}

    type: Literal["start"]
    media: MediaKinds = ("jpeg",)


class Update(PromptRequest):
    """Change what the next chunk shows; what is left out stays. The answer to it, yes or no, carries its ``id``."""

    type: Literal["update"]
    id: int | None = Field(default=None, ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        check_limits(self)
        return self


class Media(Strict):
    """Send the frames in another way from the next chunk on."""

    type: Literal["media"]
    media: MediaKinds


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
    """A message that is none; the text says where.

    ``refused``: it was understood, and cannot be done. ``id``: of the update that it was.
    """

    def __init__(self, text: str, *, refused: bool = False, id: object = None) -> None:
        super().__init__(text)
        self.refused = refused
        self.id = id if isinstance(id, int) else None


def check_limits(part: PromptRequest) -> None:
    """Whether texts, negatives and guidance are of a size that one viewer may ask for.

    Raises:
        InputError: one is not, or is empty.
    """
    if part.prompt is not None and not (part.prompt.strip() and len(part.prompt) <= MAX_PROMPT):
        raise InputError(f"a prompt has from 1 to {MAX_PROMPT} characters, got {len(part.prompt)}")
    if len(part.negatives or ()) > MAX_NEGATIVES:
        raise InputError(f"at most {MAX_NEGATIVES} negatives, got {len(part.negatives or ())}")
    for negative in part.negatives or ():
        if len(negative.text) > MAX_NEGATIVE:
            raise InputError(f"a negative has at most {MAX_NEGATIVE} characters, got {len(negative.text)}")
    if part.guidance is not None and not (isinstance(part.guidance, str) and len(part.guidance) <= MAX_GUIDANCE):
        raise InputError(f"guidance is a spelling such as nasa:0.8 of at most {MAX_GUIDANCE} characters")
    texts = (part.prompt, part.guidance, *(negative.text for negative in part.negatives or ()))
    if any(isinstance(text, str) and text != printable(text) for text in texts):
        raise InputError("a text holds halves of characters (lone surrogates)")


def parse_message(text: str | bytes) -> ClientMessage:
    """A client's message.

    Raises:
        MessageError: no JSON, an unknown type or key, or a value out of range.
    """
    try:
        data = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise MessageError(printable(str(error))[:400]) from None
    try:
        return _MESSAGES.validate_python(data)
    except ValidationError as error:
        faults = error.errors(include_input=False)
        refused = all(fault["type"] == "value_error" for fault in faults)
        # The first part of a place is the message's type, which pydantic adds.
        raise MessageError(
            explain(faults, skip=1), refused=refused, id=data.get("id") if isinstance(data, dict) else None
        ) from None


def explain(faults: Sequence[Any], skip: int) -> str:
    """The first few faults of a message, without the message itself; ``skip`` parts of each place are left out."""
    rows = []
    for fault in faults[:3]:
        place = [str(part) for part in fault["loc"][skip:]]
        # A sentence of ours names what it is about.
        own = fault["type"] == "value_error"
        message = fault["msg"].removeprefix("Value error, ")
        rows.append(message if own or not place else f"{'.'.join(place)}: {message}")
    return printable("; ".join(dict.fromkeys(rows)))[:400]


def printable(text: str) -> str:
    """The text with "?" for what UTF-8 cannot hold."""
    return text.encode(errors="replace").decode()


def describe_state(state: PromptState, settings: Settings) -> dict[str, Any]:
    """A prompt state as the server's messages and its timelines carry it; ``settings``: the model's own."""
    return {
        "prompt": state.prompts[0],
        "negatives": [dataclasses.asdict(negative) for negative in state.negatives[0]],
        "guidance": spell(state.guidance, settings),
        "on_change": state.on_change,
    }


def describe_methods() -> list[dict[str, Any]]:
    """For ``GET /v1/methods``: every guidance method and what can be set of it."""
    return [
        {
            "name": name,
            "label": method.label,
            "identity": method.identity,
            "settings": [dataclasses.asdict(setting) for setting in method.settings()],
        }
        for name, method in METHODS.items()
    ]


def describe_model(name: str, preset: VideoPreset, *, offered: bool) -> dict[str, Any]:
    """For ``GET /models``: a model with its sizes and, by method, the spelling of its own settings."""
    video, sampler, vocabulary = preset.video, preset.sampler, find_vocabulary(preset.vocabulary)
    return {
        "name": name,
        "title": preset.title,
        "licence": preset.licence,
        "offered": offered,
        "present": preset.present,
        "width": video.width,
        "height": video.height,
        "fps": video.fps,
        "upscale": video.upscale,
        "frames": video.frames,
        "steps": sorted(sampler.steps) if sampler.steps != "any" else None,
        "default_steps": sampler.default_steps,
        "methods": {m: spell(parse_guidance(m, preset.guidance), preset.guidance) for m in METHODS},
        "guidance": preset.default_guidance,
        "on_change": sampler.on_change,
        "words": None
        if vocabulary is None
        else [phrases[0] for v in vocabulary.words().values() for phrases in v.values()],
    }
