"""Which words the sprites world knows, so that a prompt outside it can be told so kindly."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as nn_f
from torch import Tensor

from nasa_video.sprites.captions import TERMS

if TYPE_CHECKING:
    from nasa_video.text import TextEncoder

NEIGHBOUR_COSINE = 0.4
"""A word whose embedding is at least this near to a known word's counts as known."""
_GRAMMAR = frozenset(
    [
        "a",
        "an",
        "the",
        "and",
        "or",
        "of",
        "on",
        "in",
        "at",
        "to",
        "with",
        "its",
        "it",
        "is",
        "are",
        "that",
        "while",
        "over",
        "under",
        "by",
        "from",
        "for",
        "object",
        "objects",
        "shape",
        "shapes",
        "thing",
        "things",
        "video",
        "clip",
        "one",
        "two",
        "single",
        "pair",
        "background",
        "backgrounds",
        "sky",
        "weather",
        "light",
        "moving",
        "going",
        "very",
        "some",
        "this",
        "no",
        "not",
        "without",
        "picture",
        "image",
        "scene",
        "around",
    ]
)
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


@lru_cache(maxsize=1)
def known_words() -> frozenset[str]:
    """Every word of the captions' grammar."""
    phrases = [p for values in TERMS.values() for choices in values.values() for p in choices]
    return _GRAMMAR | {word for phrase in phrases for word in phrase.split()}


@lru_cache(maxsize=1)
def content_words() -> tuple[str, ...]:
    """The words that name something that can be seen, sorted."""
    return tuple(sorted(known_words() - _GRAMMAR))


def unknown_words(prompt: str, encoder: TextEncoder | None = None) -> list[str]:
    """The prompt's words that the world does not know, in order, each once.

    Args:
        prompt: any text.
        encoder: with a text encoder a word also counts as known when it is near to a known word, such as a plural.
    """
    known = known_words()
    words = list(dict.fromkeys(word for word in WORD.findall(prompt.lower()) if not _is_form_of(word, known)))
    if encoder is None or not words:
        return words
    nearest = (_embed(words, encoder) @ _embed(list(content_words()), encoder).T).amax(1)
    return [word for word, cosine in zip(words, nearest.tolist(), strict=True) if cosine < NEIGHBOUR_COSINE]


def nearest_known(word: str, encoder: TextEncoder, count: int = 3) -> list[str]:
    """Known words nearest in meaning, to suggest instead."""
    cosine = (_embed([word], encoder) @ _embed(list(content_words()), encoder).T)[0]
    return [content_words()[i] for i in cosine.topk(count).indices.tolist()]


def stems(word: str) -> list[str]:
    """What may stand behind a form: the singular, or the verb and its "ing" behind "jumps" and "bounced"."""
    endings = ("s", "es", "ed", "d", "y", "ly", "ish")
    bare = [stem for ending in endings if word.endswith(ending) and len(stem := word.removesuffix(ending)) > 2]
    return [form for stem in bare for form in (stem, stem + "ing", stem[:-1] + "ing")]


def _is_form_of(word: str, known: frozenset[str]) -> bool:
    return word in known or any(stem in known for stem in stems(word))


def _embed(words: list[str], encoder: TextEncoder) -> Tensor:
    """Unit vectors (words, E): the mean of a word's token embeddings."""
    context = encoder(words)
    mean = context.embeds.sum(1) / context.lengths.clamp(min=1)[:, None].to(context.embeds)
    return nn_f.normalize(mean.to(torch.float32), dim=-1)
