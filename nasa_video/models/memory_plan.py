"""The memory plan of a run, made before anything of it is downloaded or loaded."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nasa_video.errors import InputError, format_bytes
from nasa_video.models.free_memory import available
from nasa_video.models.memory_estimate import (
    Estimate,
    Run,
    budget_of,
    estimate,
    fitting_placement,
    fitting_sizes,
    frames_of_rollout,
    require,
)
from nasa_video.models.part_sizes import check_size, text_encoder_bytes, transformer_config, vae_config
from nasa_video.models.placement import RESIDENT, Placement, WeightKind, no_torchao
from nasa_video.models.presets import VideoPreset

# A plan of less than this is not worth a line.
_SMALL = 500_000_000
MEMORY_CHOICES = "full, auto, or the gigabytes of a card such as 24, 16 or 12"


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is asked for; None takes the preset's own.

    Attributes:
        frames: length in pictures.
        memory: see MEMORY_CHOICES; None is "full".
        weights, offload: replace what ``memory`` chooses.
        prompts: what will be encoded; those whose embeddings are on disk need no text encoder.
        rollout: pictures of a rollout; 0 makes one of all.
        branches: histories, 2 for classifier-free guidance.
        videos: made at once, each with a decoder of its own.
        processes: that share each pass and its history.
    """

    width: int | None = None
    height: int | None = None
    frames: int | None = None
    endless: bool = False
    memory: str | None = None
    weights: WeightKind | None = None
    offload: bool | None = None
    tiny_decoder: bool = False
    overlapped: bool = False
    prompts: Sequence[str] | None = None
    rollout: int | None = None
    branches: int = 1
    videos: int = 1
    processes: int = 1


@dataclass(frozen=True)
class Plan:
    """What a run takes, and how its parts are placed.

    Attributes:
        free: free bytes of the device, None where unknown; ``host_free`` the same of the host's memory.
    """

    run: Run
    needs: Estimate
    device: torch.device
    free: int | None
    host_free: int | None

    @property
    def placement(self) -> Placement:
        """How the parts are stored and where they live."""
        return self.run.placement

    @property
    def enough(self) -> bool | None:
        """Whether the run fits; None where that is not known."""
        if self.free is None:
            return None
        return self.needs.peak <= self.free and (self.host_free is None or self.needs.host <= self.host_free)

    def worth_a_line(self, memory: str | None) -> bool:
        """Whether people want to read it: it was asked about, or it is no small matter."""
        return memory is not None or self.needs.peak >= _SMALL

    def line(self) -> str:
        """The plan in one line, for people."""
        needs = self.needs
        parts = {
            "weights": needs.weights + needs.workspace,
            "keys and values": needs.history + needs.text_keys,
            "decoding": needs.features + needs.decoder,
            "a pass": needs.denoiser,
            "text encoder": needs.text_encoder,
        }
        listed = ", ".join(f"{what} {format_bytes(size)}" for what, size in parts.items() if size)
        beside = f"; {format_bytes(needs.host)} in the host's memory" if needs.host else ""
        free = "" if self.free is None else f" of {format_bytes(self.free)} free"
        return (
            f"memory on {self.device}: {format_bytes(needs.peak)} at most{free} ({listed}){beside}; "
            f"{self.placement.description}"
        )

    def require(self) -> None:
        """Refuse a run that does not fit.

        Raises:
            InputError: it does not; the message names the ``--memory`` or the size that does. Or it wants weights in 8
                bits, and torchao is not installed.
        """
        if self.placement.weights != "plain" and importlib.util.find_spec("torchao") is None:
            raise no_torchao(self.placement.weights)
        require(self.run, self.free, str(self.device), loaded=False, host=self.host_free)


