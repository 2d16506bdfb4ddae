"""What a noisy first chunk looks most like: a value of everything that a caption leaves open.

At the noise level where first chunks have taken their first step, a detector trained for it still sees nearly all there
is to see: backgrounds, flaws and counts nine times in ten, of shapes and motions half. Between the values that are
possible its highest score decides, so that the answer follows from the noise alone. A value that students show too
seldom is given points, until it is seen as often as the world has it.

Shape legend: B batch, V values, T latent frames, C channels, h w latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as nn_f
from torch import Tensor

from nasa_video.sprites.captions import leaves_open
from nasa_video.sprites.world import ATTRIBUTES, FLAWS, Scenes, decide
from research.sprites.latent_detector import LatentDetector

VALUES: Mapping[str, int] = {
    **{name: len(values) for name, values in ATTRIBUTES.items()},
    **{f"{name}2": len(ATTRIBUTES[name]) for name in ("shape", "colour")},
}
"""Number of values by attribute, those of the second object among them."""


def left_open(stated: Sequence[frozenset[str]]) -> dict[str, Tensor]:
    """By attribute: whether each of B captions leaves it open, (B,), from what they state."""
    names = [leaves_open(each) for each in stated]
    return {name: torch.tensor([name in each for each in names]) for name in VALUES}


class Reader:
    """A latent detector and the points that each value is given.

    Args:
        detector: reads first chunks with as much noise as they have behind their first step, and without any.
        rate: points a value is given for a batch in which all its share is missing.
    """

    def __init__(self, detector: LatentDetector, rate: float) -> None:
        self.detector, self.rate = detector.eval().requires_grad_(False), rate
        self.points = {name: torch.zeros(values) for name, values in VALUES.items()}

    @torch.no_grad()
    def scores(self, latents: Tensor) -> dict[str, Tensor]:
        """Log probabilities (B, V) by attribute, on the CPU, of latents (B, T, C, h, w)."""
        logits = {name: value.float().cpu() for name, value in self.detector(latents).items()}
        scores = {}
        for name in VALUES.keys() - set(FLAWS):
            of = logits[name.removesuffix("2")]
            # of shapes and colours two may be there; some others have an answer for "no sprite"
            several = name.removesuffix("2") in ("shape", "colour")
            scores[name] = nn_f.logsigmoid(of) if several else of[:, : VALUES[name]].log_softmax(1)
        for index, name in enumerate(FLAWS):
            one = logits["flaws"][:, index]
            scores[name] = torch.stack((nn_f.logsigmoid(-one), nn_f.logsigmoid(one)), 1)
        return scores

    def read(self, scores: Mapping[str, Tensor], scenes: Scenes, is_open: Mapping[str, Tensor]) -> Scenes:
        """B scenes with what is open read, by scores and points, from the values that go with what is not."""
        return decide(scenes, is_open, lambda name, shares: _highest(scores[name] + self.points[name], shares))

    def look(
        self, scores: Mapping[str, Tensor], led: Scenes, lead: float, scenes: Scenes, is_open: Mapping[str, Tensor]
    ) -> Scenes:
        """B scenes with what is open seen in a student's picture, which `led` tells where it is not sure.

        An unsure picture is soft, and looks blurry: whether it is to be blurry is what `led` says.

        Args:
            scores: of the picture.
            led: what had been read for it.
            lead: log probability added to the values of `led`.
            scenes: what is not open.
            is_open: as `left_open` has it.
        """
        ahead = {name: lead * nn_f.one_hot(getattr(led, name), values) for name, values in VALUES.items()}
        seen = {**scores, "blurry": torch.zeros_like(scores["blurry"])}
        return decide(scenes, is_open, lambda name, shares: _highest(seen[name] + ahead[name], shares))

    def count(self, scores: Mapping[str, Tensor], scenes: Scenes, is_open: Mapping[str, Tensor]) -> None:
        """Moves the points towards what would make finished pictures with these scores show each value at its share."""
        decide(scenes, is_open, lambda name, shares: self._count(name, scores[name], shares, is_open[name]))

    def state_dict(self) -> dict[str, Tensor]:
        """The points."""
        return dict(self.points)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` gave."""
        self.points = {name: state[name].clone() for name in VALUES}

    def _count(self, name: str, scores: Tensor, shares: Tensor, is_open: Tensor) -> Tensor:
        seen = _highest(scores, shares)
        if is_open.any():
            missing = shares[is_open].mean(0) - nn_f.one_hot(seen[is_open], shares.shape[1]).float().mean(0)
            self.points[name] += self.rate * float(is_open.float().mean()) ** 0.5 * missing
        return seen


def _highest(scores: Tensor, shares: Tensor) -> Tensor:
    """The possible value (B,) with the highest score (B, V)."""
    return scores.masked_fill(shares <= 0, -torch.inf).argmax(1)
