"""Fragmented MP4 into a binary stream while the frames are made: `-o -`, a socket, a browser's MediaSource."""

from __future__ import annotations

import io
import select
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

from nasa_video.errors import OutputError
from nasa_video.files import ffmpeg
from nasa_video.files.base import BaseSink, check_scale
from nasa_video.files.formats import frame_rate, picture_filters, raw_input
from nasa_video.files.frames import Frames, Upscale
from nasa_video.files.metadata import to_ffmetadata, to_json

# The baseline profile and one fragment a frame: a browser shows a frame as soon as the next one has come.
LOW_LATENCY_MP4 = (
    *("-c:v", "libx264", "-preset", "veryfast", "-tune", "zerolatency", "-profile:v", "baseline", "-g", "12"),
    *("-movflags", "+frag_keyframe+empty_moov+default_base_moof", "-frag_duration", "1", "-flush_packets", "1"),
    *("-f", "mp4", "pipe:1"),
)
_SECONDS_TO_FLUSH = 2.0


class StreamSink(BaseSink):
    """Sends fragmented MP4 to `target`, any binary file object with `write`, from a thread of its own.

    A slow reader slows `write` down; one that has gone away makes the next `write` or `finish` raise OutputError.
    `metadata` is sent at the start, so later changes have no effect. `encoding`: ffmpeg's options for encoder,
    container and `pipe:1`. Other arguments as in `FfmpegSink`.
    """

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
        super().__init__(metadata)
        if target.isatty():
            raise OutputError("video does not go to a terminal; redirect the output (-o - > ball.mp4) or name a file")
        target.flush()
        self._owner = target  # It would close its raw file if it were collected.
        # Unbuffered: a buffer that could not be flushed would complain once more when the interpreter ends.
        self._target: IO[bytes] = getattr(target, "raw", target)
        self._rate = frame_rate(fps)
        self._scale, self._upscale = check_scale(scale), upscale
        self._tags = to_ffmetadata(to_json(self.metadata))
        self._encoding = encoding
        self._process: ffmpeg.FfmpegProcess | None = None
        self._pump = threading.Thread(target=self._send_all, name="video stream", daemon=True)
        self._failure: BaseException | None = None

    @property
    def running(self) -> bool:
        """Whether ffmpeg takes frames: it was started and has not ended."""
        return self._process is not None and self._process.running

    def open(self, height: int, width: int) -> None:
        """Start ffmpeg for frames of this size, so that the first `write` need not wait for it."""
        if self._process is None:
            filters = picture_filters(height, width, self._scale, self._upscale, subsampled=True)
            source = raw_input(height, width, self._rate)
            self._process = ffmpeg.FfmpegProcess(source, [*filters, *self._encoding], self._tags, pipe_stdout=True)
            self._pump.start()

    def _write(self, frames: Frames) -> None:
        self.open(*frames.shape[1:3])
        assert self._process is not None
        for frame in frames:
            try:
                self._process.feed(frame.tobytes())
            except ffmpeg.FfmpegError as error:
                raise self._explained(error) from error
            self.num_frames += 1

    def _finish(self) -> None:
        assert self._process is not None
        try:
            self._process.finish()
        except ffmpeg.FfmpegError as error:
            raise self._explained(error) from error
        self._pump.join()
        if self._failure is not None:
            raise self._explained(OutputError())

    def _abort(self) -> None:
        if self._process is not None:
            self._process.close(_SECONDS_TO_FLUSH)
            # A reader that neither reads nor goes away holds the thread: leave it behind, it ends with the program.
            self._pump.join(_SECONDS_TO_FLUSH)

    def _explained(self, error: OutputError) -> OutputError:
        """If the stream's reader failed, that is why ffmpeg stopped."""
        self._pump.join(_SECONDS_TO_FLUSH)
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
            written = self._target.write(view)
            if isinstance(self._target, io.RawIOBase):  # May take a part, or nothing (None) when it does not block.
                view = view[written or 0 :]
                if not written:
                    select.select([], [self._target], [])
            else:
                view = view[len(view) :]
        self._target.flush()
