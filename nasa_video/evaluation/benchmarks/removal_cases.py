"""What a removal table asks: prompts, the feature that the negative prompt names, and what must stay."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Literal

import torch

from nasa_video.sprites.captions import caption_stating, term, value_names
from nasa_video.sprites.world import ATTRIBUTES, FAVOURITE_COLOUR, FLAWS, SHAPES, Scenes, sample_scenes

CaseKind = Literal["unmentioned", "stated", "conflict"]
Split = Literal["choose", "report"]

# Every prompt states these (but for the one in question), so that "held" means the same in every row.
MAIN = ("shape", "colour", "background", "motion")
UNMENTIONED = ("shape", "colour", "background", "motion", "size", "texture", "count", "weather", *FLAWS)
STATED = ("texture", "count", "weather", *FLAWS)
CONFLICT = ("shape", "colour", "background", "motion", "size")


@dataclass(frozen=True)
class Case:
    """One sample of the table.

    Attributes:
        attribute, value: the unwanted feature.
        kind: "unmentioned", the prompt does not speak of it; "stated", the prompt asks for something that can simply
            be absent (a flaw, weather, a second object, a texture) and the negative forbids it; "conflict", the prompt
            asks for a value that needs another in its place (a red star, and the negative "red").
        stated: attribute to value, what must still be there.
        seed: of the video; the same for every method.
    """

    attribute: str
    value: str
    kind: CaseKind
    prompt: str
    negative: str
    stated: dict[str, str]
    seed: int


def attributes_of(kind: CaseKind) -> tuple[str, ...]:
    """The attributes that a kind of case exists for."""
    return {"unmentioned": UNMENTIONED, "stated": STATED, "conflict": CONFLICT}[kind]


def build_cases(attribute: str, kind: CaseKind, n: int, split: Split, seed: int = 0) -> list[Case]:
    """n cases of one cell of the table.

    ``split`` "choose" is for tuning settings, "report" for reporting them; they share no scene, prompt draw or seed.
    """
    if attribute not in attributes_of(kind):
        raise ValueError(f"there is no case {kind!r} for {attribute!r}; it exists for {attributes_of(kind)}")
    cases = []
    for index in range(n):
        digest = hashlib.sha256(f"{split}/{seed}/{kind}/{attribute}/{index}".encode()).digest()
        number = int.from_bytes(digest[:6], "little")
        cases.append(_case(attribute, kind, number))
    return cases


def _case(attribute: str, kind: CaseKind, number: int) -> Case:
    generator = torch.Generator().manual_seed(number)
    rng = random.Random(number)
    scene = _plain(sample_scenes(1, generator))
    value = _unwanted(attribute, kind, scene, rng)
    if kind == "stated":
        scene = scene.replace(**{attribute: _index(attribute, value)})
        if attribute == "count":
            scene = scene.replace(size=0)
    elif kind == "conflict":
        value = value_names(scene.row(0))[attribute]
    stated = set(MAIN)
    if kind == "unmentioned":
        stated.discard(attribute)
    else:
        stated.add(attribute)
    names = value_names(scene.row(0))
    caption = caption_stating(scene.row(0), frozenset(stated), rng)
    kept = {name: names[name] for name in stated if name != attribute}
    if kind == "stated" and attribute == "count":
        kept = {name: names[name] for name in ("background", "motion")}
    return Case(attribute, value, kind, caption.text, term(attribute, value), kept, number)


def _plain(scene: Scenes) -> Scenes:
    """One sprite without flaws: what is stated is easy to hold, so that what is lost was lost to guidance."""
    return scene.replace(count=0, texture=0, weather=0, **dict.fromkeys(FLAWS, 0))


def _unwanted(attribute: str, kind: CaseKind, scene: Scenes, rng: random.Random) -> str:
    values = ATTRIBUTES[attribute]
    if attribute in FLAWS:
        return attribute
    if attribute == "colour" and kind == "unmentioned":
        # The shape's favourite: what an unguided model shows most.
        return values[FAVOURITE_COLOUR[int(scene.shape)]]
    if attribute == "shape":
        return rng.choice(SHAPES)
    if attribute in ("texture", "weather", "count"):
        return rng.choice(values[1:])
    return rng.choice(values)


def _index(attribute: str, value: str) -> int:
    return ATTRIBUTES[attribute].index(value)
