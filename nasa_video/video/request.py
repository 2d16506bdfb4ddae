"""What a video is: the one record that the command line, timelines, recipes, HTTP, batches and Python read and write.

It is imported without torch. ``None`` means "not said": :meth:`VideoRequest.merged` puts one request over another, and
:meth:`VideoRequest.resolved` fills what is still open from the model's preset. Its JSON is the recipe in a file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, InstanceOf, PlainSerializer, ValidationError, model_validator

from nasa_video.errors import InputError
from nasa_video.guidance.methods import Guidance, did_you_mean, find_method, parse_guidance, spell
from nasa_video.guidance.terms import Negative, Negatives, as_negatives, format_term, split_prompt
from nasa_video.models.placement import Placement
from nasa_video.models.presets import OnChange, SamplerSettings, Strict, VideoPreset, read_yaml

StartKind = Literal["image", "extend", "redraw"]
# Frames of a clip that are looked at when it is continued; more would only leave the window again.
MOST_CONTEXT_FRAMES = 81


class PromptWarning(UserWarning):
    """A prompt was changed before it was used, or has parts that the model cannot know."""


# --- what a chunk shows


@dataclass(frozen=True)
class PromptState:
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
    ) -> PromptState:
        """The state of one sample."""
        return cls((prompt,), (as_negatives(negative),), guidance, on_change)

    @property
    def guided(self) -> bool:
        """Whether guidance has something to steer away from."""
        return self.guidance is not None and self.guidance.active and any(self.negatives)

    @property
    def unguided(self) -> PromptState:
        """The same without what guidance needs."""
        return dataclasses.replace(self, negatives=((),) * len(self.prompts), guidance=None)


PromptStateOf = Callable[[int], PromptState]
"""Chunk index to prompt state."""


# --- fields


def _read_negatives(value: Any) -> Any:
    if value is None or isinstance(value, str | Negative):
        return None if value is None else as_negatives(value)
    if not isinstance(value, Sequence):
        raise InputError(f"negatives must be a text, a Negative or a list of them, got {type(value).__name__}")
    terms: list[Negative] = []
    for item in value:
        if isinstance(item, Mapping):
            if unknown := set(item) - {"text", "weight"}:
                raise InputError(f"a negative has a text and a weight, and no {sorted(unknown)[0]!r}")
            terms.append(Negative(item.get("text", ""), item.get("weight", 1.0)))
        else:
            terms += as_negatives([item])
    return tuple(terms)


def _read_guidance(value: Any) -> Any:
    if isinstance(value, Mapping):  # as 0.1 stored it
        return find_method(str(value.get("method"))).of(value.get("settings", {}))
    if isinstance(value, str):
        if not _is_change(value):
            parse_guidance(value)
        return value.strip() or "none"
    if value is not None and not isinstance(value, Guidance):
        raise InputError(f"guidance must be a method or its spelling such as 'nasa:0.8', got {type(value).__name__}")
    return value


def _read_lora(value: Any) -> Any:
    if isinstance(value, str | Path):
        return LoraFile.parse(str(value))
    if isinstance(value, tuple | list) and len(value) == 2:
        return LoraFile(path=str(value[0]), scale=value[1])
    return value


Terms = Annotated[tuple[InstanceOf[Negative], ...], BeforeValidator(_read_negatives)]
Spelling = Annotated[
    str | InstanceOf[Guidance],
    BeforeValidator(_read_guidance),
    PlainSerializer(lambda value: spell_fully(value) if isinstance(value, Guidance) else value),
]
"""A method, its spelling, or a change ``:0.3,limit=none`` of whatever method there is."""


class LoraFile(Strict):
    """A LoRA file and its scale."""

    path: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> LoraFile:
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
                message = f"the LoRA {text!r} is no file and {tail!r} no scale; expected FILE or FILE:0.8"
                raise InputError(message) from None
        if not math.isfinite(scale) or abs(scale) > 10:
            raise InputError(f"the scale of a LoRA must be from -10 to 10, got {scale:g}")
        if not Path(path).is_file():
            raise InputError(f"LoRA file {path} does not exist")
        return cls(path=path, scale=scale)


class WindowRequest(Strict):
    """What of the model's own window, sink (latent frames) and positions is replaced; None is the model's."""

    frames: int | None = None
    sink: int | None = None
    rope: str | None = None

    def of(self, sampler: SamplerSettings) -> SamplerSettings:
        """The loop with what is replaced."""
        return sampler.with_window(self.frames, self.sink, self.rope)

    def merged(self, over: WindowRequest) -> WindowRequest:
        """This, and what the other states in its place."""
        return self.model_copy(update=over.model_dump(exclude_none=True))


class StartFile(Strict):
    """A file that a video starts from: it is named, not copied; its hash says whether it is still the same."""

    kind: StartKind
    path: str
    sha256: str
    strength: float = 1.0

    @classmethod
    def of_file(cls, kind: StartKind, path: str | Path, strength: float = 1.0) -> StartFile:
        """Name a file, and take its hash.

        Raises:
            InputError: it cannot be read.
        """
        try:
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        return cls(kind=kind, path=str(path), sha256=digest, strength=strength)

    def check(self) -> Path:
        """The file, when it is still the one that the request was written for.

        Raises:
            InputError: it is gone, or another one.
        """
        path = Path(self.path)
        if self.of_file(self.kind, path).sha256 != self.sha256:
            raise InputError(f"{path} is not the file that this video was made from (its content has changed)")
        return path


# --- the request


class PromptRequest(Strict):
    """What is shown from some moment on."""

    prompt: str | None = None
    negatives: Terms | None = None
    guidance: Spelling | None = None
    on_change: OnChange | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        return _with_inline_negatives(read_older(data)) if isinstance(data, Mapping) else data

    @classmethod
    def read(cls, data: Mapping[str, Any], source: str = "") -> Self:
        """Validate what somebody wrote.

        Raises:
            InputError: an unknown key or a wrong value; the message names each, and ``source`` where that is given.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(f"{source}: {explain(error, cls)}" if source else explain(error, cls)) from error

    def merged(self, over: PromptRequest) -> Self:
        """This request with what ``over`` states in its place; a change of guidance changes the method there is."""
        stated = {name: getattr(over, name) for name in type(over).model_fields if name in type(self).model_fields}
        stated = {name: value for name, value in stated.items() if value is not None}
        if "guidance" in stated:
            stated["guidance"] = change_guidance(self.guidance, stated["guidance"])
        window = getattr(self, "window", None)
        if "window" in stated and window is not None:
            stated["window"] = window.merged(stated["window"])
        return self.model_copy(update=stated)


