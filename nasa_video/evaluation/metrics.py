"""Measures that need no learned weights, and their registry: a new one is one class.

    @register_measure
    class Red(Measure):
        metrics = (Metric(name="red", title="red"),)
        def __call__(self, frames): return {"red": float(frames[..., 0].mean())}

It is then a column of ``eval quality`` and of every benchmark's report.
"""

# F frames, H height, W width; frames are uint8 (F, H, W, 3) RGB

from __future__ import annotations

import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from nasa_video.errors import InputError, NasaVideoError
from nasa_video.evaluation.results import Metric
from nasa_video.files import ffmpeg
from nasa_video.files.frames import Frames, check_frames
from nasa_video.files.images import is_image, read_image
from nasa_video.files.source import VideoSource, probe

Luma = NDArray[np.float32]
# ITU-R BT.601, as video codecs weigh the channels of standard definition.
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


class Measure:
    """One or more numbers of a still or a video.

    Attributes:
        metrics: a column for each number.
    """

    metrics: ClassVar[tuple[Metric, ...]]

    def __call__(self, frames: Frames) -> Mapping[str, float]:
        """A value for every metric, by name; frames are (F, H, W, 3)."""
        raise NotImplementedError


MEASURES: dict[str, Measure] = {}
"""Every registered measure by the name of its class."""


def register_measure(measure: type[Measure]) -> type[Measure]:
    """Make a measure known to ``eval quality`` and to every benchmark; a decorator.

    Raises:
        InputError: it has no metrics, or one whose name another has.
    """
    others = {one.name for name, known in MEASURES.items() if name != measure.__name__ for one in known.metrics}
    own = [metric.name for metric in getattr(measure, "metrics", ())]
    if not own or others & {*own}:
        raise InputError(f"a measure needs metrics with names of their own, got {own}; there are {sorted(others)}")
    MEASURES[measure.__name__] = measure()
    return measure


def measure(frames: Frames) -> dict[str, float]:
    """Every registered measure of a still or a video of at least 3 x 3 pixels.

    Raises:
        NasaVideoError: a measure gave what is no number.
    """
    values: dict[str, float] = {}
    for name, one in MEASURES.items():
        found = {key: float(value) for key, value in one(frames).items()}
        if wrong := [key for key, value in found.items() if not math.isfinite(value)]:
            raise NasaVideoError(f"the measure {name} gave no number for {', '.join(wrong)}")
        values |= found
    return values


def measured_metrics() -> tuple[Metric, ...]:
    """The columns of every registered measure."""
    return tuple(metric for one in MEASURES.values() for metric in one.metrics)


def read_stills(path: Path, count: int | None = None) -> Frames:
    """Up to ``count`` frames (F, H, W, 3) of a video, evenly spaced (None: all); or the one of an image file.

    Raises:
        InputError: it cannot be read.
    """
    if is_image(path):
        return read_image(path)[None]
    frames = VideoSource(path).read()
    if count is None:
        return frames
    wanted = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return np.ascontiguousarray(frames[wanted])


# --- quality


@dataclass(frozen=True)
class Quality:
    """Means over a video.

    Attributes:
        luma: brightness, 0 to 255.
        sharpness: standard deviation of the Laplacian over that of the luma, noise taken out of the former; without
            a unit. Unlike the Laplacian's variance it does not fall with brightness or rise with noise.
        noise: standard deviation of additive noise, in grey levels (J. Immerkaer, CVIU 64, 1996).
        colourfulness: Hasler and Suesstrunk, SPIE 5007, 2003; 0 is grey.
        flicker: mean absolute change of a frame's mean luma from frame to frame, in grey levels.
        motion: mean absolute change of a pixel's luma from frame to frame, flicker taken out, in grey levels.
    """

    luma: float
    sharpness: float
    noise: float
    colourfulness: float
    flicker: float
    motion: float


@register_measure
class QualityMeasure(Measure):
    """The measures of :class:`Quality`."""

    metrics = (
        Metric(name="sharpness", title="sharpness"),
        Metric(name="noise", title="noise", better="lower"),
        Metric(name="flicker", title="flicker", better="lower"),
        Metric(name="motion", title="motion", better="neither"),
        Metric(name="colourfulness", title="colourfulness", better="neither", digits=1),
        Metric(name="luma", title="mean luma", better="neither", digits=1),
    )

    def __call__(self, frames: Frames) -> Mapping[str, float]:
        return dataclasses.asdict(quality(frames))


def quality(frames: Frames) -> Quality:
    """Measure a video of at least one frame of at least 3 x 3 pixels."""
    pictures = check_frames(frames).astype(np.float32)
    luma = pictures @ _LUMA
    if min(luma.shape[1:]) < 3:
        raise ValueError(f"frames must be at least 3 x 3 pixels, got {luma.shape[2]} x {luma.shape[1]}")
    noise = _noise(luma)
    means = luma.mean(axis=(1, 2))
    steps = np.diff(luma - means[:, None, None], axis=0)
    return Quality(
        luma=float(luma.mean()),
        sharpness=_sharpness(luma, noise),
        noise=float(noise.mean()),
        colourfulness=_colourfulness(pictures),
        flicker=float(np.abs(np.diff(means)).mean()) if len(means) > 1 else 0.0,
        motion=float(np.abs(steps).mean()) if len(means) > 1 else 0.0,
    )


