"""What is asked of a bench, checked and completed before anything of it is made."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from causvid_adapter import compile_generator, load_generator
from causvid_adapter.errors import CausvidAdapterError
from causvid_adapter.sizes import WanSizes
from nasa_video.bench.flops import ChunkLoop, mean_chunk_flops
from nasa_video.bench.random_model import RandomText, random_generator
from nasa_video.bench.subject import Method, Subject, find_methods
from nasa_video.errors import InputError
from nasa_video.guidance.attention import AttentionError, Backend, SdpaAttend, make_attend
from nasa_video.models.loading import choose_device, default_dtype
from nasa_video.models.memory_estimate import Run
from nasa_video.models.part_sizes import check_size, transformer_config, vae_config
from nasa_video.models.presets import VideoPreset, find_preset

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# What a CPU does in some minutes.
CPU_WORK = 2e13


class BenchWarning(UserWarning):
    """Something else was measured than what was asked for."""


@dataclass(frozen=True)
class BenchSettings:
    """What to measure; None takes the preset's own, or what the device can do.

    A CPU that is told neither size nor layers measures a large model reduced in both, with a warning that says so.

    Attributes:
        layers: run that many of the model's layers only.
        chunks: of each video; figures are means over them.
        decode: time the VAE as well.
        methods: names as :func:`find_methods` reads them; empty measures all.
    """

    model: str = "causvid"
    random_weights: bool = False
    layers: int | None = None
    width: int | None = None
    height: int | None = None
    chunks: int = 2
    repeats: int = 5
    device: str | None = None
    dtype: str | None = None
    attention: str = "sdpa"
    compile: bool = False
    decode: bool = False
    methods: tuple[str, ...] = ()
    positive_tokens: int = 20
    negative_tokens: int = 8

    def __post_init__(self) -> None:
        for name, low, high in (("chunks", 1, 1000), ("repeats", 1, 1000)):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} must be from {low} to {high}, got {getattr(self, name)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.attention not in ("sdpa", "xformers"):
            raise InputError(f"attention must be sdpa or xformers, got {self.attention!r}")


@dataclass(frozen=True)
class Case:
    """Settings, checked and completed."""

    settings: BenchSettings
    preset: VideoPreset
    config: dict[str, Any]
    vae: dict[str, Any]
    layers: int
    width: int
    height: int
    device: torch.device
    dtype: torch.dtype
    methods: tuple[Method, ...]

    @classmethod
    def of(cls, settings: BenchSettings) -> Case:
        preset = find_preset(settings.model)
        methods = find_methods(settings.methods, preset.guidance)
        device = choose_device(settings.device)
        if settings.attention == "xformers" and device.type != "cuda":
            raise InputError(
                f"xformers has no attention kernel for {device.type}; use --attention sdpa, or --device cuda"
            )
        if not settings.random_weights and preset.components.transformer.find() is None:
            raise InputError(
                f"the weights of {settings.model} are not here ({preset.components.transformer.description}); "
                "--random-weights measures a model of its sizes without them"
            )
        config = transformer_config(preset)
        if config is None:
            raise InputError(
                f"the sizes of {preset.name} are nowhere on this machine: {preset.components.transformer.description} "
                "is missing, and the preset has no config of its own"
            )
        vae = vae_config(preset, int(config["in_channels"]))
        total = config["num_layers"]
        layers = total if settings.layers is None else settings.layers
        if not 1 <= layers <= total:
            raise InputError(f"layers must be from 1 to the {total} of {settings.model}, got {layers}")
        most = preset.components.text_encoder.max_tokens
        for name in ("positive_tokens", "negative_tokens"):
            if not 1 <= getattr(settings, name) <= most:
                raise InputError(
                    f"{name} must be from 1 to the {most} of {settings.model}'s text encoder, "
                    f"got {getattr(settings, name)}"
                )
        dtype = DTYPES[settings.dtype] if settings.dtype else default_dtype(device)
        width = preset.video.width if settings.width is None else settings.width
        height = preset.video.height if settings.height is None else settings.height
        case = cls(settings, preset, config, vae, layers, width, height, device, dtype, methods)
        check_size(width, height, case.run().units)
        if device.type == "cpu" and settings.width is settings.height is settings.layers is None:
            return case._reduced()
        return case

    def _reduced(self) -> Case:
        """The case as it is, or what of it a CPU can do in minutes; says so."""
        if self._work() <= CPU_WORK:
            return self
        sides = (
            max(unit, size // 4 // unit * unit)
            for size, unit in zip((self.width, self.height), self.run().units, strict=True)
        )
        width, height = sides
        small = replace(self, width=width, height=height)
        small = replace(small, layers=max(1, min(self.layers, int(self.layers * CPU_WORK / small._work()))))
        warnings.warn(
            f"{self.width} x {self.height} takes a CPU hours: measuring {small.width} x {small.height} with "
            f"{small.layers} of {self.layers} layers; --width, --height and --layers choose otherwise",
            BenchWarning,
            stacklevel=2,
        )
        return small

    def _work(self) -> float:
        """Operations of the whole bench, about: as if every method were the unguided one."""
        s, sizes = self.preset.sampler, WanSizes.of(self.config, self.layers)
        tokens = sizes.tokens_per_frame(*self.latent_shape[1:])
        loop = ChunkLoop(tokens, s.frames_per_chunk, s.default_steps, s.window)
        videos = len(self.methods) * (self.settings.repeats + 1)
        keys = [[self.preset.components.text_encoder.max_tokens]]
        return videos * self.settings.chunks * mean_chunk_flops(sizes, loop, self.settings.chunks, keys)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent frame."""
        stride = self.vae["scale_factor_spatial"]
        return self.config["in_channels"], self.height // stride, self.width // stride

    @property
    def frames_per_chunk(self) -> int:
        """Pictures of a chunk (its first has a few less)."""
        return int(self.vae["scale_factor_temporal"]) * self.preset.sampler.frames_per_chunk

    def run(self, caches: int = 1) -> Run:
        """What its memory is estimated from."""
        latent_frames = self.settings.chunks * self.preset.sampler.frames_per_chunk
        return Run(
            self.config, self.vae, self.preset.sampler, self.width, self.height, latent_frames, self.dtype,
            caches=caches, text_tokens=4 * self.preset.components.text_encoder.max_tokens, num_layers=self.layers,
            decoded=self.settings.decode,
        )  # fmt: skip

    def subject(self, device: torch.device, layers: int) -> Subject:
        """The model on its device; on "meta" any number of layers without weights."""
        if self.settings.random_weights or device.type == "meta":
            model = random_generator(self.config, num_layers=layers, device=device, dtype=self.dtype)
        else:
            source = self.preset.components.transformer.fetch()
            model = load_generator(source, self.preset.components.config, dtype=self.dtype, device=device)
            model.transformer.blocks = model.transformer.blocks[:layers]
        if self.settings.compile and device.type != "meta":
            try:
                compile_generator(model)
            except CausvidAdapterError as error:
                raise InputError(str(error)) from error
        try:
            attend = SdpaAttend() if device.type == "meta" else make_attend(cast(Backend, self.settings.attention))
        except AttentionError as error:
            raise InputError(str(error)) from error
        text = RandomText(self.preset.components.text_encoder.max_tokens, self.config["text_dim"])
        lengths = (self.settings.positive_tokens, self.settings.negative_tokens)
        guidance = self.preset.guidance
        return Subject(model, attend, self.preset.sampler, guidance, self.latent_shape, text, lengths)