class TimelineEntry(PromptRequest):
    """From ``at`` seconds on: what is stated replaces what was, what is left out stays."""

    at: float = Field(ge=0)


class VideoRequest(PromptRequest):
    """One video.

    Attributes:
        steps, first_chunk_steps: denoising steps a chunk, and of the chunks that show something new.
        frames: length; the new ones where ``start`` is a still or a clip to go on from.
        width, height: the model's pixels, before upscaling.
        rollout: frames after which a long video starts again from its last chunk; 0 never does.
        window: what of the model's window is replaced.
        timeline: what changes while it runs.
        start: a still, a clip to go on from, or a clip to redraw.
        extend_prompt: write into the prompts what they leave open, by the seed.
        placement: where the model's parts lived; version: of nasa-video, where it is a recipe.
    """

    model: str | None = None
    seed: int | None = None
    steps: int | None = None
    first_chunk_steps: int | None = None
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    window: WindowRequest | None = None
    rollout: int | None = None
    timeline: tuple[TimelineEntry, ...] | None = Field(default=None, min_length=1)
    start: StartFile | None = None
    loras: tuple[Annotated[LoraFile, BeforeValidator(_read_lora)], ...] | None = None
    fold_padding: bool | None = None
    decoder: str | None = None
    compare: bool | None = None
    extend_prompt: bool | None = None
    placement: Placement | None = None
    version: str | None = None

    @model_validator(mode="after")
    def _check(self) -> VideoRequest:
        if self.fps is not None and not (math.isfinite(self.fps) and 0 < self.fps <= 240):
            raise InputError(f"fps must be above 0 and at most 240, got {self.fps}")
        times = [entry.at for entry in self.timeline or ()]
        if times != sorted(set(times)):
            raise InputError(f"the times must rise, got {', '.join(f'{t:g}' for t in times)}")
        return self

    # Doors

    @classmethod
    def read_timeline(cls, path: Path) -> VideoRequest:
        """The request in a YAML file that states a timeline.

        Raises:
            InputError: an unknown key, a wrong value, or times that do not rise.
        """
        request = cls.read(read_yaml(path), f"{path} is not a valid timeline")
        if request.timeline is None:
            raise InputError(f"{path} is not a valid timeline: it states no timeline; write timeline: [{{at: 0, …}}]")
        return request

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any], source: str) -> VideoRequest:
        """The recipe in a file's metadata.

        Raises:
            InputError: the file was not made by nasa-video, or by one that this version cannot read.
        """
        data = metadata.get("nasa_video")
        if not isinstance(data, dict):
            raise InputError(
                f"{source} carries no recipe: it was not written by nasa-video, or its metadata was removed"
            )
        return cls.read(data, f"the recipe in {source} cannot be read")

    def to_metadata(self) -> dict[str, Any]:
        """The form in which a sink stores it."""
        return {"nasa_video": self.model_dump(mode="json", exclude_none=True)}

    def to_yaml(self) -> str:
        """As people write it; :meth:`read_timeline` and :meth:`read` read it back."""
        data = self.model_dump(mode="json", exclude_none=True)
        for part, own in ((data, self), *zip(data.get("timeline", ()), self.timeline or (), strict=True)):
            spelled = [format_term(term) for term in own.negatives or ()]
            if own.negatives and as_negatives(spelled) == own.negatives:
                part["negatives"] = spelled
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)

    # What follows from it

    @property
    def texts(self) -> list[str]:
        """Every prompt and negative that will be encoded."""
        parts = (self, *(self.timeline or ()))
        prompts = [part.prompt for part in parts if part.prompt is not None]
        negatives = [term.text for part in parts for term in part.negatives or ()]
        return list(dict.fromkeys([*prompts, *negatives]))

    @property
    def anything_negative(self) -> bool:
        """Whether there is something to steer away from at any time."""
        return any(part.negatives for part in (self, *(self.timeline or ())))

    def sampler(self, own: SamplerSettings) -> SamplerSettings:
        """The model's loop with what is replaced of it.

        Raises:
            InputError: the model has no such steps, or the window cannot hold its sink and a chunk.
        """
        windowed = own if self.window is None else self.window.of(own)
        return windowed.with_first_chunk_steps(self.first_chunk_steps)

    def most_frames(self, first_chunk: int) -> int | None:
        """The most frames that the model will have to remember; None is the preset's length."""
        if self.start is None or self.frames is None or self.start.kind == "redraw":
            return self.frames
        return self.frames + (MOST_CONTEXT_FRAMES if self.start.kind == "extend" else first_chunk)

    def resolved(self, preset: VideoPreset) -> VideoRequest:
        """The request with everything that is open filled in from the preset.

        ``first_chunk_steps``, ``window`` and ``rollout`` stay open: they are changes of the model's own loop. So do the
        frames behind a start, which follow from its file.

        Raises:
            InputError: no prompt, negatives without guidance, or a guidance that the model cannot take.
        """
        from nasa_video import __version__

        self.check_extension(preset)
        sampler, video = preset.sampler, preset.video
        prompt = self.timeline[0].prompt if self.prompt is None and self.timeline else self.prompt
        if prompt is None:
            raise InputError('say what the video should show: nasa-video generate "a red ball bouncing"')
        open_fields = VideoRequest(
            prompt=prompt,
            negatives=(),
            seed=0,
            steps=sampler.default_steps,
            frames=None if self.start is not None else video.frames,
            width=video.width,
            height=video.height,
            fps=video.fps,
            on_change=sampler.on_change,
            fold_padding=True,
            decoder="full",
            compare=False,
        )
        return open_fields.merged(self).model_copy(
            update={"prompt": prompt, "guidance": self._resolved_guidance(preset), "version": __version__}
        )

    def _resolved_guidance(self, preset: VideoPreset) -> str | Guidance:
        if self.guidance == "none":
            if self.anything_negative:
                raise InputError("--guidance none leaves the negative prompts without effect; leave out one of the two")
            return "none"
        if self.guidance is not None and self.version is None and not self.anything_negative:
            message = "no negative prompt was given, so guidance has nothing to do; add --neg TEXT"
            warnings.warn(message, PromptWarning, stacklevel=3)
        method = find_guidance(self.guidance, preset)
        return method if method is not None and not _registered(method) else spell(method, preset.guidance)

    def check_extension(self, preset: VideoPreset) -> None:
        """Raise InputError where prompts are to be extended for a model without a vocabulary to do it with."""
        if self.extend_prompt and preset.vocabulary is None:
            raise InputError(
                f"--extend-prompt is for models of a small vocabulary such as sprites, not {preset.name}; have a "
                "language model write the details into the prompt, as Wan's own tools do"
            )

    def states(self, preset: VideoPreset, seconds_of_chunk: Callable[[int], float]) -> PromptStateOf:
        """What each chunk shows: an entry of the timeline holds from the first chunk that starts at its time or later.

        Args:
            seconds_of_chunk: when a chunk's first frame is shown.
        """
        assert self.prompt is not None, "resolve the request first"
        now: PromptRequest = PromptRequest(prompt=self.prompt, negatives=self.negatives or (), guidance=self.guidance)
        changes = [(-math.inf, _state(now, preset))]
        for entry in self.timeline or ():
            now = now.merged(entry)
            changes.append((entry.at, _state(now, preset)))

        def state_of(chunk: int) -> PromptState:
            seconds = seconds_of_chunk(chunk) + 1e-6
            return [state for at, state in changes if at <= seconds][-1]

        return state_of


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded; a different choice makes the same video, up to rounding.

    Attributes:
        device: None takes CUDA where there is one.
        memory: "full", "auto", or the gigabytes of the card; weights and offload replace what it chooses.
        attention: kernel of the text cross-attention, sdpa or xformers.
        compile: "off", "on" (torch.compile) or "graphs" (and CUDA graphs).
        decode_ahead: chunks that are decoded in a thread while the model goes on.
    """

    device: str | None = None
    memory: str | None = None
    weights: Literal["plain", "int8", "fp8"] | None = None
    offload: bool | None = None
    attention: str = "sdpa"
    compile: str = "off"
    decode_ahead: int = 0


# --- guidance


def find_guidance(guidance: str | Guidance | None, preset: VideoPreset) -> Guidance | None:
    """The method of a spelling with this model's settings; None takes the model's default method.

    Raises:
        InputError: no such method or setting, or a value that it cannot take.
    """
    if guidance is None:
        guidance = preset.default_guidance
    if isinstance(guidance, str) and _is_change(guidance):
        guidance = change_guidance(preset.default_guidance, guidance)
    return parse_guidance(guidance, preset.guidance)


def spell_fully(method: Guidance) -> str:
    """The spelling with every setting, which no model's settings change."""
    return spell(method, {method.name: method.values()})