def make_plan(
    preset: VideoPreset,
    device: torch.device,
    dtype: torch.dtype,
    request: PlanRequest,
    placement: Placement | None = None,
) -> Plan | None:
    """The plan of a run, or None where the model's sizes are not known before it is downloaded.

    ``placement`` is one chosen before, such as that of a run to repeat; None chooses by ``request.memory``.

    Raises:
        InputError: the size is none of the model's, or ``memory`` is no choice, or nothing fits the wanted budget.
    """
    transformer = transformer_config(preset)
    if transformer is None:
        return None
    run = _run(preset, transformer, device, dtype, request)
    free, host = available(device), None if run.shared else available(torch.device("cpu"))
    run = replace(run, placement=_placement(run, free, host, request, placement))
    return Plan(run, estimate(run), device, free, host)


def check_plan(plan: Plan, memory: str | None, say: Callable[[str], None]) -> Placement:
    """Say a plan where it is worth a line, and refuse it where it does not fit; the placement otherwise.

    Raises:
        InputError: as :meth:`Plan.require`.
    """
    if plan.worth_a_line(memory):
        say(plan.line())
    plan.require()
    return plan.placement


def _run(
    preset: VideoPreset, transformer: dict[str, Any], device: torch.device, dtype: torch.dtype, request: PlanRequest
) -> Run:
    vae, video = vae_config(preset, int(transformer["in_channels"])), preset.video
    width = video.width if request.width is None else request.width
    height = video.height if request.height is None else request.height
    frames = video.frames if request.frames is None else request.frames
    stride = int(vae["scale_factor_temporal"])
    rollout = preset.sampler.rollout_frames
    if request.rollout is not None:
        rollout = (request.rollout - 1) // stride + 1 if request.rollout > 0 else None
    latent_frames = frames_of_rollout(None if request.endless else (frames - 1) // stride + 1, rollout)
    sampler = preset.sampler
    if request.endless:
        sampler = sampler.without_end(rollout, (video.frames - 1) // stride + 1)
    prompts = 2 if request.prompts is None else len(request.prompts)
    run = Run(
        transformer, vae, sampler, width, height, latent_frames, dtype,
        caches=request.branches,
        decoders=request.videos,
        processes=request.processes,
        text_tokens=max(1, prompts) * (preset.components.text_encoder.max_tokens + 1),
        tiny_decoder=request.tiny_decoder,
        text_encoder=text_encoder_bytes(preset.components, device, dtype, request.prompts),
        overlapped=request.overlapped,
        shared=device.type == "cpu",
    )  # fmt: skip
    check_size(width, height, run.units)
    return run


def _placement(
    run: Run, free: int | None, host: int | None, request: PlanRequest, chosen: Placement | None
) -> Placement:
    budget = _budget(request.memory, free)
    placement: Placement | None = chosen or RESIDENT
    if budget is not None:
        placement = fitting_placement(run, budget, host)
        if placement is None:
            beside = fitting_placement(run, budget)
            if beside is not None:
                require(replace(run, placement=beside), None, "the device", loaded=False, host=host)
            if request.memory == "auto":
                require(run, free, "the device", loaded=False, host=host)
            raise InputError(
                f"{run.width} x {run.height} does not fit --memory {request.memory} in any way: "
                f"{_sizes(run, budget)}; or ask for more"
            )
    assert placement is not None
    if request.weights is not None:
        placement = replace(placement, weights=request.weights)
    if request.offload is not None:
        placement = replace(placement, offload=request.offload)
    return placement


def _sizes(run: Run, budget: int) -> str:
    smallest = replace(run, placement=Placement(offload=not run.shared, text_on_cpu=not run.shared, half_decoder=True))
    ways = fitting_sizes(smallest, budget, loaded=False).ways(run)
    return f"what fits is {' or '.join(ways)}" if ways else "no size of this model does"


def _budget(memory: str | None, free: int | None) -> int | None:
    """Bytes to stay within; None is no limit."""
    if memory in (None, "full"):
        return None
    if memory == "auto":
        return free
    try:
        gigabytes = float(str(memory).lower().removesuffix("gb").removesuffix("g"))
    except ValueError:
        gigabytes = math.nan
    if not 2 <= gigabytes <= 1000:
        raise InputError(f"--memory must be {MEMORY_CHOICES}, got {memory!r}")
    return budget_of(gigabytes)
