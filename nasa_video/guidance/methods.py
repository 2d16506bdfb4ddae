"""The guidance methods and their registry: each is one frozen class with its settings, its formula and its name.

A method is registered once and then works everywhere by its spelling, ``nasa-centred:0.5,conflict=2,limit=0.3``: on the
command line, in presets, timelines, recipes, the live page, evaluation and bench:

    @register
    @dataclass(frozen=True)
    class Half(AttentionGuidance):
        name: ClassVar[str] = "half"
        label: ClassVar[str] = "Half NASA"

        def __call__(self, q, positive, negatives, attend): ...

Importing this module loads no torch: the formulas are imported where a layer is computed.
"""

# B batch, Q query tokens, H heads, D head dim

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from nasa_video.errors import InputError
from nasa_video.guidance.schedule import EVERYWHERE, ScaleSchedule
from nasa_video.guidance.terms import MAX_SCALE

if TYPE_CHECKING:
    from torch import Tensor

    from nasa_video.guidance.attention import Attend, TextKeys, WeightedKeys


@dataclass(frozen=True)
class GuidedAttention:
    """Output of one guided layer.

    Attributes:
        z: (B, Q, H, D), what is passed to the output projection.
        z_pos: the unguided output.
        negative_share: scalar; how much of what was mixed came from the negative (see each method).
    """

    z: Tensor
    z_pos: Tensor
    negative_share: Tensor


@dataclass(frozen=True)
class Setting:
    """One setting of a method, as people write it.

    Attributes:
        name: in the spelling.
        default: the class's own; numbers are floats, switches bool, shares over steps or layers tuples.
        low, high: bounds of a number.
        optional: "none" is allowed.
    """

    name: str
    default: Any
    low: float
    high: float
    optional: bool
    help: str


def setting(
    default: Any,
    help: str,
    low: float = 0.0,
    high: float = MAX_SCALE,
    *,
    spelled: str = "",
    optional: bool = False,
    kw_only: bool = False,
) -> Any:
    """A field of a method: its default, what it does, and its bounds; ``spelled`` where people write another name."""
    described = {"help": help, "low": low, "high": high, "spelled": spelled, "optional": optional}
    return dataclasses.field(default=default, kw_only=kw_only, metadata=described)


@dataclass(frozen=True)
class Guidance:
    """A way to guide with negatives; every field made with :func:`setting` is checked and can be spelled.

    Attributes:
        name: in the spelling, label: for people, identity: the scale at which it does nothing.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    identity: ClassVar[float] = 0.0

    scale: float = setting(1.0, "strength")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.metadata:
                _check(field.name, getattr(self, field.name), field)

    @property
    def active(self) -> bool:
        """False where the settings make it the identity."""
        return self.scale != self.identity

    def scaled(self, factor: float) -> Self:
        """The method with a share of its strength, 0 to 1 (1: as it is).

        VSF's negatives keep their part of the attention at any share; what of it is subtracted follows the share.
        """
        if factor == 1.0:
            return self
        return dataclasses.replace(self, scale=self.identity + factor * (self.scale - self.identity))

    @classmethod
    def settings(cls) -> tuple[Setting, ...]:
        """Every setting that can be spelled, the scale first."""
        described = []
        for field in dataclasses.fields(cls):
            if field.name == "schedule":
                described += [
                    Setting(part.name, part.default, 0.0, 1.0, False, _SCHEDULE_HELP[part.name])
                    for part in dataclasses.fields(ScaleSchedule)
                ]
            elif about := field.metadata:
                name = about["spelled"] or field.name
                described.append(
                    Setting(name, field.default, about["low"], about["high"], about["optional"], about["help"])
                )
        return tuple(sorted(described, key=lambda s: s.name != "scale"))

    def values(self) -> dict[str, Any]:
        """The value of every setting by its spelled name, the scale first."""
        own = {f.metadata["spelled"] or f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata}
        if (schedule := getattr(self, "schedule", None)) is not None:
            own |= vars(schedule)
        return {described.name: own[described.name] for described in self.settings()}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The method with these settings, by their spelled or their field names.

        Raises:
            InputError: a setting that it does not have, or a value that it cannot take.
        """
        spelled = {f.metadata["spelled"]: f.name for f in dataclasses.fields(cls) if f.metadata.get("spelled")}
        fields = {f.name for f in dataclasses.fields(cls)}
        parts = {f.name for f in dataclasses.fields(ScaleSchedule)} if "schedule" in fields else set()
        own: dict[str, Any] = {}
        where: dict[str, Any] = {}
        for name, value in settings.items():
            value = tuple(value) if isinstance(value, list) else value
            if name == "schedule" and isinstance(value, Mapping):
                where |= {part: tuple(v) if isinstance(v, list) else v for part, v in value.items()}
            elif name in parts:
                where[name] = value
            elif spelled.get(name, name) in fields:
                own[spelled.get(name, name)] = value
            else:
                known = ", ".join(described.name for described in cls.settings())
                raise InputError(f"{cls.name} has no setting {name!r}; it takes {known}{did_you_mean(name, known)}")
        if unknown := set(where) - parts:
            raise InputError(f"a schedule has no {sorted(unknown)[0]!r}; it takes {', '.join(sorted(parts))}")
        if where:
            own["schedule"] = dataclasses.replace(own.get("schedule", EVERYWHERE), **where)
        return cls(**own)


