"""The file formats a video can be written as: how frames are captured, and how a capture becomes the file.

A capture is always a fragmented MP4 with one fragment a frame, whatever the file will be: what is on disk plays even if
ffmpeg dies. Its codec is the file's own where that can be copied over; for GIF it is lossless.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from nasa_video.errors import OutputError
from nasa_video.files import ffmpeg
from nasa_video.files.frames import Upscale
from nasa_video.files.metadata import copy_gif_with_comment, to_ffmetadata

_FRAGMENTED = ("-movflags", "+frag_every_frame+empty_moov+default_base_moof", "-flush_packets", "1", "-f", "mp4")
# No B-frames and no lookahead: a frame that went in comes out at once, and is on disk.
_H264 = ("-c:v", "libx264", "-preset", "veryfast", "-tune", "zerolatency", "-profile:v", "high")
_VP9 = ("-c:v", "libvpx-vp9", "-b:v", "0", "-deadline", "realtime", "-cpu-used", "4", "-row-mt", "1")
_LOSSLESS = ("-c:v", "libx264rgb", "-qp", "0", "-preset", "ultrafast", "-tune", "zerolatency")


@dataclass(frozen=True)
class RawVideo:
    """Raw RGB frames on ffmpeg's standard input: `fps` frames a second, enlarged by the whole factor `scale`.

    OutputError unless 0 < fps <= 1000 and 1 <= scale <= 16.
    """

    fps: float
    scale: int = 1
    upscale: Upscale = "lanczos"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and 0 < self.fps <= 1000):
            raise OutputError(f"fps must be more than 0 and at most 1000, got {self.fps}")
        if not 1 <= self.scale <= 16:
            raise OutputError(f"scale must be a whole number from 1 to 16, got {self.scale}")

    @property
    def rate(self) -> Fraction:
        """Frames a second as ffmpeg takes them: 23.976… is 24000/1001."""
        return Fraction(self.fps).limit_denominator(1001)

    def source(self, height: int, width: int) -> list[str]:
        """Options of the input, for frames of (H, W). ffmpeg reads ahead, so the writer seldom waits for it."""
        size = ["-s", f"{width}x{height}", "-framerate", str(self.rate), "-thread_queue_size", "32"]
        return ["-f", "rawvideo", "-pix_fmt", "rgb24", *size, "-i", "pipe:0"]

    def filters(self, height: int, width: int, *, subsampled: bool) -> list[str]:
        """Filters from RGB (H, W) to the encoder's frames.

        Where chroma is subsampled (4:2:0) both sides must be even: an odd one gets its last column or row once more.
        Colours become BT.709, limited range, and say so: players guess otherwise, by size.
        """
        filters = []
        height, width = height * self.scale, width * self.scale
        if self.scale > 1:
            flags = {"lanczos": "lanczos+accurate_rnd+full_chroma_int", "nearest": "neighbor"}[self.upscale]
            filters.append(f"scale={width}:{height}:flags={flags}")
        if not subsampled:
            return ["-vf", ",".join(filters or ["null"])]
        right, bottom = width % 2, height % 2
        if right or bottom:
            filters.append(f"pad={width + right}:{height + bottom}")
            filters.append(f"fillborders=right={right}:bottom={bottom}:mode=smear")
        filters.append("scale=out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int")
        filters.append("format=yuv420p")
        # The parameters are set on the frames; as options of the output they do not reach every encoder.
        filters.append("setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709")
        return ["-vf", ",".join(filters)]


@dataclass(frozen=True)
class Format:
    """One kind of file. `codec`: encoder options of the capture, by quality (crf) and key frame distance in frames.

    `convert(capture, target, comment)` writes the finished file from a capture. `max_fps`: what the container can hold.
    """

    codec: Callable[[int, int], list[str]]
    convert: Callable[[Path, Path, str], None]
    subsampled: bool = True
    max_fps: float = 1000
    default_crf: int = 16

    def capture(self, crf: int, rate: Fraction, target: Path) -> list[str]:
        """Options of a capture into `target`: encoder, then fragmented MP4."""
        two_seconds = max(1, round(2 * rate))
        return [*self.codec(crf, two_seconds), *_FRAGMENTED, "-y", ffmpeg.url(target)]


def _copy_to(*muxer: str) -> Callable[[Path, Path, str], None]:
    def convert(capture: Path, target: Path, comment: str) -> None:
        inputs = ["-i", ffmpeg.url(capture), "-f", "ffmetadata", "-i", "pipe:0"]
        options = ["-map", "0:v:0", "-map_metadata", "1", "-c", "copy", *muxer, "-y", ffmpeg.url(target)]
        ffmpeg.run(["-xerror", *inputs, *options], to_ffmetadata(comment))

    return convert


def join(parts: Sequence[Path], target: Path) -> None:
    """Set MP4 files of one encoding behind one another, copied; FfmpegError where one cannot be read."""
    quoted = (ffmpeg.url(part).replace("'", r"'\''") for part in parts)
    listing = "".join(f"file '{name}'\n" for name in quoted)
    concat = ["-f", "concat", "-safe", "0", "-protocol_whitelist", "file,pipe", "-i", "pipe:0"]
    copy = ["-map", "0:v:0", "-c", "copy", "-f", "mp4", "-y", ffmpeg.url(target)]
    ffmpeg.run(["-xerror", *concat, *copy], os.fsencode(listing))


def _convert_to_gif(capture: Path, target: Path, comment: str) -> None:
    """Two passes, palette then frames: one pass with `split` would hold the whole video in memory."""
    inputs = ["-xerror", "-i", ffmpeg.url(capture)]
    # Colours from every third frame: palettegen is slow where there are many, and they last longer than that.
    one_png = ["-frames:v", "1", "-c:v", "png", "-f", "image2pipe", "pipe:1"]
    palette = ffmpeg.run([*inputs, "-vf", r"select=not(mod(n\,3)),palettegen", *one_png])
    plain = target.with_name(f"{target.name}.plain")
    # An ordered pattern stands still; diffused errors flicker from frame to frame, and take thrice the bytes.
    filters = ["-lavfi", "[0:v:0][1:v]paletteuse=dither=bayer:bayer_scale=4:diff_mode=rectangle"]
    try:
        ffmpeg.run([*inputs, "-f", "png_pipe", "-i", "pipe:0", *filters, "-f", "gif", "-y", ffmpeg.url(plain)], palette)
        with plain.open("rb") as source, target.open("wb") as out:
            copy_gif_with_comment(source, out, comment)
    finally:
        plain.unlink(missing_ok=True)


FORMATS = {
    ".mp4": Format(
        codec=lambda crf, key: [*_H264, "-crf", str(crf), "-g", str(key)],
        convert=_copy_to("-movflags", "+faststart", "-f", "mp4"),
    ),
    ".webm": Format(
        codec=lambda crf, key: [*_VP9, "-lag-in-frames", "0", "-auto-alt-ref", "0", "-crf", str(crf), "-g", str(key)],
        convert=_copy_to("-fflags", "+bitexact", "-f", "webm"),  # without it: a random identifier in each file
        default_crf=20,
    ),
    # Browsers show a GIF whose frames last less than 2/100 s at 10 frames a second.
    ".gif": Format(
        codec=lambda crf, key: [*_LOSSLESS, "-g", str(key)],
        convert=_convert_to_gif,
        subsampled=False,
        max_fps=50,
    ),
}


def format_of(path: Path) -> Format:
    """The format that the suffix of `path` names; OutputError that lists the possible ones."""
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        known = ", ".join(FORMATS)
        raise OutputError(f"cannot write {path}: -o must end in {known}, or in / for a folder of PNG frames") from None