def _laplacian(luma: Luma) -> Luma:
    inner = luma[:, 1:-1, 1:-1]
    return luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:] - 4 * inner


def _noise(luma: Luma) -> NDArray[np.float32]:
    """Noise of each frame, (F,): the mean of a kernel that is blind to edges and ramps."""
    vertical = luma[:, :-2] - 2 * luma[:, 1:-1] + luma[:, 2:]
    both = vertical[..., :-2] - 2 * vertical[..., 1:-1] + vertical[..., 2:]
    estimate: NDArray[np.float32] = np.abs(both).mean(axis=(1, 2)) * np.sqrt(np.pi / 2) / 6
    return estimate


def _sharpness(luma: Luma, noise: NDArray[np.float32]) -> float:
    contrast = luma.var(axis=(1, 2))
    # White noise of variance s^2 has a Laplacian of variance 20 s^2 (the sum of the kernel's squares).
    edges = np.maximum(_laplacian(luma).var(axis=(1, 2)) - 20 * noise**2, 0)
    flat = contrast < 1e-3
    return float(np.where(flat, 0, np.sqrt(edges / np.where(flat, 1, contrast))).mean())


def _colourfulness(pictures: NDArray[np.float32]) -> float:
    red, green, blue = np.moveaxis(pictures, -1, 0)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(axis=(1, 2)), yellow_blue.std(axis=(1, 2)))
    offset = np.hypot(red_green.mean(axis=(1, 2)), yellow_blue.mean(axis=(1, 2)))
    return float((spread + 0.3 * offset).mean())


# --- likeness to a reference, measured by ffmpeg

# Infinite for equal pictures; JSON has no infinity, and no codec comes near this.
PSNR_OF_EQUALS = 100.0
_SMALLEST = 16


@dataclass(frozen=True)
class Likeness:
    """Means over the frames.

    Attributes:
        ssim: structural similarity over all planes, 1 for equal pictures (Z. Wang et al., IEEE TIP 13, 2004).
        psnr: peak signal-to-noise ratio over all planes in dB, at most 100.
        vmaf: Video Multi-Method Assessment Fusion, 0 to 100, with libvmaf's default model; None where ffmpeg has no
            libvmaf. It was trained on films of at least 1080 lines: on small pictures only comparisons mean something.
    """

    ssim: float
    psnr: float
    vmaf: float | None


def likeness(path: Path, reference: Path) -> Likeness:
    """Compare a video with its reference, frame by frame.

    Raises:
        InputError: one cannot be read, or they differ in size or length.
    """
    own, other = probe(path), probe(reference)
    for name, one, two in (
        ("size", f"{own.width} x {own.height}", f"{other.width} x {other.height}"),
        ("number of frames", own.frames, other.frames),
    ):
        if one != two:
            raise InputError(
                f"{path} and its reference {reference} must have one {name}, got {one} and {two}; cut or scale one"
            )
    if min(own.width, own.height) < _SMALLEST:
        raise InputError(f"pictures must be at least {_SMALLEST} x {_SMALLEST} to be compared, got {one}")
    vmaf = _vmaf(path, reference) if has_vmaf() else None
    return Likeness(
        _mean(_frame_values("ssim", "All", path, reference)),
        _mean([min(value, PSNR_OF_EQUALS) for value in _frame_values("psnr", "psnr_avg", path, reference)]),
        vmaf,
    )


@cache
def has_vmaf() -> bool:
    """Whether the ffmpeg binary has libvmaf."""
    return any(line.split()[1:2] == ["libvmaf"] for line in ffmpeg.run(["-filters"]).decode().splitlines())


def _frame_values(name: str, key: str, path: Path, reference: Path) -> list[float]:
    """What a filter says of each frame, from its statistics on standard output."""
    said = _compare(f"{name}=stats_file=-", path, reference).decode()
    return [float(value) for value in re.findall(rf"\b{key}:(inf|[\d.]+)", said)]


def _vmaf(path: Path, reference: Path) -> float:
    with tempfile.TemporaryDirectory(prefix="nasa-video-vmaf-") as folder:
        log = Path(folder, "vmaf.json")
        escaped = re.sub(r"([\\':,;\[\]])", r"\\\\\\\1", str(log))
        _compare(f"libvmaf=log_fmt=json:log_path={escaped}:n_threads=2", path, reference)
        return float(json.loads(log.read_text(encoding="utf-8"))["pooled_metrics"]["vmaf"]["mean"])


def _compare(comparison: str, path: Path, reference: Path) -> bytes:
    # Both clocks start at 0 with one tick a frame: files of other frame rates are compared frame by frame too.
    clock = "setpts=N,settb=1/25,format=yuv420p"
    graph = f"[0:v]{clock}[own];[1:v]{clock}[other];[own][other]{comparison}"
    return ffmpeg.run(["-i", ffmpeg.url(path), "-i", ffmpeg.url(reference), "-lavfi", graph, "-f", "null", "-"])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
