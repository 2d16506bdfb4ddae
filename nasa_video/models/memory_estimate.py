"""How much memory a run takes, from sizes alone, and what would fit where it does not.

Measured against real runs by ``research/measure_memory.py``; see docs/guides/memory.md.
"""

# B batch, L layers; sizes of pictures in pixels, of time in latent frames where the name says latent

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from causvid_adapter.sizes import WanSizes
from causvid_adapter.window import Window
from nasa_video.errors import InputError, format_bytes
from nasa_video.models.part_sizes import decoder_numbers_per_pixel, transformer_sizes, vae_sizes
from nasa_video.models.placement import LADDER, RESIDENT, Placement
from nasa_video.models.presets import SamplerSettings

# Copies of a chunk's pictures: the decoder's pieces, put together, clamped, compared.
PICTURE_COPIES = 4
# What a CPU's kernels keep of the weights they last packed, and the C library of freed memory: a share of the weights,
# measured at CausVid's size (docs/guides/memory.md).
CPU_WORKSPACE = 0.05
# Of a transformer block, in multiples of one activation of the feed-forward's width: its input, GELU and output.
BLOCK_TENSORS = 3
# Blocks on the device at once when they are offloaded: the one that computes, and the next on its way.
RESIDENT_BLOCKS = 2
# Of a card's memory, what a run cannot have: the CUDA context, the libraries' workspaces, the desktop, fragments.
RESERVED = 1_000_000_000
GIB = 1 << 30
# The cards that the messages name.
COMMON_CARDS = (24, 16, 12)


@dataclass(frozen=True)
class Estimate:
    """Bytes of a run on its device; what takes turns (prompts, a pass, decoding) is not added up.

    Attributes:
        weights: of the transformer and the VAE, as far as they stay on the device.
        text_encoder: its weights while prompts are encoded, before anything is generated; 0 where it is elsewhere.
        history: keys and values of self-attention, as the cache allocates them; twice for classifier-free guidance.
        text_keys: keys and values of the prompts.
        features: what streaming decode keeps between chunks.
        decoder: working memory of decoding.
        denoiser: working memory of one pass.
        workspace: what kernels and allocator keep on a CPU; on GPUs the reserve stands for it.
        overlapped: decoding and passes happen at once.
        host: bytes in the host's memory beside the device: offloaded blocks and the text encoder.
    """

    weights: int
    text_encoder: int
    history: int
    text_keys: int
    features: int
    decoder: int
    denoiser: int
    workspace: int = 0
    overlapped: bool = False
    host: int = 0

    @property
    def phases(self) -> dict[str, int]:
        """Bytes on the device in each phase of a run."""
        generating = self.weights + self.history + self.text_keys + self.features + self.workspace
        both = self.denoiser + self.decoder
        return {
            "reading the prompts": self.weights + self.text_encoder,
            "a pass of the model": generating + (both if self.overlapped else self.denoiser),
            "decoding": generating + (both if self.overlapped else self.decoder),
        }

    @property
    def peak(self) -> int:
        """The most that is taken at once."""
        return max(self.phases.values())


@dataclass(frozen=True)
class Run:
    """What an estimate is made for.

    Attributes:
        transformer: config with diffusers' names.
        vae: config of AutoencoderKLWan.
        sampler: the preset's loop.
        width, height: of the pictures.
        latent_frames: None streams without end: counted as one chunk where there is no window.
        dtype: of the transformer, its keys and values.
        vae_dtype: of the VAE.
        caches: histories, 2 for classifier-free guidance.
        decoders: videos that are decoded side by side.
        processes: devices that share one video's passes, tokens and heads.
        text_tokens: keys of all prompts together.
        batch: videos made at once.
        num_layers: where layers were cut.
        decoded: the latents become pictures.
        tiny_decoder: by the tiny decoder.
        placement: how the parts are stored and where they live.
        text_encoder: bytes of the text encoder's weights; 0 where every prompt is known already.
        overlapped: a chunk is decoded while the next is made.
        shared: the device is the host: what is offloaded stays.
    """

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    sampler: SamplerSettings
    width: int
    height: int
    latent_frames: int | None
    dtype: torch.dtype = torch.bfloat16
    vae_dtype: torch.dtype = torch.float32
    caches: int = 1
    decoders: int = 1
    processes: int = 1
    text_tokens: int = 513
    batch: int = 1
    num_layers: int | None = None
    decoded: bool = True
    tiny_decoder: bool = False
    placement: Placement = RESIDENT
    text_encoder: int = 0
    overlapped: bool = False
    shared: bool = False

    @property
    def sizes(self) -> WanSizes:
        """Of the transformer."""
        return WanSizes.of(self.transformer, self.num_layers)

    @property
    def units(self) -> tuple[int, int]:
        """Smallest width and height, of which every other is a multiple."""
        stride = int(self.vae["scale_factor_spatial"])
        return stride * self.sizes.patch[1], stride * self.sizes.patch[0]


