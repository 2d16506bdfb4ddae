"""What a model of few words has to say about a prompt: words that it has never seen, and what to write instead.

A preset names its vocabulary; a large model has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from nasa_video.errors import InputError

if TYPE_CHECKING:
    from nasa_video.text import TextEncoder


class Vocabulary(Protocol):
    """The words of a model that was trained on a small world.

    Attributes:
        about: the world in a few words.
        example: a prompt that the model understands.
    """

    about: str
    example: str

    def words(self) -> Mapping[str, Mapping[str, tuple[str, ...]]]:
        """Attribute → value → phrases; the first phrase is the name to prompt with or against."""
        ...

    def unknown_words(self, prompt: str, encoder: TextEncoder | None = None) -> list[str]:
        """The prompt's words that the model does not know, in order, each once."""
        ...

    def suggestions(self, word: str, encoder: TextEncoder | None = None) -> list[str]:
        """Known words to write instead, the best first."""
        ...

    def extend_prompt(self, prompt: str, seed: int, encoder: TextEncoder | None = None) -> str:
        """The prompt with what it leaves open written into it, drawn by the seed."""
        ...


VOCABULARIES: dict[str, str] = {"sprites": "nasa_video.sprites.vocabulary:SPRITES"}
"""Name in a preset → where the vocabulary is, "module:attribute"; imported when it is asked for."""


def find_vocabulary(name: str | None) -> Vocabulary | None:
    """The vocabulary that a preset names; None for a model that takes any text.

    Raises:
        InputError: there is no vocabulary of this name.
    """
    if name is None:
        return None
    if name not in VOCABULARIES:
        raise InputError(f"there is no vocabulary {name!r}; there are {', '.join(VOCABULARIES)}, or leave it out")
    module, attribute = VOCABULARIES[name].split(":")
    found: Vocabulary = getattr(import_module(module), attribute)
    return found


def describe_unknown_words(
    vocabulary: Vocabulary | None, texts: Sequence[str], encoder: TextEncoder | None = None
) -> str | None:
    """A sentence about the words of prompts and negatives that a model has never seen; None where it knows them all."""
    if vocabulary is None:
        return None
    unknown = dict.fromkeys(word for text in texts for word in vocabulary.unknown_words(text, encoder))
    if not unknown:
        return None
    named = []
    for word in unknown:
        nearest = vocabulary.suggestions(word, encoder)[:1]
        named.append(f"{word} (nearest: {nearest[0]})" if nearest else word)
    return (
        f"this model lives in {vocabulary.about} and has never seen {', '.join(named)}; "
        f'try "{vocabulary.example}", or a real model (nasa-video models)'
    )