def _check(name: str, value: Any, field: dataclasses.Field[Any]) -> None:
    """Refuse a value that a setting cannot take."""
    about = field.metadata
    if isinstance(field.default, bool):
        if not isinstance(value, bool):
            raise InputError(f"{name} must be True or False, got {value!r}")
        return
    if value is None and about["optional"]:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not about["low"] <= value <= about["high"]:
        raise InputError(f"{name} must be a number from {about['low']:g} to {about['high']:g}, got {value}")


_SCHEDULE_HELP = {
    "first_step": "share of the steps before which it is off",
    "last_step": "share of the steps after which it is off",
    "first_layer": "share of the layers before which it is off",
    "last_layer": "share of the layers after which it is off",
    "clean_pass": "guide the pass that writes a chunk's keys for later chunks",
    "step_scales": "shares of the scale over the steps, such as 1/0.5/0",
    "layer_scales": "shares of the scale over the layers, such as 0/1",
}


@dataclass(frozen=True)
class AttentionGuidance(Guidance):
    """A method that steers one attention layer away from the negatives."""

    negative_padding: bool = setting(True, "whether the negative's padding takes part", spelled="padding", kw_only=True)
    schedule: ScaleSchedule = dataclasses.field(default=EVERYWHERE, kw_only=True)

    def __call__(
        self, q: Tensor, positive: TextKeys, negatives: Sequence[WeightedKeys], attend: Attend
    ) -> GuidedAttention:
        """Guide one layer; q is (B, Q, H, D)."""
        raise NotImplementedError


M = TypeVar("M", bound=type[Guidance])
METHODS: dict[str, type[Guidance]] = {}
"""Every registered method by name."""


def register(method: M) -> M:
    """Make a method known everywhere by its name; a decorator.

    Raises:
        InputError: it has no name, or one that another has or that cannot be spelled.
    """
    name = getattr(method, "name", "")
    if not name or name == "none" or not all(c.isalnum() or c == "-" for c in name) or name != name.lower():
        raise InputError(f"a method needs a name of lower-case letters, digits and hyphens, got {name!r}")
    if METHODS.get(name, method).__qualname__ != method.__qualname__:
        raise InputError(f"there is a method {name!r} already; give yours another name")
    METHODS[name] = method
    return method


@register
@dataclass(frozen=True)
class Nasa(AttentionGuidance):
    """NASA as published: ``Z = Z+ - scale * Z-``; with several negatives, the weighted sum of their branches.

    Its negative share is |scale Z-| / (|Z+| + |scale Z-|), means over tokens of norms over channels.
    """

    name: ClassVar[str] = "nasa"
    label: ClassVar[str] = "NASA"

    def __call__(
        self, q: Tensor, positive: TextKeys, negatives: Sequence[WeightedKeys], attend: Attend
    ) -> GuidedAttention:
        from nasa_video.guidance.formulas import nasa, norm_share, sum_branches

        z_pos = attend(q, positive)
        z_neg = sum_branches(q, negatives, attend)
        return GuidedAttention(nasa(z_pos, z_neg, scale=self.scale), z_pos, norm_share(z_pos, self.scale * z_neg))


