import random

import torch

from nasa_video.sprites.captions import TERMS, full_caption, is_held_out, leaves_open, random_caption, term
from nasa_video.sprites.world import ATTRIBUTES, FLAWS, sample_scenes
from research.sprites.captions import caption_as_users_write, held_out_caption


def rows(n: int = 300, seed: int = 0):
    scenes = sample_scenes(n, torch.Generator().manual_seed(seed))
    return [scenes.row(i) for i in range(n)]


def test_every_value_has_a_term():
    for attribute, values in ATTRIBUTES.items():
        for value in values:
            if value != "no":
                assert term(attribute, value) in TERMS[attribute][value]


def test_training_never_sees_a_held_out_caption():
    rng = random.Random(0)
    assert not any(is_held_out(random_caption(row, rng).text) for row in rows() for _ in range(3))


def test_held_out_captions_exist_and_are_full():
    rng = random.Random(0)
    for row in rows(10):
        caption = held_out_caption(row, rng)
        assert caption is not None
        assert is_held_out(caption.text)
        assert {"shape", "colour", "motion", "background"} <= caption.stated


def test_captions_tell_the_truth():
    rng = random.Random(1)
    for row in rows():
        caption = random_caption(row, rng)
        for attribute in caption.stated - {"count"}:
            value = ATTRIBUTES[attribute][row[attribute]]
            words = TERMS[attribute][value]
            stated = any(w.removesuffix(" background") in caption.text for w in words)
            assert stated or attribute in {"shape", "colour"}, (caption, attribute, value)


def test_flaws_that_are_not_there_are_not_named():
    rng = random.Random(2)
    for row in rows():
        text = random_caption(row, rng).text
        for flaw in FLAWS:
            if not row[flaw]:
                assert flaw not in text


def test_a_caption_names_only_a_part():
    rng = random.Random(3)
    row = rows(1)[0]
    lengths = {len(random_caption(row, rng).stated) for _ in range(200)}
    assert min(lengths) == 1
    assert max(lengths) >= len(full_caption(row, rng).stated)


def test_a_caption_that_states_all_there_always_is_leaves_nothing_open():
    captions = [full_caption(row, random.Random(i)) for i, row in enumerate(rows())]
    assert not any(leaves_open(caption.stated) for caption in captions)


def test_the_second_object_is_open_unless_both_are_named():
    assert {"shape2", "colour2", "colour"} <= leaves_open(frozenset({"shape"}))
    both = leaves_open(frozenset({"shape", "count", "weather"}))
    assert "shape2" not in both
    assert "colour2" in both
    assert "weather" not in both


def test_captions_as_users_write_them_leave_things_open_and_are_not_held_out():
    rng = random.Random(0)
    captions = [caption_as_users_write(row, rng) for row in rows(400, seed=3)]
    assert not any(is_held_out(caption.text) for caption in captions)
    bare = sum(caption.stated == {"shape"} for caption in captions)
    assert 90 < bare < 160
    assert 8 < sum(not caption.text for caption in captions) < 40
    assert 0.1 < sum(not leaves_open(caption.stated) for caption in captions) / 400 < 0.45