def change_guidance(current: str | Guidance | None, over: str | Guidance) -> str | Guidance:
    """The guidance after ``over``: another method, or, where it begins with a colon, other settings of the current."""
    if not isinstance(over, str) or not _is_change(over) or current in (None, "none"):
        return over
    head, *settings = (spell_fully(current) if isinstance(current, Guidance) else str(current)).split(",")
    name, _, scale = head.partition(":")
    new_scale, *changes = over[1:].split(",")
    stated = dict(part.split("=", 1) for part in [*settings, *changes] if "=" in part)
    scale = new_scale.strip() or scale
    return ",".join(
        [f"{name}:{scale}" if scale or not name else name, *(f"{key.strip()}={v}" for key, v in stated.items())]
    )


def _is_change(spelling: str) -> bool:
    return spelling.startswith(":")


def _registered(method: Guidance) -> bool:
    from nasa_video.guidance.methods import METHODS

    return METHODS.get(method.name) is type(method)


def _state(now: PromptRequest, preset: VideoPreset) -> PromptState:
    assert now.prompt is not None
    return PromptState.of(now.prompt, now.negatives, find_guidance(now.guidance, preset), now.on_change)


# --- what was written before


def _with_inline_negatives(data: dict[str, Any]) -> dict[str, Any]:
    """Negatives that stand in the prompt, ``(term:-1)``, among the others."""
    if not isinstance(data.get("prompt"), str):
        return data
    prompt, inline = split_prompt(data["prompt"])
    if not inline:
        return data
    return {**data, "prompt": prompt, "negatives": (*(_read_negatives(data.get("negatives")) or ()), *inline)}