@register
@dataclass(frozen=True)
class CentredNasa(AttentionGuidance):
    """NASA that leaves alone what all prompts have in common: ``Z = Z+ - scale (Z- - Z0)``.

    Z0 is what a prompt without words attends to: the value of the padding token, since a softmax over equal keys gives
    their value whatever the query is. Where the negative finds nothing it attends to its padding, Z- is near Z0, and
    nothing is subtracted; plain NASA subtracts all of Z0 there (docs/method/formulas.md). For the same reason several
    negatives need not share the scale: each has its own weight of it.

    With `conflict` the scale rises where prompt and negative contradict each other, and only there:
    ``Z = Z+ - scale (1 + conflict c) (Z- - Z0)``, c being how much of Z- - Z0 the prompt's own Z+ - Z0 contains
    (:func:`~nasa_video.guidance.formulas.projection_coefficient`), in every token and head. What nobody asked for needs
    little; what the prompt asks for needs a lot.

    With `limit` the part that does not rise is, for each negative, no longer than that share of |Z+| in any token:
    ``Z = Z+ - scale (l + conflict c) (Z- - Z0)``, l = min(1, limit |Z+| / (scale |Z- - Z0|))
    (:func:`~nasa_video.guidance.formulas.norm_clip`). Some negatives say far more than others at the same scale; None
    is no limit.

    Its negative share is |Z+ - Z| / (|Z+| + |Z+ - Z|), as NASA's.
    """

    name: ClassVar[str] = "nasa-centred"
    label: ClassVar[str] = "centred NASA"

    conflict: float = setting(0.0, "rise of the scale where prompt and negative contradict each other")
    limit: float | None = setting(None, "longest step elsewhere, as a share of |Z+|", optional=True)

    def __call__(
        self, q: Tensor, positive: TextKeys, negatives: Sequence[WeightedKeys], attend: Attend
    ) -> GuidedAttention:
        from nasa_video.guidance.formulas import nasa, norm_clip, norm_share, projection_coefficient

        z_pos = attend(q, positive)
        added = z_pos.new_zeros(z_pos.shape)
        for keys, weight in negatives:
            if keys.padding_v is None:
                raise InputError(
                    f"{self.name} subtracts what the negative adds to the padding, and there is none: this model does "
                    "not pad its prompts with one token, or an unfolded negative fills all tokens; use nasa"
                )
            its_own = attend(q, keys) - keys.padding_v
            share = its_own.new_ones(its_own[..., :1, :1].shape)
            if self.limit is not None:
                share = norm_clip(self.scale * its_own, z_pos, limit=self.limit)
            if self.conflict:
                share = share + self.conflict * projection_coefficient(z_pos - keys.padding_v, its_own)
            added = added + weight * share.to(its_own.dtype) * its_own
        return GuidedAttention(nasa(z_pos, added, scale=self.scale), z_pos, norm_share(z_pos, self.scale * added))


@register
@dataclass(frozen=True)
class Nag(AttentionGuidance):
    """NAG; defaults are the paper's for Wan 2.1; scale 1 is unguided.

    Its negative share is that of (scale - 1) Z- beside scale Z+, in norms.
    """

    name: ClassVar[str] = "nag"
    label: ClassVar[str] = "NAG"
    identity: ClassVar[float] = 1.0

    scale: float = setting(4.0, "strength, phi + 1 of the paper", 1.0)
    tau: float = setting(2.5, "longest output, in multiples of |Z+|", 1.0)
    alpha: float = setting(0.25, "share of the guided output in the mean with Z+", 0.0, 1.0)

    @property
    def active(self) -> bool:
        return self.scale > 1 and self.alpha > 0

    def __call__(
        self, q: Tensor, positive: TextKeys, negatives: Sequence[WeightedKeys], attend: Attend
    ) -> GuidedAttention:
        from nasa_video.guidance.formulas import nag, norm_share, shares, sum_branches

        z_pos = attend(q, positive)
        # Weights below one move the reference back towards the positive branch.
        rest = 1.0 - sum(shares(negatives))
        z_neg = sum_branches(q, negatives, attend)
        if rest > 0:
            z_neg = z_neg + rest * z_pos
        z = nag(z_pos, z_neg, scale=self.scale, tau=self.tau, alpha=self.alpha)
        return GuidedAttention(z, z_pos, norm_share(self.scale * z_pos, (self.scale - 1) * z_neg))


