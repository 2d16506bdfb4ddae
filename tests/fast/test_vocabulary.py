"""Words that a small model has never seen: found, named once, and answered with what to write instead."""

import pytest

from nasa_video.errors import InputError
from nasa_video.models.presets import find_preset
from nasa_video.sprites.captions import TERMS
from nasa_video.text import WordLlamaEncoder
from nasa_video.text.vocabulary import describe_unknown_words, find_vocabulary


def test_a_preset_names_its_vocabulary():
    vocabulary = find_vocabulary(find_preset("sprites").vocabulary)
    assert vocabulary is not None
    assert vocabulary.words() is TERMS
    assert find_vocabulary(find_preset("causvid").vocabulary) is None
    with pytest.raises(InputError, match="no vocabulary 'birds'"):
        find_vocabulary("birds")


def test_a_misspelt_word_is_answered_with_the_one_that_is_meant():
    vocabulary = find_vocabulary("sprites")
    assert vocabulary.suggestions("traingle")[0] == "triangle"
    assert vocabulary.suggestions("zebra") == []
    assert vocabulary.suggestions("zebra", WordLlamaEncoder(8))  # by meaning


def test_the_note_names_each_word_once_and_says_what_to_do():
    vocabulary = find_vocabulary("sprites")
    note = describe_unknown_words(vocabulary, ["a zebra on a traingle", "zebra"])
    assert note.count("zebra") == 1
    assert "traingle (nearest: triangle)" in note
    assert "nasa-video models" in note
    assert describe_unknown_words(vocabulary, ["a red ball", "snow"]) is None
    assert describe_unknown_words(None, ["a zebra"]) is None


def test_the_vocabulary_extends_prompts():
    extended = find_vocabulary("sprites").extend_prompt("a star", 3)
    assert extended.startswith("a star, ")
    assert extended == find_vocabulary("sprites").extend_prompt("a star", 3)
