"""Prompt extension: what a prompt says stays, what it leaves open is drawn as the world has it."""

import random
from collections import Counter

import pytest
import torch

from nasa_video.sprites.captions import caption_stating, full_caption, things_to_state, value_names
from nasa_video.sprites.prompt_extension import extend_prompt, stated_in
from nasa_video.sprites.world import ATTRIBUTES, FLAWS, sample_scenes
from nasa_video.text import WordLlamaEncoder
from research.sprites.assessment import data_spread

GOES_WITHOUT_SAYING = {("texture", "plain"), ("weather", "none"), ("count", "one")}


@pytest.fixture(scope="module")
def encoder():
    return WordLlamaEncoder(24)


def test_what_captions_state_is_found_in_them():
    rng, scenes = random.Random(3), sample_scenes(300, torch.Generator().manual_seed(3))
    for index in range(len(scenes)):
        row = scenes.row(index)
        stated = frozenset(name for name in things_to_state(row) if rng.random() < 0.6)
        text = caption_stating(row, stated, rng).text
        names, found = value_names(row), stated_in(text)
        wanted = {name: names[name] for name in stated if (name, names[name]) not in GOES_WITHOUT_SAYING}
        if "count" in wanted:
            wanted |= {name + "2": names[name + "2"] for name in ("shape", "colour") if name in stated}
        plain = {item for item in found.items() if item in GOES_WITHOUT_SAYING}
        assert dict(found.items() - plain) == wanted, text


@pytest.mark.parametrize(
    ("prompt", "stated"),
    [
        ("a crimson sphere jumps", {"colour": "red", "shape": "circle", "motion": "bouncing"}),
        ("Stars on a striped background", {"shape": "star", "background": "striped"}),
        ("a striped square", {"texture": "striped", "shape": "square"}),
        ("a pair of rings", {"count": "two", "shape": "ring"}),
        ("a dog on a beach", {}),
        ("", {}),
    ],
)
def test_other_words_and_forms_are_understood(encoder, prompt, stated):
    assert stated_in(prompt, encoder) == stated


def test_the_prompt_stays_and_the_seed_decides_the_rest():
    prompt = "a red ball, falling."
    extended = [extend_prompt(prompt, seed) for seed in range(20)]
    assert extended == [extend_prompt(prompt, seed) for seed in range(20)]
    assert len(set(extended)) > 15
    for text in extended:
        assert text.startswith("a red ball, falling, ")
        assert stated_in(text) | {"shape": "circle", "colour": "red", "motion": "down"} == stated_in(text)


def test_a_prompt_that_leaves_nothing_open_comes_back_as_it_is():
    scenes = sample_scenes(60, torch.Generator().manual_seed(5))
    for index in range(len(scenes)):
        text = full_caption(scenes.row(index), random.Random(index)).text
        assert extend_prompt(text, 1) == text


def test_prompts_share_what_both_leave_open():
    for seed in range(20):
        star, heart = (stated_in(extend_prompt(f"a red {shape}", seed)) for shape in ("star", "heart"))
        assert {**star, "shape": ""}.items() - {**heart, "shape": ""}.items() <= {("shape2", star.get("shape2"))}


@pytest.mark.parametrize("prompt", ["a star", ""])
def test_what_is_open_comes_as_often_as_in_the_world(prompt):
    n = 1500
    found = [stated_in(extend_prompt(prompt, seed)) for seed in range(n)]
    given = {"shape": "star"} if prompt else {}
    for attribute in ATTRIBUTES.keys() - given.keys():
        default = {"texture": "plain", "weather": "none", "count": "one"}.get(attribute, f"no {attribute}")
        shares = Counter(values.get(attribute, default) for values in found)
        data = data_spread(attribute, given)
        for value, share in data.items():
            name = value if value in shares or attribute not in FLAWS else default
            assert shares[name] / n == pytest.approx(share, abs=0.045), (attribute, value)


def test_an_empty_prompt_becomes_a_whole_sentence():
    assert stated_in(extend_prompt("  ", 4)).keys() >= {"shape", "colour", "size", "motion", "background"}
