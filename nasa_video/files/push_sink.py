"""Sends a video to a media server while it is made: RTMP, SRT, or MPEG-TS over UDP or TCP."""

from __future__ import annotations

import time
from collections.abc import Callable
from urllib.parse import urlsplit

from nasa_video.errors import OutputError
from nasa_video.files import ffmpeg
from nasa_video.files.base import BaseSink, check_scale
from nasa_video.files.formats import frame_rate, picture_filters, raw_input
from nasa_video.files.frames import Frames, Upscale
from nasa_video.files.metadata import to_ffmetadata, to_json

CONTAINERS = {"rtmp": "flv", "rtmps": "flv", "srt": "mpegts", "udp": "mpegts", "tcp": "mpegts"}
_ENCODER = ("-c:v", "libx264", "-preset", "veryfast", "-tune", "zerolatency", "-profile:v", "main")
_RATE = ("-crf", "20", "-maxrate", "6M", "-bufsize", "12M")
_SECONDS_TO_FLUSH = 5.0


def is_push_url(target: str) -> bool:
    """Whether a target is a URL rather than a file name."""
    return "://" in target


class PushSink(BaseSink):
    """Sends H.264 to `url` at the pace of the clock: a frame is not sent before its time.

    The URL often holds a secret (a stream key), so no message shows more of it than scheme and host.
    `clock` and `sleep` are there for tests. Other arguments as in `FfmpegSink`.
    """

    def __init__(
        self,
        url: str,
        fps: float,
        *,
        scale: int = 1,
        upscale: Upscale = "lanczos",
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        super().__init__()
        parts = urlsplit(url)
        if parts.scheme not in CONTAINERS or not parts.hostname:
            known = ", ".join(f"{scheme}://" for scheme in CONTAINERS)
            raise OutputError(f"cannot send to {parts.scheme}://{parts.hostname or ''}; use {known} or a file name")
        self.shown = f"{parts.scheme}://{parts.hostname}"
        self._url = url
        self._container = CONTAINERS[parts.scheme]
        self._rate = frame_rate(fps)
        self._scale, self._upscale = check_scale(scale), upscale
        self._clock, self._sleep = clock, sleep
        self._start: float | None = None
        self._process: ffmpeg.FfmpegProcess | None = None

    def _write(self, frames: Frames) -> None:
        if self._process is None:
            self._process = self._open(*frames.shape[1:3])
            self._start = self._clock()
        assert self._start is not None
        for frame in frames:
            self._sleep(max(0.0, self._start + self.num_frames / float(self._rate) - self._clock()))
            try:
                self._process.feed(frame.tobytes())
            except ffmpeg.FfmpegError as error:
                raise self._explained(error) from None
            self.num_frames += 1

    def _open(self, height: int, width: int) -> ffmpeg.FfmpegProcess:
        filters = picture_filters(height, width, self._scale, self._upscale, subsampled=True)
        two_seconds = ["-g", str(max(1, round(2 * self._rate)))]
        target = [*filters, *_ENCODER, *_RATE, *two_seconds, "-flush_packets", "1", "-f", self._container, self._url]
        return ffmpeg.FfmpegProcess(raw_input(height, width, self._rate), target, to_ffmetadata(to_json({})))

    def _finish(self) -> None:
        assert self._process is not None
        try:
            self._process.finish()
        except ffmpeg.FfmpegError as error:
            raise self._explained(error) from None

    def _abort(self) -> None:
        if self._process is not None:
            self._process.close(_SECONDS_TO_FLUSH)

    def _explained(self, error: OutputError) -> OutputError:
        reason = str(error).replace(self._url, self.shown)
        return OutputError(f"{self.shown} took no more after {self.num_frames} frames: {reason}")