def estimate(run: Run, *, loaded: bool = False) -> Estimate:
    """Bytes of a run, part by part; ``loaded`` leaves out the weights, which are there already."""
    sizes, size = run.sizes, run.dtype.itemsize
    stride = int(run.vae["scale_factor_spatial"])
    tokens_per_frame = sizes.tokens_per_frame(run.height // stride, run.width // stride)
    tokens = run.batch * tokens_per_frame * run.sampler.frames_per_chunk // run.processes
    per_token = 2 * sizes.num_layers * sizes.dim * size
    frames = cache_frames(run.latent_frames, run.sampler.frames_per_chunk, run.sampler.window)
    keys = run.batch * frames * tokens_per_frame
    pixels = run.batch * run.width * run.height if run.decoded else 0
    vae_size = torch.bfloat16.itemsize if run.placement.half_decoder else run.vae_dtype.itemsize
    weights, waiting = _transformer_bytes(run)
    if run.decoded:
        weights += vae_sizes(run.vae).parameters * vae_size
    text_on_host = run.placement.text_on_cpu and not run.shared
    # Positions inside the window: every pass rotates the window's keys anew, in float32, a layer at a time.
    rotated = keys * sizes.dim * (size + 2 * 4) if run.sampler.rope == "window" else 0
    working = decoder_numbers_per_pixel(run.vae, run.tiny_decoder)
    shown = PICTURE_COPIES * 3 * int(run.vae["scale_factor_temporal"]) * run.sampler.frames_per_chunk
    kept = 0.0 if run.tiny_decoder else vae_sizes(run.vae).features_per_pixel
    return Estimate(
        weights=0 if loaded else weights,
        text_encoder=0 if text_on_host else run.text_encoder,
        history=run.caches * keys * per_token // run.processes,
        text_keys=run.batch * run.text_tokens * per_token,
        features=round(pixels * kept) * vae_size * run.decoders,
        decoder=round(pixels * (working + shown)) * vae_size,
        denoiser=tokens * (BLOCK_TENSORS * sizes.ffn_dim * size + 6 * sizes.dim * 4) + rotated,
        workspace=round(weights * CPU_WORKSPACE) if run.shared else 0,
        overlapped=run.overlapped,
        host=(0 if loaded else waiting) + (run.text_encoder if text_on_host else 0),
    )


def frames_of_rollout(latent_frames: int | None, rollout_frames: int | None) -> int | None:
    """Latent frames that history may have to hold: of a rollout, where the video is made of several."""
    lengths = [frames for frames in (latent_frames, rollout_frames) if frames is not None]
    return min(lengths, default=None)


def cache_frames(latent_frames: int | None, frames_per_chunk: int, window: Window) -> int:
    """Latent frames that the KV cache allocates; a video without end and window is counted by its first chunk."""
    wanted = frames_per_chunk if latent_frames is None else max(latent_frames, frames_per_chunk)
    return window.capacity(frames_per_chunk, 0, None if latent_frames is None else wanted)


def _transformer_bytes(run: Run) -> tuple[int, int]:
    """Bytes of the transformer's weights on the device, and waiting in the host's memory."""
    size, layers = run.dtype.itemsize, run.sizes.num_layers
    weights = transformer_sizes(run.transformer)
    block = weights.block * size
    if run.placement.weights != "plain":
        # A byte a weight; a scale a row.
        block += weights.matrices * (1 - size) + weights.rows * size
    if not run.placement.offload or run.shared:
        return weights.outside * size + layers * block, 0
    return weights.outside * size + min(RESIDENT_BLOCKS, layers) * block, weights.outside * size + layers * block


@dataclass(frozen=True)
class Fit:
    """What would fit instead; None where nothing does."""

    size: tuple[int, int] | None
    latent_frames: int | None

    def ways(self, run: Run) -> list[str]:
        """The options that ask for it."""
        ways = [] if self.size is None else [f"--width {self.size[0]} --height {self.size[1]}"]
        if self.latent_frames is not None:
            ways.append(f"--frames {(self.latent_frames - 1) * int(run.vae['scale_factor_temporal']) + 1}")
        return ways


def fitting_sizes(run: Run, free: int, *, loaded: bool = True) -> Fit:
    """The largest picture of about the same shape, and the longest video of the same size, that ``free`` bytes hold."""

    def fits(candidate: Run) -> bool:
        return estimate(candidate, loaded=loaded).peak <= free

    def of_width(columns: int) -> Run:
        width = columns * unit_width
        height = max(unit_height, round(width * run.height / run.width / unit_height) * unit_height)
        return replace(run, width=width, height=height)

    def of_length(chunks: int) -> Run:
        return replace(run, latent_frames=chunks * chunk)

    (unit_width, unit_height), chunk = run.units, run.sampler.frames_per_chunk
    columns = _most(run.width // unit_width, lambda number: fits(of_width(number)))
    size = (of_width(columns).width, of_width(columns).height) if columns else None
    chunks = 0
    if run.sampler.window.frames is None and run.latent_frames is not None:
        chunks = _most((run.latent_frames - 1) // chunk, lambda number: fits(of_length(number)))
    return Fit(size, chunks * chunk or None)


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``limit`` that fits, where every smaller one does too; 0 where none does."""
    return bisect_left(range(1, limit + 1), True, key=lambda number: not fits(number))


def budget_of(gigabytes: float) -> int:
    """Bytes that a run can have of a card of that many gigabytes."""
    return round(gigabytes * GIB) - RESERVED


def fitting_placement(run: Run, budget: int | None, host: int | None = None) -> Placement | None:
    """The first placement of the ladder that the budgets of device and host hold; None where none does."""
    for placement in LADDER:
        if run.shared and (placement.offload or placement.text_on_cpu):
            # On the host itself only what makes things smaller helps.
            placement = replace(placement, offload=False, text_on_cpu=False)
        if run.vae_dtype.itemsize <= torch.bfloat16.itemsize or run.dtype != torch.bfloat16:
            placement = replace(placement, half_decoder=False)
        needs = estimate(replace(run, placement=placement))
        if (budget is None or needs.peak <= budget) and (host is None or needs.host <= host):
            return placement
    return None


def fitting_card(run: Run, free: int, host: int | None = None) -> int | None:
    """Gigabytes to ask for with ``--memory`` so that the run fits into ``free`` bytes; None where nothing does."""
    largest = int((free + RESERVED) // GIB)
    cards: list[int] = [*(card for card in COMMON_CARDS if card <= largest + 1), *range(largest, 0, -1)]
    for card in cards:
        placement = fitting_placement(run, budget_of(card), host)
        if placement is not None and estimate(replace(run, placement=placement)).peak <= free:
            return card
    return None


def require(run: Run, free: int | None, where: str, *, loaded: bool = True, host: int | None = None) -> None:
    """Refuse a run that cannot fit, before anything of it is made.

    Args:
        free: bytes on the device; None does not check.
        where: the device, for the message.
        loaded: the weights are there already.
        host: bytes of the host's memory, for what waits there; None does not check.

    Raises:
        InputError: it needs more; the message says what for, and what would fit.
    """
    needs = estimate(run, loaded=loaded)
    if host is not None and needs.host > host and (free is None or needs.peak <= free):
        raise InputError(
            f"not enough memory on this machine: {format_bytes(needs.host)} are needed beside {where} "
            f"({run.placement.description}), {format_bytes(host)} are free; close other programs, or take a larger card"
        )
    if free is None or needs.peak <= free:
        return
    wanted = needs.peak
    card = None if loaded else fitting_card(run, free, host)
    ways = [*([] if card is None else [f"--memory {card}"]), *fitting_sizes(run, free, loaded=loaded).ways(run)]
    listed = ", ".join(
        f"{format_bytes(size)} for {what}" for what, size in _parts(needs).items() if size >= wanted / 50
    )
    raise InputError(
        f"not enough memory on {where}: {run.width} x {run.height} needs {format_bytes(wanted)}"
        f"{' beside the weights' if loaded else ''} ({listed}), {format_bytes(free)} are free; "
        f"what fits: {' or '.join(ways) or 'no size of this model'}"
    )


def _parts(needs: Estimate) -> dict[str, int]:
    """What is on the device at the peak."""
    if needs.phases["reading the prompts"] == needs.peak:
        return {"weights": needs.weights, "the text encoder": needs.text_encoder}
    decoding = needs.decoder if needs.overlapped or needs.decoder >= needs.denoiser else 0
    return {
        "weights": needs.weights + needs.workspace,
        "keys and values of earlier frames": needs.history,
        "keys and values of the prompts": needs.text_keys,
        "decoding": needs.features + decoding,
        "a pass of the model": needs.denoiser if needs.overlapped or not decoding else 0,
    }
