"""How near a video is to a reference: VMAF, SSIM and PSNR, measured by ffmpeg."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nasa_video.errors import InputError
from nasa_video.files import ffmpeg
from nasa_video.files.source import probe

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