@register
@dataclass(frozen=True)
class Vsf(AttentionGuidance):
    """VSF; the negative's padding is left out, as in its public scripts; scale 0 means off.

    Its negative share is 1 - w, the attention mass that the negatives' keys take.
    """

    name: ClassVar[str] = "vsf"
    label: ClassVar[str] = "VSF"

    bias: float = setting(0.0, "added to the positive's log-sum-exp in the gate", -MAX_SCALE)
    negative_padding: bool = setting(
        False, "whether the negative's padding takes part", spelled="padding", kw_only=True
    )

    def __call__(
        self, q: Tensor, positive: TextKeys, negatives: Sequence[WeightedKeys], attend: Attend
    ) -> GuidedAttention:
        import torch

        from nasa_video.guidance.formulas import vsf

        z_pos, lse_pos = attend.with_lse(q, positive)
        # Several negatives are one prompt whose keys are all of theirs: their branches merge by attention mass, which
        # already shares the strength among them, so the weights are taken as they are.
        branches = [attend.with_lse(q, keys) for keys, _ in negatives]
        lse_neg = torch.stack([lse for _, lse in branches]).logsumexp(dim=0)
        z_neg = torch.zeros_like(z_pos)
        for (branch, lse), (_, weight) in zip(branches, negatives, strict=True):
            z_neg = z_neg + weight * (lse - lse_neg).exp().to(z_pos.dtype) * branch
        z = vsf(z_pos, z_neg, lse_pos, lse_neg, scale=self.scale, bias=self.bias)
        return GuidedAttention(z, z_pos, torch.sigmoid(lse_neg + self.bias - lse_pos).mean())


@register
@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """Classifier-free guidance with the negative prompt in the unconditional place; scale 1 is unguided.

    It costs a second pass of the whole model and a second KV cache, and corrupts few-step models: it is here to be
    compared with. It works on the denoiser's output, see ``nasa_video.video.classifier_free``.
    """

    name: ClassVar[str] = "cfg"
    label: ClassVar[str] = "CFG"
    identity: ClassVar[float] = 1.0

    scale: float = setting(3.0, "strength", 1.0)


