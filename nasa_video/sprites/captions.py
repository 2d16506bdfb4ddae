"""Sentences about scenes: a grammar that names a random part of what is there, and the world's vocabulary.

Because a caption leaves things out, the model learns to show what was not mentioned at its share in the data; that is
what gives a negative prompt something to do.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nasa_video.sprites.world import ATTRIBUTES, FLAWS

HELD_OUT_ONE_IN = 20
_HELD_OUT_MIN_WORDS = 4
_ALWAYS_THERE = frozenset({"shape", "colour", "size", "count", "motion", "background"})

TERMS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "shape": {
            "circle": ("circle", "ball", "disc"),
            "square": ("square", "box", "block"),
            "triangle": ("triangle",),
            "star": ("star",),
            "heart": ("heart",),
            "ring": ("ring", "hoop", "donut"),
        },
        "colour": {
            "red": ("red", "crimson", "scarlet"),
            "orange": ("orange",),
            "yellow": ("yellow", "golden"),
            "green": ("green", "emerald"),
            "blue": ("blue", "azure"),
            "purple": ("purple", "violet"),
        },
        "size": {"small": ("small", "little", "tiny"), "big": ("big", "large", "huge")},
        "texture": {
            "plain": ("plain", "solid"),
            "striped": ("striped", "stripy"),
            "dotted": ("dotted", "spotted"),
        },
        "count": {"one": ("one object", "a single object"), "two": ("two objects", "two shapes", "a pair of objects")},
        "motion": {
            "left": ("moving left", "going left", "drifting to the left"),
            "right": ("moving right", "going right", "drifting to the right"),
            "up": ("moving up", "rising", "going up"),
            "down": ("moving down", "falling", "going down"),
            "bouncing": ("bouncing", "jumping", "hopping"),
            "spinning": ("spinning", "rotating", "turning around"),
            "pulsing": ("pulsing", "growing and shrinking"),
            "still": ("still", "standing still", "motionless"),
        },
        "background": {
            "dark": ("dark background", "black background"),
            "light": ("light background", "white background", "bright background"),
            "gradient": ("gradient background", "gradient"),
            "striped": ("striped background", "background with stripes"),
            "checkered": ("checkered background", "chessboard"),
            "starry": ("starry background", "starry sky", "night sky"),
        },
        "weather": {
            "none": ("clear weather",),
            "snow": ("snow", "snowing", "snowfall"),
            "rain": ("rain", "raining", "rainy weather"),
        },
        "blurry": {"blurry": ("blurry", "blurred", "out of focus")},
        "noisy": {"noisy": ("noisy", "grainy", "noise")},
        "dim": {"dim": ("dim", "underexposed", "dim light")},
        "flickering": {"flickering": ("flickering", "flicker")},
        "pixelated": {"pixelated": ("pixelated", "blocky")},
        "watermark": {"watermark": ("watermark", "watermarked")},
        "border": {"border": ("border", "frame", "framed")},
    }
)
"""Attribute → value → short phrases; the first is the name to use as a negative prompt."""

_NOUNS = ("object", "shape", "thing")
_STYLES = ("a video of", "a clip of", "video of")


@dataclass(frozen=True)
class Caption:
    """A sentence and the attributes that it states."""

    text: str
    stated: frozenset[str]


def term(attribute: str, value: str) -> str:
    """The short phrase for a value, to prompt with or against: ("background", "dark") → "dark background"."""
    return TERMS[attribute][value][0]


def value_names(row: Mapping[str, int]) -> dict[str, str]:
    """The integers of `Scenes.row` as value names; the second object's as shape2 and colour2."""
    names = {attribute: values[row[attribute]] for attribute, values in ATTRIBUTES.items()}
    names["shape2"], names["colour2"] = ATTRIBUTES["shape"][row["shape2"]], ATTRIBUTES["colour"][row["colour2"]]
    return names


