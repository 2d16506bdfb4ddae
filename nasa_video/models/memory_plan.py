"""The memory plan of a run, made before anything of it is downloaded or loaded."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from causvid_adapter.checkpoint import infer_config, read_shapes, to_diffusers, unwrap
from nasa_video.errors import InputError
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
from nasa_video.models.placement import RESIDENT, Placement, WeightKind
from nasa_video.models.presets import Components, Umt5Text, VideoPreset

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
        listed = ", ".join(f"{what} {gigabytes(size)}" for what, size in parts.items() if size)
        beside = f"; {gigabytes(needs.host)} in the host's memory" if needs.host else ""
        free = "" if self.free is None else f" of {gigabytes(self.free)} free"
        return (
            f"memory on {self.device}: {gigabytes(needs.peak)} at most{free} ({listed}){beside}; "
            f"{self.placement.description}"
        )

    def require(self) -> None:
        """Refuse a run that does not fit.

        Raises:
            InputError: it does not; the message names the ``--memory`` or the size that does. Or it wants weights in 8
                bits, and torchao is not installed.
        """
        if self.placement.weights != "plain" and importlib.util.find_spec("torchao") is None:
            raise InputError(
                f"{self.placement.weights} weights need torchao: pip install 'nasa-video[quant]', or use --weights "
                "plain"
            )
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
    for name, size, unit in zip(("width", "height"), (width, height), run.units, strict=True):
        if size <= 0 or size % unit:
            below = max(unit, size // unit * unit)
            raise InputError(
                f"{name} must be a multiple of {unit} for this model, got {size}; use {below} or {below + unit}"
            )
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
    fit = fitting_sizes(smallest, budget, loaded=False)
    ways = [] if fit.size is None else [f"--width {fit.size[0]} --height {fit.size[1]}"]
    if fit.latent_frames is not None:
        ways.append(f"--frames {(fit.latent_frames - 1) * int(run.vae['scale_factor_temporal']) + 1}")
    return f"what fits is {' or '.join(ways)}" if ways else "no size of this model does"


def _budget(memory: str | None, free: int | None) -> int | None:
    """Bytes to stay within; None is no limit."""
    if memory in (None, "full"):
        return None
    if memory == "auto":
        return free
    try:
        gigabytes = float(str(memory))
    except ValueError:
        gigabytes = math.nan
    if not 2 <= gigabytes <= 1000:
        raise InputError(f"--memory must be {MEMORY_CHOICES}, got {memory!r}")
    return budget_of(gigabytes)


def transformer_config(preset: VideoPreset) -> dict[str, Any] | None:
    """Sizes of the preset's transformer: its own, those beside its weights, or those of the weights themselves."""
    if preset.components.config is not None:
        return preset.components.config
    found = preset.components.transformer.find()
    if found is not None and found.is_file():
        return infer_config(to_diffusers(unwrap(read_shapes(found)), source=str(found)))
    return _read_config(found)


# What Wan 2.2's VAE of 48 channels differs in from diffusers' defaults, which are Wan 2.1's.
_WAN22_VAE: dict[str, Any] = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "dim_mult": [1, 2, 4, 4], "patch_size": 2,
    "is_residual": True, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48,
}  # fmt: skip


def vae_config(preset: VideoPreset, channels: int = 16) -> dict[str, Any]:
    """Sizes of the preset's VAE, or those of Wan's published one for so many channels where its files are elsewhere."""
    found = _read_config(preset.components.vae.find())
    if found is not None:
        return found
    with torch.device("meta"):
        return dict(AutoencoderKLWan(**(_WAN22_VAE if channels == 48 else {})).config)


def text_encoder_bytes(
    parts: Components, device: torch.device, dtype: torch.dtype, prompts: Sequence[str] | None
) -> int:
    """Bytes of the text encoder's weights; 0 where it is small, or where every prompt's embeddings are on disk.

    On the CPU in float32 they are the file's own pages, which the system lets go when it needs the room: not counted.
    """
    settings = parts.text_encoder
    if not isinstance(settings, Umt5Text) or (device.type == "cpu" and dtype == torch.float32):
        return 0
    found = settings.find()
    if found is not None and prompts is not None and _all_known(settings, device, dtype, prompts):
        return 0
    if found is not None and found.is_file():
        numbers = sum(tensor.numel() for tensor in unwrap(read_shapes(found)).values())
    else:
        try:
            config = _read_config(found) or {}
        except InputError:
            config = {}  # said when it is loaded
        numbers = _umt5_parameters(json.dumps(config, sort_keys=True, default=str))
    return numbers * dtype.itemsize


def _all_known(settings: Umt5Text, device: torch.device, dtype: torch.dtype, prompts: Sequence[str]) -> bool:
    from nasa_video.models.loading import load_text_encoder
    from nasa_video.text.embedding_cache import CachedEncoder

    try:
        encoder = load_text_encoder(settings, device, dtype)
    except InputError:
        return False
    return isinstance(encoder, CachedEncoder) and encoder.holds(prompts)


@lru_cache(maxsize=4)
def _umt5_parameters(config: str) -> int:
    # What transformers' default lacks of the XXL that Wan reads its prompts with.
    xxl = {
        "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24,
        "feed_forward_proj": "gated-gelu",
    }  # fmt: skip
    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**(json.loads(config) or xxl)))
    return sum(p.numel() for p in model.parameters())


def _read_config(folder: Path | None) -> dict[str, Any] | None:
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        loaded: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/config.json is damaged ({error}); remove it and bring it again") from error
    return loaded


def gigabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
