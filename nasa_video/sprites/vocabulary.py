"""Which words the sprites world knows, so that a prompt outside it can be told so kindly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
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
TYPO_RATIO = 0.75
"""Two words that are at least this alike, letter by letter, are one of them misspelt."""
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_GRAMMAR_WORDS = """
a an the and or of on in at to with its it is are that while over under by from for some this no not without very around
object objects shape shapes thing things video clip picture image scene one two single pair background backgrounds sky
weather light moving going
"""
_GRAMMAR = frozenset(_GRAMMAR_WORDS.split())


class SpritesVocabulary:
    """The sprites world as a :class:`~nasa_video.text.vocabulary.Vocabulary`."""

    about = "a small world of coloured shapes"
    example = "a red ball bouncing on a checkered background"

    def words(self) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
        """Attribute → value → phrases."""
        return TERMS

    def unknown_words(self, prompt: str, encoder: TextEncoder | None = None) -> list[str]:
        """See :func:`unknown_words`."""
        return unknown_words(prompt, encoder)

    def suggestions(self, word: str, encoder: TextEncoder | None = None) -> list[str]:
        """See :func:`suggestions`."""
        return suggestions(word, encoder)

    def extend_prompt(self, prompt: str, seed: int, encoder: TextEncoder | None = None) -> str:
        """See :func:`nasa_video.sprites.prompt_extension.extend_prompt`."""
        from nasa_video.sprites.prompt_extension import extend_prompt

        return extend_prompt(prompt, seed, encoder)


SPRITES = SpritesVocabulary()


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


def suggestions(word: str, encoder: TextEncoder | None = None, count: int = 3) -> list[str]:
    """Known words to write instead: those spelt alike, then, with a text encoder, those nearest in meaning."""
    alike = get_close_matches(word.lower(), content_words(), count, TYPO_RATIO)
    near = nearest_known(word, encoder, count) if encoder is not None else []
    return list(dict.fromkeys([*alike, *near]))[:count]


def nearest_known(word: str, encoder: TextEncoder, count: int = 3) -> list[str]:
    """Known words nearest in meaning."""
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
