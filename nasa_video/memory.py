"""How much memory a run takes, from sizes alone, and what would fit where it does not."""

# B batch, L layers; sizes of pictures in pixels, of time in latent frames where the name says latent

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

from nasa_video.bench.flops import WanSizes
from nasa_video.errors import InputError
from nasa_video.models import SamplerSettings

# Tensors of full size and base width that the decoder holds at once in its last stage; measured: 11.0 kB a pixel of
# Wan 2.1's VAE in float32, which is 7.2 tensors of 96 channels and 4 pictures.
DECODER_TENSORS = 7.2
# Of a transformer block, in multiples of one activation of the feed-forward's width: its input, GELU and output.
BLOCK_TENSORS = 3


@dataclass(frozen=True)
class Estimate:
    """Bytes of a run.

    Attributes:
        weights: of the transformer and the VAE.
        history: keys and values of self-attention, as the cache allocates them; twice for classifier-free guidance.
        text_keys: keys and values of the prompts.
        decoder: features that streaming decode keeps between chunks, and its working memory.
        denoiser: working memory of one pass.
    """

    weights: int
    history: int
    text_keys: int
    decoder: int
    denoiser: int

    @property
    def total(self) -> int:
        """Everything."""
        return self.weights + self.history + self.text_keys + self.decoder + self.denoiser


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
        text_tokens: keys of all prompts together.
        batch: videos made at once.
        num_layers: where layers were cut.
        decoded: the latents become pictures.
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
    text_tokens: int = 513
    batch: int = 1
    num_layers: int | None = None
    decoded: bool = True

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
    tokens = run.batch * tokens_per_frame * run.sampler.frames_per_chunk
    per_token = 2 * sizes.num_layers * sizes.dim * size
    frames = cache_frames(run.latent_frames, run.sampler.frames_per_chunk, run.sampler.window_frames)
    pixels = run.batch * run.width * run.height if run.decoded else 0
    weights = 0 if loaded else transformer_parameters(run.transformer, sizes.num_layers) * size
    if run.decoded and not loaded:
        weights += _vae_sizes(run.vae).parameters * run.vae_dtype.itemsize
    return Estimate(
        weights=weights,
        history=run.caches * run.batch * frames * tokens_per_frame * per_token,
        text_keys=run.batch * run.text_tokens * per_token,
        decoder=round(pixels * decoder_numbers_per_pixel(run.vae)) * run.vae_dtype.itemsize,
        denoiser=tokens * (BLOCK_TENSORS * sizes.ffn_dim * size + 6 * sizes.dim * 4),
    )


def cache_frames(latent_frames: int | None, frames_per_chunk: int, window_frames: int | None) -> int:
    """Latent frames that the KV cache allocates; it doubles its room where there is no window."""
    if window_frames is not None:
        # The first chunk already allocates the whole window.
        return window_frames
    wanted = frames_per_chunk if latent_frames is None else max(latent_frames, frames_per_chunk)
    capacity = held = frames_per_chunk
    while held < wanted:
        held += frames_per_chunk
        if held > capacity:
            capacity = max(held, 2 * capacity)
    return capacity


def transformer_parameters(config: Mapping[str, Any], num_layers: int) -> int:
    """Parameters of a Wan transformer."""
    return _transformer_parameters(_as_key(config), num_layers)


@lru_cache(maxsize=8)
def _transformer_parameters(config: str, num_layers: int) -> int:
    # Layers are alike: one and two of them say what each takes.
    counts: list[int] = []
    for layers in (1, 2):
        with torch.device("meta"):
            model = WanTransformer3DModel(**{**json.loads(config), "num_layers": layers})
        counts.append(sum(p.numel() for p in model.parameters()))
    return counts[0] + (num_layers - 1) * (counts[1] - counts[0])


@dataclass(frozen=True)
class _VaeSizes:
    parameters: int
    features_per_pixel: float


def _vae_sizes(config: Mapping[str, Any]) -> _VaeSizes:
    return _measure_vae(_as_key(config))


