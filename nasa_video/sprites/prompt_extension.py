"""Prompt extension: says of a short prompt what it leaves open, drawn by a seed as often as the world shows it.

A few-step student answers a short prompt with its favourites (docs/method/variety.md); told more, it shows more. Tools
for large models let a language model write such details (Wan 2.1's prompt extension); here the captions' grammar does.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Set
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from nasa_video.sprites.captions import TERMS, article, full_caption, leaves_open, term, value_names
from nasa_video.sprites.vocabulary import WORD, content_words, nearest_known, stems, unknown_words
from nasa_video.sprites.world import ATTRIBUTES, FLAWS, decide, sample_scenes

if TYPE_CHECKING:
    from nasa_video.text import TextEncoder

_COUNTS = {"one": "one", "single": "one", "two": "two", "pair": "two"}
_SAID_BY_A_FULL_SENTENCE = frozenset({"shape", "colour", "size", "motion", "background"})


def stated_in(prompt: str, encoder: TextEncoder | None = None) -> dict[str, str]:
    """What a prompt states, attribute to value; a second object's as shape2 and colour2.

    Args:
        prompt: any text.
        encoder: with a text encoder a word that the world does not know means the known one that is nearest to it.
    """
    stated: dict[str, str] = {}
    for attribute, value in _mentions(prompt.lower(), encoder):
        name = attribute
        if attribute in ("shape", "colour") and stated.get(attribute, value) != value:
            name = attribute + "2"
        stated.setdefault(name, value)
    if "shape2" in stated or "colour2" in stated:
        stated["count"] = "two"
    return stated


def extend_prompt(prompt: str, seed: int, encoder: TextEncoder | None = None) -> str:
    """The prompt, and after it what it leaves open: the same for the same seed.

    A prompt that says shape, colour, size, motion and background leaves nothing open: it comes back as it is. Weather
    and flaws are drawn, too, each as often as the world has it.

    Args:
        prompt: any text; it stays as it is, word by word.
        seed: decides every value that is drawn. Two prompts share what both of them leave open.
        encoder: see `stated_in`.
    """
    known = stated_in(prompt, encoder)
    still_open = leaves_open(frozenset(known)) - known.keys()
    if known.keys() >= _SAID_BY_A_FULL_SENTENCE or not still_open:
        return prompt
    generator = torch.Generator().manual_seed(seed)
    numbers = {name: _values(name).index(value) for name, value in known.items()}
    scene = sample_scenes(1, generator).replace(**numbers)
    left_open = {name: torch.tensor([name in still_open]) for name in (*ATTRIBUTES, "shape2", "colour2")}
    drawn = decide(scene, left_open, lambda _, shares: torch.multinomial(shares, 1, generator=generator)[:, 0]).row(0)
    if not prompt.strip():
        return full_caption(drawn, random.Random(seed)).text
    return ", ".join([prompt.rstrip(" ,."), *_additions(value_names(drawn), still_open)])


def _additions(names: Mapping[str, str], left_open: Set[str]) -> Iterator[str]:
    """Phrases for the values that are open, without those that go without saying."""
    adjectives = [term("size", names["size"])] if "size" in left_open else []
    if "texture" in left_open and names["texture"] != "plain":
        adjectives.append(term("texture", names["texture"]))
    if "colour" in left_open:
        adjectives.append(term("colour", names["colour"]))
    if "shape" in left_open:
        adjectives.append(term("shape", names["shape"]))
    if adjectives:
        yield " ".join(adjectives)
    if "count" in left_open and names["count"] == "two":
        second = f"{term('colour', names['colour2'])} {term('shape', names['shape2'])}"
        yield f"and {article(second)}"
    moves = [term("motion", names["motion"])] if "motion" in left_open else []
    if "background" in left_open:
        moves.append(f"on a {term('background', names['background'])}")
    if moves:
        yield " ".join(moves)
    if "weather" in left_open and names["weather"] != "none":
        yield term("weather", names["weather"])
    yield from (term(flaw, flaw) for flaw in FLAWS if flaw in left_open and names[flaw] == flaw)


def _values(name: str) -> tuple[str, ...]:
    return tuple(ATTRIBUTES[name.removesuffix("2")])


def _mentions(text: str, encoder: TextEncoder | None) -> Iterator[tuple[str, str]]:
    """Attributes and values that a text names, in its order: by whole phrases first, then by single words."""
    found: list[tuple[int, str, str]] = []
    phrases = [(p, a, v) for a, values in TERMS.items() for v, choices in values.items() for p in choices]
    for phrase, attribute, value in sorted(phrases, key=lambda item: -len(item[0])):
        for match in re.finditer(rf"\b{re.escape(phrase)}(?:s|es)?\b", text):
            found.append((match.start(), attribute, value))
            text = text[: match.start()] + " " * len(match[0]) + text[match.end() :]
    meanings = _meanings_of_words()
    for match in WORD.finditer(text):
        word = match[0]
        known = next((form for form in (word, *stems(word)) if form in meanings), None)
        if known is None and encoder is not None and not unknown_words(word, encoder) and unknown_words(word):
            known = nearest_known(word, encoder, 1)[0]
        if known in meanings:
            found.append((match.start(), *meanings[known]))
    yield from ((attribute, value) for _, attribute, value in sorted(found))


@lru_cache(maxsize=1)
def _meanings_of_words() -> dict[str, tuple[str, str]]:
    """Single words that mean one value wherever they stand: those of the phrases of one value and of no other."""
    by_word: dict[str, set[tuple[str, str]]] = {}
    for attribute, values in TERMS.items():
        for value, choices in values.items():
            for word in {word for phrase in choices for word in phrase.split()}.intersection(content_words()):
                by_word.setdefault(word, set()).add((attribute, value))
    meanings = {word: next(iter(values)) for word, values in by_word.items() if len(values) == 1}
    return meanings | {word: ("count", value) for word, value in _COUNTS.items()}