def did_you_mean(wrong: str, known: str | Sequence[str]) -> str:
    """`` (did you mean 'x'?)`` for the nearest of the known words; nothing where none is near."""
    import difflib

    words = known.split(", ") if isinstance(known, str) else list(known)
    near = difflib.get_close_matches(wrong.lower(), words, 1, 0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


# --- spelling

Settings = Mapping[str, Mapping[str, Any]]
"""By method, a model's settings that differ from the class's own."""


def find_method(name: str) -> type[Guidance]:
    """The method of a name.

    Raises:
        InputError: there is none.
    """
    if name in METHODS:
        return METHODS[name]
    near = did_you_mean(name, [*METHODS, "none"])
    raise InputError(f"guidance must be one of {', '.join(METHODS)} or none, got {name!r}{near}")


def parse_guidance(spelling: str | Guidance | None, model: Settings | None = None) -> Guidance | None:
    """A method from its spelling ``NAME[:SCALE][,SETTING=VALUE ...]``; "none", "" and None are no guidance.

    What the spelling leaves open is the model's setting, and then the class's default. A :class:`Guidance` is itself.

    Raises:
        InputError: no such method or setting, or a value that it cannot take.
    """
    if spelling is None or isinstance(spelling, Guidance):
        return spelling
    if not isinstance(spelling, str):
        raise InputError(f"guidance must be a method or its spelling such as 'nasa:0.8', got {type(spelling).__name__}")
    head, *rest = (part.strip() for part in spelling.split(","))
    name, colon, scale = (part.strip() for part in head.partition(":"))
    name, *switches = name.split("+")
    if name.lower() in ("", "none"):
        if colon or rest or switches:
            raise InputError(f"no guidance has no settings, got {spelling!r}")
        return None
    method = find_method(name.lower())
    given: dict[str, Any] = dict((model or {}).get(method.name, {}))
    if colon:
        given["scale"] = _value(method, "scale", scale)
    for part in [*map(_older_switch, switches), *rest]:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise InputError(f"{part!r} in {spelling!r} must be SETTING=VALUE, such as {method.settings()[0].name}=0.5")
        key = "padding" if key == "negative_padding" else key
        if key == "padding":
            given.pop("negative_padding", None)
        given[key] = _value(method, key, value)
    try:
        return method.of(given)
    except InputError as error:
        raise InputError(f"{spelling}: {error}") from error


def parse_methods(text: str, model: Settings | None = None) -> dict[str, Guidance | None]:
    """The methods of several spellings (see :func:`split_methods`), by what was written.

    Raises:
        InputError: none, one twice, or as :func:`parse_guidance`.
    """
    return {spelling: parse_guidance(spelling, model) for spelling in split_methods(text)}


def split_methods(text: str) -> list[str]:
    """Several spellings, separated by semicolons or commas (what has no "=" begins the next).

    Raises:
        InputError: none, or one twice.
    """
    spellings: list[str] = []
    for part in (part.strip() for group in text.split(";") for part in ["", *group.split(",")]):
        if "=" in part and spellings and spellings[-1]:
            spellings[-1] += f",{part}"
        else:
            spellings.append(part)
    spellings = [spelling for spelling in spellings if spelling]
    if not spellings:
        raise InputError(f"give at least one method, such as none,cfg:3,nasa; there are none, {', '.join(METHODS)}")
    twice = next((s for i, s in enumerate(spellings) if s in spellings[:i]), None)
    if twice is not None:
        raise InputError(f"the method {twice!r} is given twice")
    return spellings


def spell(method: Guidance | None, model: Settings | None = None) -> str:
    """The spelling that :func:`parse_guidance` reads as this method with all its settings; "none" for None.

    What ``model`` would fill in is always written, so that the spelling is complete with its settings and without.

    Raises:
        InputError: a method that is not registered, which no spelling can name.
    """
    if method is None:
        return "none"
    if METHODS.get(method.name) is not type(method):
        raise InputError(f"{type(method).__name__} is not registered; put @nasa_video.register before its class")
    values = method.values()
    own = {"padding" if key == "negative_padding" else key for key in (model or {}).get(method.name, {})}
    changed = [
        f"{described.name}={_spelled(values[described.name])}"
        for described in method.settings()[1:]
        if values[described.name] != described.default or described.name in own
    ]
    return ",".join([f"{method.name}:{_spelled(method.scale)}", *changed])


def check_settings(model: Settings) -> Settings:
    """A model's settings as they are; every method and every setting in them exists and can be taken.

    Raises:
        InputError: one does not.
    """
    for name, settings in model.items():
        find_method(name).of(settings)
    return model


_WORDS: dict[str, bool | None] = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}


def _value(method: type[Guidance], name: str, text: str) -> Any:
    described = next((s for s in method.settings() if s.name == name), None)
    if described is None:
        known = ", ".join(s.name for s in method.settings())
        raise InputError(f"{method.name} has no setting {name!r}; it takes {known}{did_you_mean(name, known)}")
    word = text.lower()
    if isinstance(described.default, bool):
        if word not in _WORDS:
            raise InputError(f"{name} must be yes or no, got {text!r}")
        return _WORDS[word]
    if word == "none" and (described.optional or isinstance(described.default, tuple)):
        return () if isinstance(described.default, tuple) else None
    try:
        return tuple(map(float, text.split("/"))) if isinstance(described.default, tuple) else float(text)
    except ValueError:
        expected = "numbers such as 1/0.5/0" if isinstance(described.default, tuple) else "a number"
        raise InputError(f"{name} must be {expected}, got {text!r}") from None


def _spelled(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return "/".join(map(_spelled, value)) or "none"
    return repr(float(value)).removesuffix(".0")


def _older_switch(switch: str) -> str:
    """``nopad``, ``conflict2`` and the like, which 0.1 wrote behind a plus, as a setting."""
    if switch in ("pad", "nopad"):
        return f"padding={'yes' if switch == 'pad' else 'no'}"
    if switch == "nolimit":
        return "limit=none"
    name = switch.rstrip("+-.0123456789")
    return f"{name}={switch[len(name) :]}"
