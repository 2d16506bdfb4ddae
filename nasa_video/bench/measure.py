"""Time and memory of every method, in turns, and all figures of a bench put together."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from causvid_adapter import SeededNoise, StreamingDecoder
from nasa_video.bench.case import BenchSettings, Case
from nasa_video.bench.operations import Operations, Report, analytic_flops, count_flops, prompt_operations
from nasa_video.bench.random_model import random_vae
from nasa_video.bench.subject import BASELINE, Method, Rollout, Subject
from nasa_video.guidance.methods import ClassifierFree, parse_guidance
from nasa_video.models.free_memory import available
from nasa_video.models.memory_estimate import estimate, require


@torch.no_grad()
def bench(settings: BenchSettings, report: Report = lambda what, done, total: None) -> dict[str, Any]:
    """Measure; the result holds plain values, ready for JSON (see docs/method/cost.md for its keys).

    Raises:
        InputError: settings that the model or the device does not allow, or too little memory for them.
    """
    case = Case.of(settings)
    interleaved = _check_memory(case)
    report("making the model", 0, 1)
    subject = case.subject(case.device, case.layers)
    prompts = {m.name: _time_prompts(subject, m, case.device, report) for m in case.methods}
    load_before = _load()
    measured = _Measurement(case, subject, interleaved, report)
    measured.run()
    decode_ms = _time_decode(case, report) if settings.decode else None
    full = case if case.layers == case.config["num_layers"] else replace(case, layers=case.config["num_layers"])
    own = replace(full, width=case.preset.video.width, height=case.preset.video.height)
    own_chunks = _own_chunks(case)
    flops = Operations(case, subject, settings.chunks, count_flops(case, report))
    own_flops = Operations(own, subject, own_chunks, flops.counted if own == case else count_flops(own, report))
    rows = []
    for method in case.methods:
        row = measured.row(method)
        row["keys"] = [list(branch) for branch in subject.branches(method)]
        row["flops"] = flops.row(method)
        row["prompt"] = {"ms": prompts[method.name], "flops": prompt_operations(subject, method)}
        if decode_ms is not None:
            row["fps_with_decode"] = 1000 * case.frames_per_chunk / (row["ms_per_chunk"] + decode_ms)
        if case.layers != full.layers:
            whole, part = (analytic_flops(c, subject, method, settings.chunks) for c in (full, case))
            row["extrapolated"] = _extrapolate(row, case, whole / part)
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
    """Times every method in turns and keeps what it took: by method, repetition and chunk, in milliseconds.

    On the CPU the process's own time is kept beside the clock's: it does not grow while other programs run.
    """

    def __init__(self, case: Case, subject: Subject, interleaved: bool, report: Report) -> None:
        self.case = case
        self.subject = subject
        self.interleaved = interleaved
        self.report = report
        self.times: dict[str, list[list[float]]] = {method.name: [] for method in case.methods}
        self.cpu_times: dict[str, list[list[float]]] = {method.name: [] for method in case.methods}
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
        rollouts = {
            m: Rollout(self.subject, m, chunks, noise, lambda: (_now(device), time.process_time())) for m in methods
        }
        for turn in range(chunks + Rollout.extra_turns):
            for method in _rotated(methods, turn + number):
                rollouts[method].turn()
                self.done += turn > 0
                self.report(what, self.done, self.total)
        if not keep:
            return
        peak = torch.cuda.max_memory_allocated(device) - resident if device.type == "cuda" else None
        for method, rollout in rollouts.items():
            self.times[method.name].append([1000 * seconds for seconds, _ in rollout.spent])
            self.cpu_times[method.name].append([1000 * seconds for _, seconds in rollout.spent])
            self.memory[method.name] = {
                "history": rollout.history_bytes,
                "text_keys": rollout.text_key_bytes,
                "peak_beside_weights": None if peak is None or len(rollouts) > 1 else peak + rollout.text_key_bytes,
            }

    def row(self, method: Method) -> dict[str, Any]:
        """Figures of a method; the ratio pairs each turn with the baseline's beside it, so that drift cancels."""
        by_chunk = list(zip(*self.times[method.name], strict=True))
        ms = statistics.fmean(statistics.median(chunk) for chunk in by_chunk)
        ratios = _ratios(self.times, method)
        row = {
            "name": method.name,
            "title": method.title,
            "ms_per_chunk": ms,
            "ms_quartiles": [statistics.fmean(_quartile(chunk, q) for chunk in by_chunk) for q in (1, 3)],
            "ms_by_chunk": [statistics.median(chunk) for chunk in by_chunk],
            "time_ratio": statistics.median(ratios),
            "time_ratio_quartiles": [_quartile(ratios, 1), _quartile(ratios, 3)],
            "cpu_ms_per_chunk": None,
            "cpu_time_ratio": None,
            "cpu_time_ratio_quartiles": None,
            "fps": 1000 * self.case.frames_per_chunk / ms,
            "fps_with_decode": None,
            "memory": {**self.memory[method.name], "extra": self._held(method) - self._held(BASELINE)},
            "extrapolated": None,
        }
        if self.case.device.type == "cpu":
            ratios = _ratios(self.cpu_times, method)
            by_chunk = list(zip(*self.cpu_times[method.name], strict=True))
            row["cpu_ms_per_chunk"] = statistics.fmean(statistics.median(chunk) for chunk in by_chunk)
            row["cpu_time_ratio"] = statistics.median(ratios)
            row["cpu_time_ratio_quartiles"] = [_quartile(ratios, 1), _quartile(ratios, 3)]
        return row

    def _held(self, method: Method) -> int:
        used = self.memory[method.name]
        return (used["history"] or 0) + (used["text_keys"] or 0)


def _ratios(times: dict[str, list[list[float]]], method: Method) -> list[float]:
    """A method's times to the baseline's of the same repetition and chunk."""
    own, baseline = ([t for video in times[m.name] for t in video] for m in (method, BASELINE))
    return [t / base for t, base in zip(own, baseline, strict=True)]


def _extrapolate(row: dict[str, Any], case: Case, work: float) -> dict[str, float]:
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


def _own_chunks(case: Case) -> int:
    stride = int(case.vae["scale_factor_temporal"])
    latent_frames = (case.preset.video.frames - 1) // stride + 1
    return max(1, int(latent_frames // case.preset.sampler.frames_per_chunk))


def _check_memory(case: Case) -> bool:
    """Refuse what cannot fit; says whether the histories of all methods fit side by side."""
    free = available(case.device)
    two = any(isinstance(parse_guidance(m.guidance, case.preset.guidance), ClassifierFree) for m in case.methods)
    run = case.run(caches=2 if two else 1)
    require(run, free, str(case.device), loaded=False)
    if case.device.type == "cuda":  # one video at a time, so that its peak memory is its own
        return False
    needs = estimate(run)
    histories = (len(case.methods) + 1) * estimate(case.run()).history
    return free is None or needs.peak - needs.history + histories < 0.8 * free


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


def _time_decode(case: Case, report: Report) -> float:
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
