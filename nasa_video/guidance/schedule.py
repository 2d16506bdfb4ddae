"""Where in the loop and in the model guidance acts, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nasa_video.errors import InputError


@dataclass(frozen=True)
class ScaleSchedule:
    """Where guidance acts, and with what share of the method's scale.

    Attributes:
        first_step, last_step: shares of the few steps, 0 to 1; outside them guidance is off.
        first_layer, last_layer: shares of the layers, likewise.
        clean_pass: guide the pass at t = 0 that writes the chunk's keys for later chunks, with the last step's share.
        step_scales: shares of the scale, 0 to 1, at evenly spaced steps from the first to the last, linear between
            them; nothing is 1 at every step. (1, 0) falls to nothing, (0, 1, 0) is strongest in the middle. A compiled
            model is compiled once for every different share.
        layer_scales: the same over the layers; the shares of step and layer are multiplied.
    """

    first_step: float = 0.0
    last_step: float = 1.0
    first_layer: float = 0.0
    last_layer: float = 1.0
    clean_pass: bool = True
    step_scales: tuple[float, ...] = ()
    layer_scales: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for low, high in ((self.first_step, self.last_step), (self.first_layer, self.last_layer)):
            if not 0.0 <= low <= high <= 1.0:
                raise InputError(f"a schedule must satisfy 0 <= first <= last <= 1, got {low} to {high}")
        for share in (*self.step_scales, *self.layer_scales):
            if not 0.0 <= share <= 1.0:
                raise InputError(f"a schedule's shares of the scale must be from 0 to 1, got {share}; raise the scale")

    @property
    def over_steps(self) -> bool:
        """Whether it has to know the step."""
        return (self.first_step, self.last_step) != (0.0, 1.0) or bool(self.step_scales)

    @property
    def over_layers(self) -> bool:
        """Whether it tells layers apart."""
        return (self.first_layer, self.last_layer) != (0.0, 1.0) or bool(self.layer_scales)

    def factor(self, step: int, num_steps: int, clean: bool, layer: int, num_layers: int) -> float:
        """The share of the scale, 0 where guidance is off. Step i of n covers the share from i / n to (i + 1) / n."""
        if clean:
            if not self.clean_pass:
                return 0.0
        elif not _inside(step, num_steps, self.first_step, self.last_step):
            return 0.0
        if not _inside(layer, num_layers, self.first_layer, self.last_layer):
            return 0.0
        last_step = num_steps - 1
        return _between(self.step_scales, last_step if clean else step, last_step) * _between(
            self.layer_scales, layer, num_layers - 1
        )


def _inside(index: int, total: int, first: float, last: float) -> bool:
    middle = (index + 0.5) / total
    return first <= middle <= last


def _between(shares: Sequence[float], index: int, last: int) -> float:
    """Value at ``index`` of 0 to ``last`` on the line through evenly spaced ``shares``; 1 without any."""
    if not shares:
        return 1.0
    place = index / last * (len(shares) - 1) if last > 0 else 0.0
    left = min(int(place), len(shares) - 1)
    right = min(left + 1, len(shares) - 1)
    return shares[left] + (place - left) * (shares[right] - shares[left])


EVERYWHERE = ScaleSchedule()
