"""``nasa-video bench``: what a chunk costs under each method, side by side in one process."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from causvid_adapter import SeededNoise, StreamingDecoder, load_generator
from nasa_video import memory
from nasa_video.attention import AttentionError, Backend, SdpaAttend, make_attend
from nasa_video.bench_subject import BASELINE, Method, Rollout, Subject, find_methods, transformer_config, vae_config
from nasa_video.errors import InputError, NasaVideoError
from nasa_video.flops import WanSizes, flop_counter, mean_chunk_flops, prompt_flops
from nasa_video.models import VideoPreset, find_preset
from nasa_video.pipeline import choose_device
from nasa_video.random_model import RandomText, random_generator, random_vae

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Layers are alike, so the operations of any number of them follow from those of one and of two.
COUNTED_LAYERS = (1, 2)

Report = Callable[[str, int, int], None]
"""Told of what is done now, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class BenchSettings:
    """What to measure; None takes the preset's own, or what fits the device.

    Attributes:
        layers: run that many of the model's layers only.
        chunks: of each video; figures are means over them.
        decode: time the VAE as well.
        methods: names of METHODS; empty measures all.
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
class _Case:
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
    def of(cls, settings: BenchSettings) -> _Case:
        methods = find_methods(settings.methods)
        preset = find_preset(settings.model)
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
        config, vae = transformer_config(preset), vae_config(preset)
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
        dtype = DTYPES[settings.dtype] if settings.dtype else _default_dtype(device)
        width, height = settings.width or preset.video.width, settings.height or preset.video.height
        case = cls(settings, preset, config, vae, layers, width, height, device, dtype, methods)
        case.check_size()
        return case

    def check_size(self) -> None:
        """Refuse a picture that patch and VAE do not allow."""
        for name, size, unit in zip(("width", "height"), (self.width, self.height), self.run().units, strict=True):
            if size <= 0 or size % unit:
                below = max(unit, size // unit * unit)
                raise InputError(
                    f"{name} must be a multiple of {unit} for this model, got {size}; use {below} or {below + unit}"
                )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent frame."""
        stride = self.vae["scale_factor_spatial"]
        return self.config["in_channels"], self.height // stride, self.width // stride

    @property
    def frames_per_chunk(self) -> int:
        """Pictures of a chunk (its first has a few less)."""
        return int(self.vae["scale_factor_temporal"]) * self.preset.sampler.frames_per_chunk

    def run(self, caches: int = 1) -> memory.Run:
        """What its memory is estimated from."""
        latent_frames = self.settings.chunks * self.preset.sampler.frames_per_chunk
        return memory.Run(
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
        try:
            attend = SdpaAttend() if device.type == "meta" else make_attend(cast(Backend, self.settings.attention))
        except AttentionError as error:
            raise InputError(str(error)) from error
        text = RandomText(self.preset.components.text_encoder.max_tokens, self.config["text_dim"])
        lengths = (self.settings.positive_tokens, self.settings.negative_tokens)
        guidance = cast(dict[str, dict[str, Any]], self.preset.guidance)
        return Subject(model, attend, self.preset.sampler, guidance, self.latent_shape, text, lengths)


def _default_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@torch.no_grad()
def bench(settings: BenchSettings, report: Report = lambda what, done, total: None) -> dict[str, Any]:
    """Measure; the result holds plain values, ready for JSON (see docs/bench.md for its keys).

    Raises:
        InputError: settings that the model or the device does not allow, or too little memory for them.
    """
    case = _Case.of(settings)
    interleaved = _check_memory(case)
    report("making the model", 0, 1)
    subject = case.subject(case.device, case.layers)
    prompts = {m.name: _time_prompts(subject, m, case.device, report) for m in case.methods}
    load_before = _load()
    with _compiled(subject, settings.compile):
        measured = _Measurement(case, subject, interleaved, report)
        measured.run()
    decode_ms = _time_decode(case, report) if settings.decode else None
    full = case if case.layers == case.config["num_layers"] else replace(case, layers=case.config["num_layers"])
    own = replace(full, width=case.preset.video.width, height=case.preset.video.height)
    own_chunks = _own_chunks(case)
    flops = _Flops(case, subject, settings.chunks, report)
    own_flops = _Flops(own, subject, own_chunks, report)
    rows = []
    for method in case.methods:
        row = measured.row(method)
        row["keys"] = [list(branch) for branch in subject.branches(method)]
        row["flops"] = flops.row(method)
        row["prompt"] = {"ms": prompts[method.name], "flops": _prompt_flops(subject, method)}
        if decode_ms is not None:
            row["fps_with_decode"] = 1000 * case.frames_per_chunk / (row["ms_per_chunk"] + decode_ms)
        if case.layers != full.layers:
            work = _analytic(full, subject, method, settings.chunks) / _analytic(case, subject, method, settings.chunks)
            row["extrapolated"] = _extrapolate(row, case, work)
        row["own_size"] = own_flops.row(method)
        rows.append(row)
    return {
        "model": settings.model,
        "weights": "random" if settings.random_weights else "loaded",
        "layers": case.layers,
        "model_layers": full.layers,
        "width": case.width,
        "height": case.height,
        "tokens_per_chunk": subject.loop.tokens_per_frame * subject.loop.frames_per_chunk,
        "steps": subject.loop.num_steps,
        "chunks": settings.chunks,
        "repeats": settings.repeats,
        "order": "chunk by chunk" if interleaved else "video by video",
        "frames_per_chunk": case.frames_per_chunk,
        "positive_tokens": settings.positive_tokens,
        "negative_tokens": settings.negative_tokens,
        "attention": settings.attention,
        "compile": settings.compile,
        "device": str(case.device),
        "device_name": _device_name(case.device),
        "dtype": str(case.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": [load_before, _load()],
        "decode_ms": decode_ms,
        "own_size": {"width": own.width, "height": own.height, "layers": own.layers, "chunks": own_chunks},
        "methods": rows,
    }


class _Measurement:
    """Times every method in turns and keeps what it took: by method, repetition and chunk, in milliseconds."""

    def __init__(self, case: _Case, subject: Subject, interleaved: bool, report: Report) -> None:
        self.case = case
        self.subject = subject
        self.interleaved = interleaved
        self.report = report
        self.times: dict[str, list[list[float]]] = {method.name: [] for method in case.methods}
        self.memory: dict[str, dict[str, int | None]] = {}
        self.chunks = case.settings.chunks
        # Kernels that are chosen or compiled by shape meet every shape before the clock runs; the CPU's need one pass.
        self.warm_up = self.chunks if case.settings.compile or case.device.type != "cpu" else 1

    def run(self) -> None:
        """Warm up, then repeat."""
        turns = len(self.case.methods) * (self.warm_up + self.case.settings.repeats * self.chunks)
        self.done, self.total = 0, turns
        self._round(self.warm_up, "warming up", 0, keep=False)
        for repeat in range(self.case.settings.repeats):
            self._round(self.chunks, f"repetition {repeat + 1} of {self.case.settings.repeats}", repeat, keep=True)

    def _round(self, chunks: int, what: str, number: int, *, keep: bool) -> None:
        methods = self.case.methods
        if not self.interleaved:
            for method in _rotated(methods, number):
                self._videos([method], chunks, what, keep=keep)
            return
        self._videos(methods, chunks, what, keep=keep, number=number)

    def _videos(self, methods: Sequence[Method], chunks: int, what: str, *, keep: bool, number: int = 0) -> None:
        device = self.case.device
        noise = SeededNoise([0], self.case.latent_shape, device)
        resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        rollouts = {m: Rollout(self.subject, m, chunks, noise, lambda: _now(device)) for m in methods}
        for turn in range(chunks + Rollout.extra_turns):
            for method in _rotated(methods, turn + number):
                rollouts[method].turn()
                self.done += turn > 0
                self.report(what, self.done, self.total)
        if not keep:
            return
        peak = torch.cuda.max_memory_allocated(device) - resident if device.type == "cuda" else None
        for method, rollout in rollouts.items():
            self.times[method.name].append([1000 * seconds for seconds in rollout.spent])
            self.memory[method.name] = {
                "history": rollout.history_bytes,
                "text_keys": rollout.text_key_bytes,
                "peak_beside_weights": None if peak is None or len(rollouts) > 1 else peak + rollout.text_key_bytes,
            }

    def row(self, method: Method) -> dict[str, Any]:
        """Figures of a method; the ratio pairs each turn with the baseline's beside it, so that drift cancels."""
        times = self.times[method.name]
        by_chunk = list(zip(*times, strict=True))
        ms = statistics.fmean(statistics.median(chunk) for chunk in by_chunk)
        baseline = [t for video in self.times[BASELINE.name] for t in video]
        ratios = [t / base for t, base in zip((t for video in times for t in video), baseline, strict=True)]
        return {
            "name": method.name,
            "title": method.title,
            "ms_per_chunk": ms,
            "ms_quartiles": [statistics.fmean(_quartile(chunk, q) for chunk in by_chunk) for q in (1, 3)],
            "ms_by_chunk": [statistics.median(chunk) for chunk in by_chunk],
            "time_ratio": statistics.median(ratios),
            "time_ratio_quartiles": [_quartile(ratios, 1), _quartile(ratios, 3)],
            "fps": 1000 * self.case.frames_per_chunk / ms,
            "fps_with_decode": None,
            "memory": {**self.memory[method.name], "extra": self._held(method) - self._held(BASELINE)},
            "extrapolated": None,
        }

    def _held(self, method: Method) -> int:
        used = self.memory[method.name]
        return (used["history"] or 0) + (used["text_keys"] or 0)


class _Flops:
    """Operations a chunk: counted over a video's first chunk, and by formula for it and for the mean of all."""

    def __init__(self, case: _Case, subject: Subject, chunks: int, report: Report) -> None:
        self.case, self.subject, self.chunks = case, subject, chunks
        self.counted = count_flops(case, report)

    def row(self, method: Method) -> dict[str, float]:
        """Figures of a method; the ratio is that of the means."""
        mean, baseline = (_analytic(self.case, self.subject, m, self.chunks) for m in (method, BASELINE))
        return {
            "first_chunk_counted": self.counted[method.name],
            "first_chunk_analytic": _analytic(self.case, self.subject, method, 1),
            "mean_analytic": mean,
            "ratio": mean / baseline,
        }


def count_flops(case: _Case, report: Report) -> dict[str, float]:
    """Operations of a video's first chunk by torch's counter, on tensors that have shapes and no numbers."""
    counts: dict[str, list[float]] = {}
    for layers in COUNTED_LAYERS:
        subject = case.subject(torch.device("meta"), layers)
        for number, method in enumerate(case.methods):
            report(f"counting operations at {case.width} x {case.height}", number, len(case.methods))
            counts.setdefault(method.name, []).append(count_video(subject, method, 1))
    first, second = COUNTED_LAYERS
    return {name: one + (case.layers - first) / (second - first) * (two - one) for name, (one, two) in counts.items()}


@torch.no_grad()
def count_video(subject: Subject, method: Method, chunks: int) -> float:
    """Operations of a video's chunks, counted while it is made; nothing is computed when the model is on "meta"."""
    device = subject.model.device

    def noise(frames: range, step: int) -> Tensor:
        return torch.zeros(1, len(frames), *subject.latent_shape, device=device)

    subject.branches(method)  # the prompt's keys are made once, before
    with flop_counter() as counter:
        rollout = Rollout(subject, method, chunks, noise, lambda: float(counter.get_total_flops()))
        for _ in range(chunks + Rollout.extra_turns):
            rollout.turn()
    return sum(rollout.spent)


def _analytic(case: _Case, subject: Subject, method: Method, chunks: int) -> float:
    sizes = WanSizes.of(case.config, case.layers)
    loop = replace(subject.loop, tokens_per_frame=sizes.tokens_per_frame(*case.latent_shape[1:]))
    return mean_chunk_flops(sizes, loop, chunks, subject.branches(method))


def _prompt_flops(subject: Subject, method: Method) -> int:
    return sum(prompt_flops(subject.sizes, n) for branch in subject.branches(method) for n in branch)


def _extrapolate(row: dict[str, Any], case: _Case, work: float) -> dict[str, float]:
    """To all layers: time in proportion to the operations, memory to the layers."""
    ms = row["ms_per_chunk"] * work
    layers = case.config["num_layers"] / case.layers
    return {
        "ms_per_chunk": ms,
        "fps": 1000 * case.frames_per_chunk / ms,
        "history": row["memory"]["history"] * layers,
        "text_keys": row["memory"]["text_keys"] * layers,
        "extra": row["memory"]["extra"] * layers,
    }


def _own_chunks(case: _Case) -> int:
    stride = int(case.vae["scale_factor_temporal"])
    latent_frames = (case.preset.video.frames - 1) // stride + 1
    return max(1, latent_frames // case.preset.sampler.frames_per_chunk)


def _check_memory(case: _Case) -> bool:
    """Refuse what cannot fit; says whether the histories of all methods fit side by side."""
    free = memory.available(case.device)
    run = case.run(caches=2 if any(method.guidance == "cfg" for method in case.methods) else 1)
    memory.require(run, free, str(case.device), loaded=False)
    if case.device.type == "cuda":  # one video at a time, so that its peak memory is its own
        return False
    needs = memory.estimate(run)
    histories = (len(case.methods) + 1) * memory.estimate(case.run()).history
    return free is None or needs.total - needs.history + histories < 0.8 * free


def _time_prompts(subject: Subject, method: Method, device: torch.device, report: Report) -> float:
    """Milliseconds to make the keys and values of the method's prompts, median of three."""
    report(f"making text keys: {method.title}", 0, 1)
    prompts = subject.prompts(method)
    for prompt in prompts:
        subject.keys(*prompt)
    times = []
    for _ in range(3):
        start = _now(device)
        for prompt in prompts:
            subject.make_keys(*prompt)
        times.append(1000 * (_now(device) - start))
    return statistics.median(times)


def _time_decode(case: _Case, report: Report) -> float:
    """Milliseconds to decode a chunk that is not the video's first, median."""
    channels, height, width = case.latent_shape
    vae_source = case.preset.components.vae.find()
    if case.settings.random_weights or vae_source is None:
        vae = random_vae(case.vae, device=case.device)
    else:
        vae = AutoencoderKLWan.from_pretrained(vae_source, local_files_only=True, torch_dtype=torch.float32)
        vae = vae.to(case.device).eval()
    decoder = StreamingDecoder(vae)
    latents = torch.zeros(1, case.preset.sampler.frames_per_chunk, channels, height, width, device=case.device)
    times = []
    repeats = min(3, case.settings.repeats)
    for repeat in range(1 + repeats):
        report("decoding", repeat, 1 + repeats)
        start = _now(case.device)
        decoder.decode(latents)
        times.append(1000 * (_now(case.device) - start))
    return statistics.median(times[1:])


@contextmanager
def _compiled(subject: Subject, wanted: bool) -> Iterator[None]:
    transformer = subject.model.transformer
    with ExitStack() as scope:
        if wanted:
            from torch._dynamo import config
            from torch._dynamo.exc import TorchDynamoException

            # Every method, and every length of its history before lengths become symbols, is a graph of its own.
            scope.enter_context(config.patch(recompile_limit=256, accumulated_recompile_limit=1024))  # type: ignore[no-untyped-call]
            transformer.forward = torch.compile(transformer.forward)
            scope.callback(lambda: delattr(transformer, "forward"))
        try:
            yield
        except Exception as error:
            if wanted and isinstance(error, TorchDynamoException):
                raise NasaVideoError(
                    f"torch.compile failed on this machine: {str(error).strip().splitlines()[0]}; leave out --compile"
                ) from error
            raise


def _rotated(methods: Sequence[Method], by: int) -> list[Method]:
    shift = by % len(methods)
    return [*methods[shift:], *methods[:shift]]


def _quartile(values: Sequence[float], which: int) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=4, method="inclusive")[which - 1]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return f"{names[0]}, {len(names)} CPUs"
    except (OSError, IndexError):
        return device.type