def read_older(data: Mapping[str, Any]) -> dict[str, Any]:
    """What 0.1 wrote into recipes, timelines, batches and HTTP bodies, in today's words."""
    new = dict(data)
    for old, name in (("first_steps", "first_chunk_steps"),):
        if old in new:
            new.setdefault(name, new.pop(old))
    for old in ("recompute", "recompute_window"):
        if (recompute := new.pop(old, None)) is not None:
            new.setdefault("on_change", "recache" if recompute else "keep")
    if (scale := new.pop("scale", None)) is not None and new.get("guidance") != "none":
        if not isinstance(scale, int | float):
            raise InputError(f"scale must be a number, got {type(scale).__name__}")
        new["guidance"] = change_guidance(_read_guidance(new.get("guidance")), f":{float(scale)!r}".removesuffix(".0"))
    start = new.get("start")
    if isinstance(start, Mapping) and "new_frames" in start:
        new["frames"] = start["new_frames"]
        new["start"] = {key: value for key, value in start.items() if key != "new_frames"}
    timeline = new.get("timeline")
    if isinstance(timeline, Mapping):  # with a head of its own, which the recipe repeats
        new["timeline"] = [_with_whole_terms(entry) for entry in timeline.get("timeline", ())]
    return new


def _with_whole_terms(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of a recipe by 0.1, in whose texts a comma separated nothing."""
    terms = []
    for text in entry.get("negatives") or ():
        head, _, tail = text.rpartition(":")
        try:
            terms.append(Negative(head.strip(), float(tail)))
        except ValueError:
            terms.append(Negative(text.strip()))
    return {**entry, "negatives": terms} if entry.get("negatives") is not None else entry


def explain(error: ValidationError, model: type[Strict]) -> str:
    """The faults in a record, each with its place."""
    rows = []
    for fault in error.errors(include_url=False):
        place, message = [str(part) for part in fault["loc"]], str(fault["msg"])
        if fault["type"] == "extra_forbidden":
            message = f"there is no such setting{did_you_mean(place[-1], list(model.model_fields))}"
        elif fault["type"] == "value_error":  # a sentence of ours, which names what it is about
            place, message = place[:-1], message.removeprefix("Value error, ")
        rows.append(f"{'.'.join(place)}: {message}" if place else message)
    return "; ".join(dict.fromkeys(rows))
