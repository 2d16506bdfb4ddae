import math

import pytest
import torch

from nasa_video.sprites.captions import left_open, shares_left_open
from nasa_video.sprites.world import ATTRIBUTES, FLAWS, Scenes, sample_scenes
from nasa_video.training.coupling import NoiseCoupling, race, winners
from nasa_video.training.dataset import LatentClips

NOTHING: frozenset[str] = frozenset()


def scenes_where(number: int = 6000, **values: str) -> Scenes:
    """Scenes as the world draws them, those alone that show these values."""
    scenes = sample_scenes(number, torch.Generator().manual_seed(0))
    keep = torch.ones(number, dtype=torch.bool)
    for name, value in values.items():
        keep &= getattr(scenes, name) == ATTRIBUTES[name].index(value)
    return scenes[keep]


def rows_of(scenes: Scenes) -> list[dict[str, int]]:
    return [scenes.row(i) for i in range(len(scenes))]


def columns_of(attribute: str) -> slice:
    before = sum(len(v) for v in list(ATTRIBUTES.values())[: list(ATTRIBUTES).index(attribute)])
    return slice(before, before + len(ATTRIBUTES[attribute]))


def told(scenes: Scenes, stated: frozenset[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    columns = {name: getattr(scenes, name) for name in ATTRIBUTES}
    return columns, {name: torch.full((len(scenes),), name in stated) for name in ATTRIBUTES}


@pytest.mark.parametrize(
    ("values", "stated"),
    [
        ({}, NOTHING),
        ({"colour": "yellow"}, {"colour"}),
        ({"size": "small"}, {"size"}),
        ({"count": "one"}, {"count"}),
        ({"shape": "star", "weather": "snow"}, {"shape", "weather"}),
    ],
)
def test_under_a_caption_the_noise_is_standard_normal_and_independent(values, stated):
    scenes = scenes_where(**values)
    # captions state 45 % of the flaws that are there; what is left is what a caption without flaws comes with
    mentioned = torch.rand(len(scenes), len(FLAWS), generator=torch.Generator().manual_seed(5)) < 0.45
    there = torch.stack([getattr(scenes, flaw) for flaw in FLAWS], 1).bool()
    scenes = scenes[~(there & mentioned).any(1)]
    components = race(rows_of(scenes), [frozenset(stated)] * len(scenes), torch.Generator().manual_seed(1))
    error = 1 / math.sqrt(len(scenes))
    assert components.mean(0).abs().max() < 4.5 * error
    assert (components.std(0) - 1).abs().max() < 4.5 * error
    assert (torch.corrcoef(components.T) - torch.eye(components.shape[1])).abs().max() < 5 * error


@pytest.mark.parametrize("bare", [0.0, 0.3])
def test_under_the_captions_of_training_it_is_nearly_so(bare):
    number = 8000
    scenes = sample_scenes(number, torch.Generator().manual_seed(6))
    nothing = torch.zeros(number, 1, 1, 1, 1)
    clips = LatentClips(nothing, nothing, scenes, scenes, torch.zeros(number, dtype=torch.long))
    draw = clips.draw(number, 0, hard=0.25, bare=bare)
    rows = [clips.rows[i] for i in draw.index]
    components = race(rows, draw.stated, torch.Generator().manual_seed(7))
    for attribute in ATTRIBUTES:
        opened = [attribute in left_open(row, words) for row, words in zip(rows, draw.stated, strict=True)]
        free = components[torch.tensor(opened), columns_of(attribute)]
        assert free.mean(0).abs().max() < 0.1 + 3 / math.sqrt(len(free))
        assert (free.std(0) - 1).abs().max() < 0.05 + 3 / math.sqrt(len(free))


def test_a_caption_that_states_all_there_is_leaves_nothing_open():
    row = rows_of(scenes_where(400, count="one", texture="striped", weather="none", dim="dim"))[0]
    flaws = {flaw for flaw in FLAWS if row[flaw]}
    stated = frozenset({"shape", "colour", "size", "count", "motion", "background", "texture"} | flaws)
    assert left_open(row, stated) == frozenset()
    assert left_open(row, stated - {"dim"}) == frozenset(ATTRIBUTES) - stated | {"dim"}


@pytest.mark.parametrize("attribute", list(ATTRIBUTES))
def test_the_value_of_the_clip_wins_where_the_caption_leaves_it_open(attribute):
    scenes = scenes_where(1000)
    values = getattr(scenes, attribute)

    def winner(stated: frozenset[str]) -> torch.Tensor:
        components = race(rows_of(scenes), [stated] * len(scenes), torch.Generator().manual_seed(2))
        return winners(components, shares_left_open(*told(scenes, stated)))[attribute]

    assert (winner(NOTHING) == values).float().mean() > 0.99
    by_chance = sum(float((values == v).float().mean()) ** 2 for v in range(len(ATTRIBUTES[attribute])))
    assert (winner(frozenset({attribute})) == values).float().mean() < by_chance + 0.15


@pytest.mark.parametrize(
    ("attribute", "values"),
    [
        ("shape", {"colour": "yellow"}),
        ("colour", {"shape": "heart"}),
        ("size", {"count": "one"}),
        ("count", {"size": "small"}),
        ("background", {"shape": "star"}),
        ("dim", {"blurry": "blurry"}),
    ],
)
def test_the_shares_left_open_are_the_worlds(attribute, values):
    scenes = scenes_where(40000, **values)
    shares = shares_left_open(*told(scenes, frozenset(values)))[attribute]
    counted = torch.bincount(getattr(scenes, attribute), minlength=shares.shape[1]) / len(scenes)
    if attribute in FLAWS:
        counted[1] *= 1 - 0.45
        counted /= counted.sum()
    torch.testing.assert_close(shares.mean(0), counted, atol=0.02, rtol=0)


def test_drawn_one_after_the_other_the_shares_give_the_joint_distribution():
    scenes = scenes_where(40000)
    shares = shares_left_open(*told(scenes, NOTHING))
    two = shares["count"][:, 1]
    assert two[scenes.size == 1].max() == 0
    assert float(two.mean()) == pytest.approx(float((scenes.count == 1).float().mean()), abs=0.01)


def some_clips() -> LatentClips:
    scenes = sample_scenes(600, torch.Generator().manual_seed(3))
    latents = torch.randn(600, 3, 4, 4, 4, generator=torch.Generator().manual_seed(4))
    latents[:, :, 0] += 3 * (scenes.dim == 1).float()[:, None, None, None]
    never = torch.zeros(600, dtype=torch.long)
    return LatentClips(latents, torch.ones(600, 3, 1, 4, 4), scenes, scenes, never)


def test_directions_are_orthonormal_and_point_at_what_is_shown():
    coupling = NoiseCoupling.of(some_clips())
    flat = coupling.directions.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat)), atol=1e-4, rtol=0)
    dim = coupling.directions[columns_of("dim")][1]
    assert dim[:, 0].mean() > 4 * dim[:, 1:].mean().abs()


def test_directions_are_there_for_values_that_no_clip_shows():
    clips = some_clips()
    for row in clips.rows:
        row["weather"] = 0
    flat = NoiseCoupling.of(clips).directions.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat)), atol=1e-4, rtol=0)


def test_coupling_changes_nothing_but_the_components_of_the_first_chunk():
    coupling = NoiseCoupling.of(some_clips())
    noise = torch.randn(5, 9, 4, 4, 4)
    components = torch.randn(5, len(coupling.directions))
    coupled = coupling.couple(noise, components)
    assert (coupled[:, 3:] == noise[:, 3:]).all()
    flat = coupling.directions.flatten(1)
    torch.testing.assert_close(coupled[:, :3].flatten(1) @ flat.T, components, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(coupling.components(coupled), components, atol=1e-4, rtol=1e-4)
    change = (coupled - noise)[:, :3].flatten(1)
    torch.testing.assert_close(change - change @ flat.T @ flat, torch.zeros_like(change), atol=1e-4, rtol=0)
