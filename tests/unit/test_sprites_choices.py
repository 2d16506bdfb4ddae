import math
import random

import pytest
import torch

from nasa_video.sprites.captions import caption_for_reading, full_caption, is_held_out, leaves_open
from nasa_video.sprites.world import ATTRIBUTES, FLAWS, Scenes, sample_scenes
from nasa_video.training.choices import CHOICES, NoiseChoices

SIZE = (12, 8, 8)
CHOICES_OF = NoiseChoices(SIZE)


def start_noise(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def settled(number: int, stated: dict[str, str], seed: int = 0) -> Scenes:
    """Scenes of captions that state these values; everything else is the noise's."""
    from nasa_video.sprites.captions import Caption

    scenes = sample_scenes(number, torch.Generator().manual_seed(seed + 1))
    scenes = scenes.replace(**{name: ATTRIBUTES[name].index(value) for name, value in stated.items()})
    return CHOICES_OF.settle(start_noise(number, seed), scenes, [Caption("", frozenset(stated))] * number)


def test_directions_are_orthonormal():
    flat = CHOICES_OF.directions.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat)), atol=1e-5, rtol=0)


def test_components_are_means_and_half_waves():
    noise = torch.zeros(1, 9, *SIZE)
    noise[:, 1, 4] = 1  # the middle frame's fifth channel: value 12 + 4
    components = CHOICES_OF.components(noise)
    assert float(components[0, 16]) == pytest.approx(math.sqrt(64), rel=1e-5)
    components[0, 16] = 0
    assert components.abs().max() < 1e-5


def test_a_model_with_too_few_channels_is_refused():
    with pytest.raises(ValueError, match="room for 24 components"):
        NoiseChoices((4, 8, 8))


@pytest.mark.parametrize(
    ("stated", "attribute"),
    [
        ({}, "shape"),
        ({"shape": "star"}, "colour"),
        ({"colour": "yellow"}, "shape"),
        ({"size": "small"}, "count"),
        ({"count": "one"}, "size"),
        ({"shape": "star"}, "background"),
        ({"shape": "star"}, "weather"),
        ({"shape": "star"}, "dim"),
    ],
)
def test_over_many_seeds_values_come_as_often_as_in_the_world(stated, attribute):
    number = 12000
    chosen = settled(number, stated)
    world = sample_scenes(number, torch.Generator().manual_seed(9))
    keep = torch.ones(number, dtype=torch.bool)
    for name, value in stated.items():
        keep &= getattr(world, name) == ATTRIBUTES[name].index(value)
        assert (getattr(chosen, name) == ATTRIBUTES[name].index(value)).all()
    values = len(ATTRIBUTES[attribute])
    shares = torch.bincount(getattr(chosen, attribute), minlength=values) / number
    expected = torch.bincount(getattr(world, attribute)[keep], minlength=values) / keep.sum()
    assert (shares - expected).abs().max() < 4 * math.sqrt(0.25 / int(keep.sum())) + 0.005


def test_scenes_are_possible_ones():
    chosen = settled(4000, {})
    assert not ((chosen.count == 1) & (chosen.size == 1)).any()
    assert (chosen.shape != chosen.shape2).all()
    assert (chosen.colour != chosen.colour2).all()
    assert settled(200, {"size": "big"}).count.max() == 0


def test_the_first_chunks_noise_alone_decides():
    noise, scenes = start_noise(64), sample_scenes(64, torch.Generator().manual_seed(1))
    captions = [caption_for_reading(scenes.row(i), random.Random(i)) for i in range(64)]
    one = CHOICES_OF.settle(noise, scenes, captions)
    longer = torch.cat((noise, torch.randn(64, 6, *SIZE)), 1)
    other = CHOICES_OF.settle(longer, scenes, captions)
    assert all((getattr(one, name) == getattr(other, name)).all() for name in CHOICES)
    assert any(
        (getattr(one, n) != getattr(CHOICES_OF.settle(start_noise(64, 5), scenes, captions), n)).any() for n in CHOICES
    )


def test_a_caption_that_states_all_there_always_is_leaves_nothing_open():
    scenes = sample_scenes(300, torch.Generator().manual_seed(2))
    captions = [full_caption(scenes.row(i), random.Random(i)) for i in range(300)]
    assert not any(leaves_open(caption.stated) for caption in captions)
    chosen = CHOICES_OF.settle(start_noise(300), scenes, captions)
    assert all((getattr(chosen, name) == getattr(scenes, name)).all() for name in CHOICES)
    # what such a caption does not mention is not there, whatever the scene that it was drawn from had
    short = [type(c)(c.text, c.stated - {"weather", *FLAWS}) for c in captions]
    chosen = CHOICES_OF.settle(start_noise(300), scenes, short)
    assert chosen.weather.max() == 0
    assert chosen.dim.max() == 0


def test_the_second_object_is_open_unless_both_are_named():
    assert {"shape2", "colour2", "colour"} <= leaves_open(frozenset({"shape"}))
    both = leaves_open(frozenset({"shape", "count", "weather"}))
    assert "shape2" not in both
    assert "colour2" in both
    assert "weather" not in both


def test_captions_for_reading_leave_things_open_and_are_not_held_out():
    scenes = sample_scenes(400, torch.Generator().manual_seed(3))
    rng = random.Random(0)
    captions = [caption_for_reading(scenes.row(i), rng) for i in range(400)]
    assert not any(is_held_out(caption.text) for caption in captions)
    bare = sum(caption.stated == {"shape"} for caption in captions)
    assert 90 < bare < 160
    assert 8 < sum(not caption.text for caption in captions) < 40
    assert 0.1 < sum(not leaves_open(caption.stated) for caption in captions) / 400 < 0.45