def is_held_out(text: str) -> bool:
    """Whether a caption is one of the twentieth that training never sees (by the hash of its text)."""
    if len(text.split()) < _HELD_OUT_MIN_WORDS:
        return False
    return int(hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def full_caption(row: Mapping[str, int], rng: random.Random) -> Caption:
    """A sentence that states everything that is there."""
    names = value_names(row)
    stated = _ALWAYS_THERE | {flaw for flaw in FLAWS if row[flaw]}
    stated |= {name for name in ("texture", "weather") if row[name]}
    return Caption(sentence_stating(names, stated, rng), stated)


def caption_stating(row: Mapping[str, int], stated: frozenset[str], rng: random.Random) -> Caption:
    """A sentence that states exactly these attributes of a scene (the shape's noun is always there)."""
    return Caption(sentence_stating(value_names(row), stated, rng), stated)


def random_caption(row: Mapping[str, int], rng: random.Random, full: bool = False) -> Caption:
    """A caption for training, never a held-out one: of a random part of what is there, or of all of it."""
    while True:
        caption = full_caption(row, rng) if full else _draw(row, rng)
        if not is_held_out(caption.text):
            return caption


def leaves_open(stated: frozenset[str]) -> frozenset[str]:
    """What a caption leaves open, of all attributes and those of the second object, "shape2" and "colour2".

    Nothing where it states all that there always is: what such a caption does not mention is not there.
    """
    if stated >= _ALWAYS_THERE:
        return frozenset()
    of_both = {name + "2" for name in ("shape", "colour") if {name, "count"} <= stated}
    return frozenset({*ATTRIBUTES, "shape2", "colour2"}) - stated - of_both


def _draw(row: Mapping[str, int], rng: random.Random) -> Caption:
    if rng.random() < 0.2:
        return full_caption(row, rng)
    names = value_names(row)
    there = things_to_state(row)
    if rng.random() < 0.12:
        attribute = rng.choice(there)
        return Caption(_phrase(attribute, names[attribute], rng), frozenset({attribute}))
    stated = frozenset(a for a in there if rng.random() < stating_share(a, names))
    if not stated:
        stated = frozenset({rng.choice(there)})
    if rng.random() < 0.2:
        phrases = [_phrase(a, names[a], rng) for a in stated]
        rng.shuffle(phrases)
        return Caption(", ".join(phrases), stated)
    return Caption(sentence_stating(names, stated, rng), stated)


def stating_share(attribute: str, names: Mapping[str, str]) -> float:
    """How often a caption states an attribute; shapes are the hardest to learn and come most often."""
    if attribute == "shape":
        return 0.8
    if attribute in FLAWS:
        return 0.45
    return 0.2 if _is_default(attribute, names) else 0.62


def _is_default(attribute: str, names: Mapping[str, str]) -> bool:
    return (attribute, names[attribute]) in {("texture", "plain"), ("count", "one"), ("weather", "none")}


def things_to_state(row: Mapping[str, int]) -> list[str]:
    """The attributes that a caption of this scene may state: all but the flaws that it does not have."""
    basic = ["shape", "colour", "size", "texture", "count", "motion", "background", "weather"]
    return basic + [flaw for flaw in FLAWS if row[flaw]]


def _phrase(attribute: str, value: str, rng: random.Random) -> str:
    choices = TERMS[attribute][value]
    return choices[0] if rng.random() < 0.6 else rng.choice(choices)


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _object(names: Mapping[str, str], stated: frozenset[str], suffix: str, rng: random.Random) -> str:
    words = [_phrase(a, names[a], rng) for a in ("size", "texture") if a in stated]
    if "colour" in stated:
        words.append(_phrase("colour", names["colour" + suffix], rng))
    words.append(_phrase("shape", names["shape" + suffix], rng) if "shape" in stated else rng.choice(_NOUNS))
    return " ".join(words)


def _subject(names: Mapping[str, str], stated: frozenset[str], rng: random.Random) -> str:
    first = _object(names, stated, "", rng)
    if "count" not in stated:
        return article(first)
    if names["count"] == "one":
        return article(first) if rng.random() < 0.7 else "one " + first
    if not stated & {"shape", "colour"}:
        words = [_phrase(a, names[a], rng) for a in ("size", "texture") if a in stated]
        return " ".join(["two", *words, rng.choice(("objects", "shapes"))])
    second = _object(names, stated - {"size", "texture"}, "2", rng)
    return f"{article(first)} and {article(second)}"


def _background(value: str, rng: random.Random) -> str:
    phrase = _phrase("background", value, rng)
    if phrase.endswith("sky"):
        return f"in a {phrase}"
    return f"on a {phrase}"


def sentence_stating(names: Mapping[str, str], stated: frozenset[str], rng: random.Random) -> str:
    """A sentence about a scene, given by its value names, that states these attributes."""
    parts = [_subject(names, stated, rng)]
    if "motion" in stated:
        parts.append(_phrase("motion", names["motion"], rng))
    if "background" in stated:
        parts.append(_background(names["background"], rng))
    sentence = " ".join(parts)
    tail = [_phrase(a, names[a], rng) for a in ("weather", *FLAWS) if a in stated]
    front = [a for a in ("blurry", "noisy", "dim", "flickering", "pixelated") if a in stated]
    if len(front) == 1 and rng.random() < 0.3:
        tail = [_phrase(a, names[a], rng) for a in ("weather", "watermark", "border") if a in stated]
        sentence = f"a {front[0]} {rng.choice(('video', 'clip'))} of {sentence}"
    elif rng.random() < 0.08:
        sentence = f"{rng.choice(_STYLES)} {sentence}"
    rng.shuffle(tail)
    return ", ".join([sentence, *tail])
