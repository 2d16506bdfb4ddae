"""What ``nasa-video bench`` measures: a model of known sizes, its prompts, and the methods on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from causvid_adapter import CausalWan, ChunkSampler, KVCache, ModelCall, NoiseSource
from causvid_adapter.sizes import WanSizes
from causvid_adapter.window import Window
from nasa_video.backbones import wan
from nasa_video.bench.flops import Branches, ChunkLoop
from nasa_video.bench.random_model import RandomText
from nasa_video.guidance.attention import Attend
from nasa_video.guidance.methods import METHODS, AttentionGuidance, ClassifierFree, Guidance, Nasa, parse_guidance
from nasa_video.guidance.state import GuidanceState, PromptKeys
from nasa_video.models.presets import SamplerSettings
from nasa_video.video.classifier_free import BranchCaches, ClassifierFreeDenoiser


@dataclass(frozen=True)
class Method:
    """One row of the bench: a way of guiding, and whether equal padding keys are folded into one."""

    name: str
    title: str
    guidance: str | None
    fold: bool


BASELINE = Method("none-padded", "none, padded", None, False)
_PADDED, _FOLDED = "-padded", "-folded"


def find_methods(names: Sequence[str], presets: Mapping[str, Mapping[str, Any]]) -> tuple[Method, ...]:
    """Methods by spelling, such as ``nasa``, ``cfg:3`` or ``nasa-padded``; the baseline is always the first.

    Args:
        names: methods' spellings; "-padded" behind one leaves equal padding keys apart, which are folded otherwise
            ("-folded"). None takes every registered method.
        presets: the model's settings of each method.

    Raises:
        InputError: there is no such method, or the model cannot take its settings.
    """
    ours = (f"none{_FOLDED}", Nasa.name + _FOLDED, Nasa.name + _PADDED)
    rows = [BASELINE]
    for name in names or (*ours, *(name for name in METHODS if name != Nasa.name)):
        spelling, fold = name.removesuffix(_PADDED).removesuffix(_FOLDED), not name.endswith(_PADDED)
        guidance = parse_guidance(spelling, presets)
        title = "none" if guidance is None else f"{guidance.label}{spelling.removeprefix(guidance.name)}"
        title += ", folded" if fold else ", padded"
        rows.append(Method(name, title, None if guidance is None else spelling, fold))
    return tuple({row.title: row for row in rows}.values())


@dataclass
class Subject:
    """A model with everything that a method needs to run on it.

    Attributes:
        model: on any device; on "meta" operations are counted and not computed.
        attend: kernel of the text cross-attention.
        sampler: the preset's loop.
        guidance: the preset's settings of each method.
        latent_shape: (C, H, W) of a latent frame.
        text: of the prompts.
        lengths: real tokens of the positive and of the negative prompt.
    """

    model: CausalWan
    attend: Attend
    sampler: SamplerSettings
    guidance: Mapping[str, Mapping[str, Any]]
    latent_shape: tuple[int, int, int]
    text: RandomText
    lengths: tuple[int, int]
    _keys: dict[tuple[str, bool, bool], PromptKeys] = field(default_factory=dict)

    @property
    def sizes(self) -> WanSizes:
        """Of the transformer as it is, cut or not."""
        return WanSizes.of(self.model.transformer.config, self.model.num_layers)

    @property
    def loop(self) -> ChunkLoop:
        """What the cost of a chunk depends on."""
        s = self.sampler
        tokens = self.sizes.tokens_per_frame(*self.latent_shape[1:])
        return ChunkLoop(tokens, s.frames_per_chunk, s.default_steps, s.window)

    def settings(self, method: Method) -> Guidance | None:
        """The method's guidance, set as the preset has it."""
        return parse_guidance(method.guidance, self.guidance)

    def prompts(self, method: Method) -> list[tuple[str, bool, bool]]:
        """What the method makes keys of: (text, folded, with padding)."""
        positive, negative = RandomText.prompt(self.lengths[0], "p"), RandomText.prompt(self.lengths[1], "n")
        guidance = self.settings(method)
        prompts = [(positive, method.fold, True)]
        if guidance is not None:
            padding = not isinstance(guidance, AttentionGuidance) or guidance.negative_padding
            prompts.append((negative, method.fold, padding))
        return prompts

    def make_keys(self, text: str, fold: bool, padding: bool) -> PromptKeys:
        """Keys and values of a prompt, made anew."""
        return wan.prompt_keys(self.model.transformer, self.text([text]), fold=fold, padding=padding)

    def keys(self, text: str, fold: bool, padding: bool) -> PromptKeys:
        """The same, made once."""
        name = (text, fold, padding)
        if name not in self._keys:
            self._keys[name] = self.make_keys(*name)
        return self._keys[name]

    def branches(self, method: Method) -> Branches:
        """Text keys of each branch of each pass."""
        numbers = [self.keys(*prompt).layers[0].k.shape[1] for prompt in self.prompts(method)]
        two_passes = isinstance(self.settings(method), ClassifierFree)
        return [[n] for n in numbers] if two_passes else [numbers]


