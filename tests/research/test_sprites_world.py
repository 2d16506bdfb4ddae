import pytest
import torch

from nasa_video.sprites.world import ATTRIBUTES, FLAWS, MOTIONS, sample_scenes
from research.sprites.renderer import CELL, render, render_switched, render_with_mask
from research.sprites.scenes import CLIP_FRAMES, FRAME_SIZE, concatenate, first_frame_of, sample_switches


def scenes(n: int = 16, seed: int = 0):
    return sample_scenes(n, torch.Generator().manual_seed(seed))


def plain(n: int = 6, seed: int = 0):
    """Clean scenes of one sprite that stays inside the picture."""
    clean = dict.fromkeys(FLAWS, 0)
    return scenes(n, seed).replace(count=0, weather=0, background=0, texture=0, **clean)


def test_a_seed_gives_one_world():
    first, second = scenes(seed=3), scenes(seed=3)
    assert torch.equal(render(first, 5), render(second, 5))
    assert not torch.equal(first.jitter, scenes(seed=4).jitter)


def test_pictures_have_the_stated_shape_and_range():
    frames, mask = render_with_mask(scenes(4))
    assert frames.shape == (4, CLIP_FRAMES, 3, FRAME_SIZE, FRAME_SIZE)
    assert mask.shape == (4, CLIP_FRAMES, 1, FRAME_SIZE, FRAME_SIZE)
    assert frames.abs().max() <= 1
    assert (mask - 0.5).abs().max() <= 0.5


def test_every_value_of_every_attribute_is_drawn():
    many = scenes(4000)
    for name, values in ATTRIBUTES.items():
        assert set(getattr(many, name).tolist()) == set(range(len(values))), name


def test_two_objects_are_small_and_differ():
    many = scenes(2000)
    two = many.count == 1
    assert (many.size[two] == 0).all()
    assert (many.shape[two] != many.shape2[two]).all()
    assert (many.colour[two] != many.colour2[two]).all()


def test_a_clip_does_not_depend_on_its_batch_or_on_where_it_is_cut():
    batch = scenes(6, seed=5)
    whole = render(batch, 12)
    torch.testing.assert_close(render(batch[slice(2, 3)], 12), whole[2:3])
    torch.testing.assert_close(render(batch, 8, first_frame=4), whole[:, 4:], atol=1e-4, rtol=0)
    torch.testing.assert_close(render(concatenate([batch[slice(0, 2)], batch[slice(2, 6)]]), 12), whole)


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_changes_the_picture(flaw):
    clean = plain()
    assert (render(clean, 5) - render(clean.replace(**{flaw: 1}), 5)).abs().mean() > 0.01


def centres(motion: str) -> torch.Tensor:
    """The sprites' centres (B, F, 2) as (x, y), averaged over their coverage."""
    batch = plain(8).replace(motion=MOTIONS.index(motion))
    batch.jitter[:, 2] = 0.1  # straight motions cross the middle
    mask = render_with_mask(batch)[1][:, :, 0]
    axis = torch.arange(FRAME_SIZE).float()
    weight = mask.sum((-1, -2)) + 1e-6
    return torch.stack(((mask * axis).sum((-1, -2)) / weight, (mask * axis[:, None]).sum((-1, -2)) / weight), -1)


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
def test_straight_motions_go_where_they_say(motion, axis, sign):
    path = centres(motion)[:, 4:24]
    step = path.diff(dim=1).mean((0, 1))
    assert sign * step[axis] > 0.8
    assert step[1 - axis].abs() < 0.1


def test_what_is_still_stays():
    assert centres("still").diff(dim=1).abs().max() < 0.1


def test_every_fourth_frame_of_a_straight_motion_is_a_cell_further():
    frames = render(plain(2).replace(motion=MOTIONS.index("right")), 13)
    shifted = frames[:, 4:9:4, :, :, :-CELL]
    torch.testing.assert_close(frames[:, 8:13:4, :, :, CELL:], shifted, atol=1e-4, rtol=0)


def test_switches_change_one_to_three_attributes_between_two_chunks():
    before = scenes(400, seed=8)
    later, chunk = sample_switches(before, 0.5, torch.Generator().manual_seed(9))
    assert 0.4 < (chunk > 0).float().mean() < 0.6
    assert set(chunk.tolist()) == {0, 1, 2}
    assert torch.equal(later.jitter, before.jitter)
    for i in range(400):
        changed = [a for a in ATTRIBUTES if getattr(later, a)[i] != getattr(before, a)[i]]
        assert len(changed) <= (4 if chunk[i] else 0)  # two objects are small whatever else is drawn
    assert (later.shape[later.count == 1] != later.shape2[later.count == 1]).all()


def test_a_switched_clip_is_the_first_scene_and_then_the_later_one():
    before = scenes(4, seed=10)
    later, _ = sample_switches(before, 1.0, torch.Generator().manual_seed(1))
    cut = first_frame_of(torch.tensor([0, 1, 2, 1]))
    assert cut.tolist() == [0, 9, 21, 9]
    frames, _ = render_switched(before, later, cut)
    first, second = render(before), render(later)
    torch.testing.assert_close(frames[0], first[0])
    for i in (1, 2, 3):
        torch.testing.assert_close(frames[i, : cut[i]], first[i, : cut[i]])
        torch.testing.assert_close(frames[i, cut[i] :], second[i, cut[i] :], atol=1e-4, rtol=0)


def test_without_a_sprite_only_the_background_is_drawn():
    empty = plain().replace(count=-1)
    frames, mask = render_with_mask(empty, 3)
    assert mask.max() == 0
    assert frames.std((-1, -2)).max() < 1e-3
