"""Captions that only training and measuring need: of chosen attributes, as users write them, of switches, held out."""

from __future__ import annotations

import random
from collections.abc import Mapping

from nasa_video.sprites.captions import (
    Caption,
    caption_stating,
    full_caption,
    is_held_out,
    random_caption,
    sentence_stating,
    stating_share,
    things_to_state,
    value_names,
)
from nasa_video.sprites.world import ATTRIBUTES


def caption_for_training(row: Mapping[str, int], stated: frozenset[str], rng: random.Random) -> Caption:
    """A caption for training that states exactly these attributes, never a held-out one."""
    while is_held_out((caption := caption_stating(row, stated, rng)).text):
        pass
    return caption


def caption_as_users_write(row: Mapping[str, int], rng: random.Random) -> Caption:
    """A caption for training as users write them: of one thing, often the shape, of nothing, of a part, of all."""
    kind = rng.random()
    if kind < 0.05:
        return Caption("", frozenset())
    if kind < 0.45:
        attribute = "shape" if kind < 0.35 else rng.choice(things_to_state(row))
        return caption_for_training(row, frozenset({attribute}), rng)
    return random_caption(row, rng, full=kind > 0.8)


def switched_captions(before: Mapping[str, int], after: Mapping[str, int], rng: random.Random) -> tuple[str, str]:
    """Two captions for training, of a clip that turns into another: both state what changes, and the same besides."""
    first, second = value_names(before), value_names(after)
    changed = {a for a in ATTRIBUTES if first[a] != second[a]}
    if "two" in (first["count"], second["count"]):
        changed |= {a for a in ("shape", "colour") if first[a + "2"] != second[a + "2"]}
    while True:
        also = {a for a in ATTRIBUTES if rng.random() < stating_share(a, first)}
        texts = []
        for names, row in ((first, before), (second, after)):
            stated = frozenset((changed | also) & set(things_to_state(row)))
            texts.append(sentence_stating(names, stated, rng))
        if not any(map(is_held_out, texts)):
            return texts[0], texts[1]


def held_out_caption(row: Mapping[str, int], rng: random.Random, tries: int = 400) -> Caption | None:
    """A full sentence from the held-out twentieth, or None where this scene has none within the tries."""
    for _ in range(tries):
        caption = full_caption(row, rng)
        if is_held_out(caption.text):
            return caption
    return None
