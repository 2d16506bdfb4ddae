"""Whether a preset's files are here, and whether this machine can run it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import torch

from nasa_video.errors import format_bytes
from nasa_video.models.memory_estimate import (
    COMMON_CARDS,
    Estimate,
    Run,
    budget_of,
    estimate,
    fitting_placement,
    fitting_sizes,
)
from nasa_video.models.memory_plan import Plan, PlanRequest, make_plan
from nasa_video.models.part_sizes import text_encoder_bytes
from nasa_video.models.placement import Placement
from nasa_video.models.presets import VideoPreset


@dataclass(frozen=True)
class Card:
    """What a run takes on a GPU of that many gigabytes; ``memory`` is None where it does not fit in any way."""

    gigabytes: int
    placement: Placement | None
    memory: Estimate | None

    def line(self) -> str:
        """For people."""
        if self.memory is None or self.placement is None:
            return f"--memory {self.gigabytes}: does not fit"
        host = f" and {format_bytes(self.memory.host)} on the host" if self.memory.host else ""
        return f"--memory {self.gigabytes}: {format_bytes(self.memory.peak)}{host}; {self.placement.description}"


@dataclass(frozen=True)
class Readiness:
    """The answer.

    Attributes:
        missing: parts that are not on the machine; ``remedies`` says how to bring them.
        extras: parts that are not on the machine and that only ``--decoder tiny`` needs.
        device: where it would run.
        plan: what it takes there; None where the model's sizes are not known before it is downloaded.
        fits: width and height that fit when the wanted ones do not.
        cards: what it takes on common GPUs, in bfloat16.
    """

    preset: VideoPreset
    missing: tuple[str, ...]
    extras: tuple[str, ...]
    remedies: tuple[str, ...]
    device: str
    dtype: str
    width: int
    height: int
    frames: int
    plan: Plan | None
    fits: tuple[int, int] | None
    cards: tuple[Card, ...]

    @property
    def enough(self) -> bool | None:
        """Whether the run fits; None where that is not known."""
        return None if self.plan is None else self.plan.enough

    def lines(self) -> list[str]:
        """For people."""
        rows = [f"{self.preset.name}: {self.preset.title}", f"licence: {self.preset.licence}"]
        rows += [f"missing: {part}" for part in self.missing] or ["all files are here"]
        rows += [f"missing, for --decoder tiny only: {part}" for part in self.extras]
        rows += [f"{remedy}" for remedy in self.remedies]
        what = f"{self.width} x {self.height}, {self.frames} frames, {self.dtype} on {self.device}"
        if self.plan is None:
            return [*rows, f"{what}: memory is not known before the weights are here"]
        rows += [what, self.plan.line()]
        if self.enough is not None:
            rows.append("enough" if self.enough else "NOT enough")
        if self.enough is False:
            way = f"--width {self.fits[0]} --height {self.fits[1]}" if self.fits else "no size of this model"
            rows.append(f"what fits: {way}")
        return [*rows, *(f"on a GPU of {card.gigabytes} GB, {card.line()}" for card in self.cards)]

    def to_json(self) -> dict[str, Any]:
        """For machines; sizes in bytes."""
        plan = self.plan
        return {
            "name": self.preset.name,
            "missing": list(self.missing),
            "missing_extras": list(self.extras),
            "device": self.device,
            "memory": None if plan is None else dataclasses.asdict(plan.needs) | {"peak": plan.needs.peak},
            "placement": None if plan is None else dataclasses.asdict(plan.placement),
            "free": None if plan is None else plan.free,
            "enough": self.enough,
            "fits": self.fits,
            "cards": {
                card.gigabytes: None
                if card.memory is None or card.placement is None
                else {"peak": card.memory.peak, "host": card.memory.host, **dataclasses.asdict(card.placement)}
                for card in self.cards
            },
        }


def readiness(
    preset: VideoPreset,
    width: int | None,
    height: int | None,
    frames: int | None,
    device: str | None,
    memory: str | None = None,
) -> Readiness:
    """Look at the files and at the device; nothing is loaded or downloaded."""
    from nasa_video.models.loading import choose_device, default_dtype

    place = choose_device(device)
    dtype = default_dtype(place)
    video = preset.video
    width, height, frames = width or video.width, height or video.height, frames or video.frames
    absent = [source for source in preset.components.sources if source.find() is None]
    remedies = []
    if any(source.repo for source in (*absent, *preset.components.extras) if source.find() is None):
        remedies.append(f"bring them with: nasa-video models pull {preset.name}")
    if any(source.package for source in absent):
        remedies.append("train them with: python research/train_sprites.py")
    plan = make_plan(preset, place, dtype, PlanRequest(width, height, frames, memory=memory))
    fits = None
    if plan is not None and plan.free is not None and not plan.enough:
        fits = fitting_sizes(plan.run, plan.free, loaded=False).size
    name = str(dtype).removeprefix("torch.")
    missing = tuple(source.description for source in absent)
    extras = tuple(source.description for source in preset.components.extras if source.find() is None)
    shown: tuple[Card, ...] = ()
    if plan is not None:
        # On a GPU the text encoder takes its place too, which on the CPU is pages of its file.
        text = text_encoder_bytes(preset.components, torch.device("cuda"), torch.bfloat16, None)
        shown = cards_of(replace(plan.run, text_encoder=text))
    return Readiness(
        preset, missing, extras, tuple(remedies), str(place), name, width, height, frames, plan, fits, shown
    )


def cards_of(run: Run) -> tuple[Card, ...]:
    """What a run takes on common GPUs in bfloat16 (``run.text_encoder`` too); nothing of a model that runs anywhere."""
    on_gpu = replace(run, dtype=torch.bfloat16, shared=False)
    if estimate(on_gpu).peak < budget_of(min(COMMON_CARDS)) / 4:
        return ()
    rows = []
    for card in COMMON_CARDS:
        placement = fitting_placement(on_gpu, budget_of(card))
        needs = None if placement is None else estimate(replace(on_gpu, placement=placement))
        rows.append(Card(card, placement, needs))
    return tuple(rows)
