"""Sinks whose video leaves while it is made: a binary stream (`-o -`, a socket, a browser) or a media server's URL."""

from __future__ import annotations

import io
import select
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any
from urllib.parse import urlsplit

from nasa_video.errors import OutputError
from nasa_video.files import ffmpeg
from nasa_video.files.formats import RawVideo
from nasa_video.files.frames import Frames, Upscale
from nasa_video.files.metadata import to_ffmetadata, to_json
from nasa_video.files.sinks import VideoSink

# The baseline profile and one fragment a frame: a browser shows a frame as soon as the next one has come.
LOW_LATENCY_MP4 = (
    *("-c:v", "libx264", "-preset", "veryfast", "-tune", "zerolatency", "-profile:v", "baseline", "-g", "12"),
    *("-movflags", "+frag_keyframe+empty_moov+default_base_moof", "-frag_duration", "1", "-flush_packets", "1"),
    *("-f", "mp4", "pipe:1"),
)
CONTAINERS = {"rtmp": "flv", "rtmps": "flv", "srt": "mpegts", "udp": "mpegts", "tcp": "mpegts"}
_PUSHED = (
    *("-c:v", "libx264", "-preset", "veryfast", "-tune", "zerolatency", "-profile:v", "main"),
    *("-crf", "20", "-maxrate", "6M", "-bufsize", "12M", "-flush_packets", "1"),
)


class LiveSink(VideoSink):
    """One ffmpeg that is fed frame by frame; nothing is kept. `metadata` is sent at the start: later changes are not.

    `raw`: what the frames are. `target`: ffmpeg's options for encoder, container and output.
    """

    seconds_to_flush: float

    def __init__(
        self, raw: RawVideo, target: Sequence[str], metadata: Mapping[str, Any] | None = None, *, pipe: bool = False
    ) -> None:
        super().__init__(metadata)
        self._raw, self._target, self._pipe = raw, target, pipe
        self._tags = to_ffmetadata(to_json(self.metadata))
        self._process: ffmpeg.FfmpegProcess | None = None

    @property
    def running(self) -> bool:
        """Whether ffmpeg takes frames: it was started and has not ended."""
        return self._process is not None and self._process.running

    def open(self, height: int, width: int) -> None:
        """Start ffmpeg for frames of this size, so that the first `write` need not wait for it."""
        if self._process is None:
            source, filters = self._raw.source(height, width), self._raw.filters(height, width, subsampled=True)
            self._process = ffmpeg.FfmpegProcess(source, [*filters, *self._target], self._tags, pipe_stdout=self._pipe)
            self._begin()

    def _begin(self) -> None:
        """ffmpeg has just started."""

    def _wait(self) -> None:
        """Until the next frame may be sent."""

    @abstractmethod
    def _explained(self, error: OutputError) -> OutputError:
        """The error of ffmpeg, said as what it means for this target."""

    def _write(self, frames: Frames) -> None:
        self.open(*frames.shape[1:3])
        assert self._process is not None
        for frame in frames:
            self._wait()
            try:
                self._process.feed(frame.tobytes())
            except ffmpeg.FfmpegError as error:
                raise self._explained(error) from None  # Its own text may show a URL's secret.
            self.num_frames += 1

    def _finish(self) -> None:
        assert self._process is not None
        try:
            self._process.finish()
        except ffmpeg.FfmpegError as error:
            raise self._explained(error) from None

    def _abort(self) -> None:
        if self._process is not None:
            self._process.close(self.seconds_to_flush)


class StreamSink(LiveSink):
    """Sends fragmented MP4 to `target`, any binary file object with `write`, from a thread of its own.

    A slow reader slows `write` down; one that has gone away makes the next `write` or `finish` raise OutputError.
    `encoding`: ffmpeg's options for encoder, container and `pipe:1`. Other arguments as in `FfmpegSink`.
    """

    seconds_to_flush = 2.0

    def __init__(
        self,
        target: IO[bytes],
        fps: float,
        metadata: Mapping[str, Any] | None = None,
        *,
        scale: int = 1,
        upscale: Upscale = "lanczos",
        encoding: Sequence[str] = LOW_LATENCY_MP4,
    ) -> None:
        super().__init__(RawVideo(fps, scale, upscale), encoding, metadata, pipe=True)
        if target.isatty():
            raise OutputError("video does not go to a terminal; redirect the output (-o - > ball.mp4) or name a file")
        target.flush()
        self._owner = target  # It would close its raw file if it were collected.
        # Unbuffered: a buffer that could not be flushed would complain once more when the interpreter ends.
        self._out: IO[bytes] = getattr(target, "raw", target)
        self._pump = threading.Thread(target=self._send_all, name="video stream", daemon=True)
        self._failure: BaseException | None = None

    def _begin(self) -> None:
        self._pump.start()

    def _finish(self) -> None:
        super()._finish()
        self._pump.join()
        if self._failure is not None:
            raise self._explained(OutputError())

    def _abort(self) -> None:
        super()._abort()
        if self._process is not None:
            # A reader that neither reads nor goes away holds the thread: leave it behind, it ends with the program.
            self._pump.join(self.seconds_to_flush)

    def _explained(self, error: OutputError) -> OutputError:
        """If the stream's reader failed, that is why ffmpeg stopped."""
        self._pump.join(self.seconds_to_flush)
        if self._failure is None:
            return error
        return OutputError(f"the reader of the video stream went away after {self.num_frames} frames ({self._failure})")

    def _send_all(self) -> None:
        assert self._process is not None
        with self._process.stdout as source:
            try:
                while data := source.read(1 << 16):
                    self._send(data)
            except Exception as error:  # Whatever the target raises is told by the next write.
                self._failure = error
                self._process.kill()

    def _send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = self._out.write(view)
            if isinstance(self._out, io.RawIOBase):  # May take a part, or nothing (None) when it does not block.
                view = view[written or 0 :]
                if not written:
                    select.select([], [self._out], [])
            else:
                view = view[len(view) :]
        self._out.flush()


class PushSink(LiveSink):
    """Sends H.264 to a media server's `url` (RTMP, SRT, MPEG-TS over UDP or TCP), each frame when its time has come.

    The URL often holds a secret (a stream key), so no message shows more of it than scheme and host.
    `clock` and `sleep` are there for tests. Other arguments as in `FfmpegSink`.
    """

    seconds_to_flush = 5.0

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
        parts = urlsplit(url)
        if parts.scheme not in CONTAINERS or not parts.hostname:
            known = ", ".join(f"{scheme}://" for scheme in CONTAINERS)
            raise OutputError(f"cannot send to {parts.scheme}://{parts.hostname or ''}; use {known} or a file name")
        raw = RawVideo(fps, scale, upscale)
        two_seconds = ["-g", str(max(1, round(2 * raw.rate)))]
        super().__init__(raw, [*_PUSHED, *two_seconds, "-f", CONTAINERS[parts.scheme], url])
        self.shown = f"{parts.scheme}://{parts.hostname}"
        self._url = url
        self._clock, self._sleep = clock, sleep
        self._start: float | None = None

    @staticmethod
    def takes(target: str) -> bool:
        """Whether a target is a URL rather than a file name."""
        return "://" in target

    def _begin(self) -> None:
        self._start = self._clock()

    def _wait(self) -> None:
        assert self._start is not None
        self._sleep(max(0.0, self._start + self.num_frames / float(self._raw.rate) - self._clock()))

    def _explained(self, error: OutputError) -> OutputError:
        reason = str(error).replace(self._url, self.shown)
        return OutputError(f"{self.shown} took no more after {self.num_frames} frames: {reason}")