Reading = tuple[float, ...]
"""Quantities that only grow."""


class _Finished(Exception):
    """The last chunk is committed; the stream is not to begin another."""


class Rollout:
    """One video of one method, advanced a chunk at a time; what each chunk took is read off a growing quantity.

    A chunk is its steps and its clean pass. The loop is the sampler's own; a turn ends where it yields, so a chunk's
    clean pass falls into the turn after, and is charged to its own chunk.

    Args:
        read: the quantities so far: times, or operations.
    """

    extra_turns: ClassVar[int] = 1

    def __init__(
        self, subject: Subject, method: Method, chunks: int, noise: NoiseSource, read: Callable[[], Reading]
    ) -> None:
        keys = [subject.keys(*prompt) for prompt in subject.prompts(method)]
        guidance = subject.settings(method)
        self.steering = GuidanceState(subject.attend, subject.model.num_layers, positive=keys[0])
        model: Any = subject.model
        if isinstance(guidance, ClassifierFree):
            model = ClassifierFreeDenoiser(subject.model, self.steering)
            model.positive, model.negative, model.guidance = *keys, guidance
        elif isinstance(guidance, AttentionGuidance):
            self.steering.guidance, self.steering.negatives = guidance, [(keys[1], 1.0)]
        self.transformer = subject.model.transformer
        self.chunks = chunks
        self.spent: list[Reading] = []
        self.text_key_bytes = sum(k.num_bytes for k in keys)
        self._denoiser = _CacheHolder(model, chunks * subject.sampler.frames_per_chunk)
        self._read = read
        self._chunk = 0
        s = subject.sampler
        schedule = s.schedule(s.default_steps)
        sampler = ChunkSampler(self._denoiser, schedule, s.frames_per_chunk, s.window)
        self._latents = sampler.stream(None, noise, before_call=self._before_call)

    @property
    def history_bytes(self) -> int:
        """Bytes of the KV cache, or of both of them."""
        return 0 if self._denoiser.cache is None else self._denoiser.cache.num_bytes

    def turn(self) -> None:
        """Go on to the next chunk's latents; after the last, commit it."""
        self._mark = self._read()
        with wan.install(self.transformer, self.steering):
            try:
                next(self._latents)
            except _Finished:
                return
        self._charge()

    def _before_call(self, call: ModelCall) -> None:
        if call.chunk != self._chunk:
            self._charge()
            self._chunk = call.chunk
        if call.chunk == self.chunks:
            raise _Finished
        self.steering.call = call

    def _charge(self) -> None:
        now = self._read()
        taken = tuple(after - before for after, before in zip(now, self._mark, strict=True))
        if self._chunk == len(self.spent):
            self.spent.append(taken)
        else:
            self.spent[-1] = tuple(old + new for old, new in zip(self.spent[-1], taken, strict=True))
        self._mark = now


class _CacheHolder:
    """A denoiser that remembers the cache that it made, which holds the measured frames."""

    def __init__(self, model: Any, num_frames: int) -> None:
        self.model = model
        self.num_frames = num_frames
        self.cache: KVCache | BranchCaches | None = None

    def new_cache(
        self, height: int, width: int, window: Window, num_frames: int | None = None
    ) -> KVCache | BranchCaches:
        self.cache = self.model.new_cache(height, width, window, self.num_frames)
        return self.cache

    def __call__(self, latents: Tensor, timestep: float, context: Tensor | None, *, cache: Any) -> Tensor:
        flow: Tensor = self.model(latents, timestep, context, cache=cache)
        return flow