@lru_cache(maxsize=8)
def _measure_vae(config: str) -> _VaeSizes:
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKLWan(**json.loads(config))
        features: list[Any] = [None] * sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
        # From the third latent frame on the features keep their size.
        for first in (True, False, False):
            frame = vae.decoder(torch.empty(1, vae.config.z_dim, 1, 4, 4), features, [0], first_chunk=first)
    pixels = (vae.config.patch_size or 1) ** 2 * frame.shape[-1] * frame.shape[-2]
    kept = sum(feature.numel() for feature in features if isinstance(feature, torch.Tensor))
    return _VaeSizes(sum(p.numel() for p in vae.parameters()), kept / pixels)


def decoder_numbers_per_pixel(config: Mapping[str, Any]) -> float:
    """Numbers that streaming decode holds for every pixel of a picture: kept features and working memory."""
    width = int(config.get("decoder_base_dim") or config["base_dim"])
    pictures = int(config["scale_factor_temporal"])
    return _vae_sizes(config).features_per_pixel + DECODER_TENSORS * width * pictures


def _as_key(config: Mapping[str, Any]) -> str:
    return json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True)


def available(device: torch.device) -> int | None:
    """Free bytes that a run can take on a device; None where that cannot be known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        return _free_on_machine()
    return None


def _free_on_machine() -> int | None:
    try:
        rows = dict(row.split(":", 1) for row in Path("/proc/meminfo").read_text().splitlines() if ":" in row)
        free = int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, AttributeError):
            return None
    limits = [room for room in (_room_in_container(*names) for names in _CONTAINER_FILES) if room is not None]
    return min([free, *limits])


_CONTAINER_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def _room_in_container(limit: str, used: str, statistics: str) -> int | None:
    """Bytes left under a container's limit; what the page cache holds can be had back."""
    try:
        room = int(Path(limit).read_text()) - int(Path(used).read_text())
        rows = dict(row.split() for row in Path(statistics).read_text().splitlines())
        return max(0, room + int(rows.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Fit:
    """What would fit instead; None where nothing does."""

    size: tuple[int, int] | None
    latent_frames: int | None


def fitting_sizes(run: Run, free: int, *, loaded: bool = True) -> Fit:
    """The largest picture of about the same shape, and the longest video of the same size, that ``free`` bytes hold."""

    def fits(candidate: Run) -> bool:
        return estimate(candidate, loaded=loaded).total <= free

    unit_width, unit_height = run.units
    size = None
    for width in range(run.width // unit_width * unit_width, 0, -unit_width):
        height = max(unit_height, round(width * run.height / run.width / unit_height) * unit_height)
        if fits(replace(run, width=width, height=height)):
            size = (width, height)
            break
    frames = None
    if run.sampler.window_frames is None and run.latent_frames is not None:
        chunk = run.sampler.frames_per_chunk
        lengths = range(run.latent_frames - chunk, 0, -chunk)
        frames = next((n for n in lengths if fits(replace(run, latent_frames=n))), None)
    return Fit(size, frames)


def require(run: Run, free: int | None, where: str, *, loaded: bool = True) -> None:
    """Refuse a run that cannot fit, before anything of it is made.

    Args:
        free: bytes on the device; None does not check.
        where: the device, for the message.
        loaded: the weights are there already.

    Raises:
        InputError: it needs more; the message says what for, and what would fit.
    """
    if free is None:
        return
    needs = estimate(run, loaded=loaded)
    wanted = needs.total
    if wanted <= free:
        return
    fit = fitting_sizes(run, free, loaded=loaded)
    ways = []
    if fit.size is not None:
        ways.append(f"--width {fit.size[0]} --height {fit.size[1]}")
    if fit.latent_frames is not None:
        ways.append(f"--frames {(fit.latent_frames - 1) * int(run.vae['scale_factor_temporal']) + 1}")
    parts = {
        "weights": needs.weights,
        "keys and values of earlier frames": needs.history,
        "keys and values of the prompts": needs.text_keys,
        "decoding": needs.decoder,
        "a pass of the model": needs.denoiser,
    }
    listed = ", ".join(f"{_gigabytes(size)} for {what}" for what, size in parts.items() if size >= wanted / 50)
    raise InputError(
        f"not enough memory on {where}: {run.width} x {run.height} needs {_gigabytes(wanted)}"
        f"{' beside the weights' if loaded else ''} ({listed}), {_gigabytes(free)} are free; "
        f"what fits: {' or '.join(ways) or 'no size of this model'}"
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 5e7 else f"{size / 1e6:.1f} MB"
