from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causvid_adapter import FlowMatchSchedule

SHIFTS = st.floats(0.5, 12)
LEVELS = st.floats(0, 1000)


def test_self_forcing_warps_its_steps() -> None:
    schedule = FlowMatchSchedule(5, [1000, 750, 500, 250], warp=True)
    assert schedule.timesteps == pytest.approx([1000, 937.5, 2500 / 3, 625])


def test_causvid_takes_the_sigma_of_the_nearest_table_entry() -> None:
    schedule = FlowMatchSchedule(8, [1000, 757, 522])
    table = [8 * u / (1 + 7 * u) for u in (1 - i / 1000 for i in range(1000))]
    for timestep in schedule.timesteps:
        nearest = min(table, key=lambda sigma: abs(1000 * sigma - timestep))
        assert float(schedule.sigma(timestep)) == pytest.approx(nearest, abs=1e-12)
    assert float(schedule.sigma(757)) != 0.757


def test_ends_of_the_schedule_are_noise_and_picture() -> None:
    schedule = FlowMatchSchedule(8, [1000])
    assert float(schedule.sigma(1000)) == 1
    assert float(schedule.sigma(0)) == 0


@given(shift=SHIFTS, low=LEVELS, high=LEVELS)
@settings(max_examples=30, deadline=None)
def test_sigma_rises_with_the_timestep_and_stays_near_it(shift: float, low: float, high: float) -> None:
    low, high = sorted((low, high))
    sigma_low, sigma_high = FlowMatchSchedule(shift, [1000]).sigma(torch.tensor([low, high])).tolist()
    assert 0 <= sigma_low <= sigma_high <= 1
    widest_gap = max(shift, 1 / shift)
    assert abs(sigma_high - high / 1000) <= widest_gap / 1000


@given(shift=SHIFTS, timestep=LEVELS)
@settings(max_examples=30, deadline=None)
def test_the_true_flow_leads_back_to_the_picture(shift: float, timestep: float) -> None:
    schedule = FlowMatchSchedule(shift, [1000])
    x0, noise = torch.randn(2, 2, 3, 4, dtype=torch.float64).unbind()
    x_t = schedule.add_noise(x0, noise, timestep)
    assert torch.allclose(schedule.to_x0(x_t, noise - x0, timestep), x0)


def test_a_timestep_a_frame_is_a_timestep_for_each_frame() -> None:
    schedule = FlowMatchSchedule(8, [1000])
    x0, noise = torch.randn(2, 2, 3, 4, 5, 6).unbind()
    timestep = torch.tensor([[0.0, 400.0, 1000.0], [757.0, 522.0, 13.0]])
    together = schedule.add_noise(x0, noise, timestep)
    for sample in range(2):
        for frame in range(3):
            alone = schedule.add_noise(x0[sample, frame], noise[sample, frame], float(timestep[sample, frame]))
            torch.testing.assert_close(together[sample, frame], alone)  # one is computed in float64
    assert torch.equal(together[0, 0], x0[0, 0])
    assert together.dtype == x0.dtype


@pytest.mark.parametrize("timesteps", [[], [500, 1000], [1000, 1000], [1000, 0], [1000.5], [-1], [1000, math.nan]])
def test_timesteps_that_do_not_fall_are_refused(timesteps: list[float]) -> None:
    with pytest.raises(ValueError, match="must fall strictly"):
        FlowMatchSchedule(8, timesteps)


@pytest.mark.parametrize("shift", [0, -1, math.nan, math.inf])
def test_a_shift_that_is_no_positive_number_is_refused(shift: float) -> None:
    with pytest.raises(ValueError, match="shift must be"):
        FlowMatchSchedule(shift, [1000])


@pytest.mark.parametrize("index", [0, 1])
def test_an_euler_step_keeps_its_noise(index: int) -> None:
    schedule = FlowMatchSchedule(1.0, [990, 800, 500, 250], euler_steps=2)
    x0, noise = torch.randn(2, 2, 3, 4, dtype=torch.float64).unbind()
    t, t_next = schedule.timesteps[index : index + 2]
    x_t = schedule.add_noise(x0, noise, t)
    # no new noise is made on the way, and the true flow leads to the same clip with less of its own
    following = schedule.step(x_t, noise - x0, index, lambda: pytest.fail("fresh noise in an Euler step"))
    torch.testing.assert_close(following, schedule.add_noise(x0, noise, t_next))


def test_other_steps_noise_the_picture_afresh_and_the_last_one_shows_it() -> None:
    schedule = FlowMatchSchedule(1.0, [990, 500, 250], euler_steps=1)
    x0, noise, fresh = torch.randn(3, 2, 3, 4, dtype=torch.float64).unbind()
    for index in (1, 2):
        x_t = schedule.add_noise(x0, noise, schedule.timesteps[index])
        following = schedule.step(x_t, noise - x0, index, lambda: fresh)
        torch.testing.assert_close(following, schedule.add_noise(x0, fresh, 250) if index == 1 else x0)


@pytest.mark.parametrize("euler_steps", [-1, 2, 3])
def test_some_step_must_lead_to_a_picture(euler_steps: int) -> None:
    with pytest.raises(ValueError, match="euler_steps must be from 0 to 1"):
        FlowMatchSchedule(8, [1000, 500], euler_steps=euler_steps)
