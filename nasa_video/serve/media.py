"""How pictures reach a client: a fragmented video for the browser's MediaSource, or JPEG frames for a canvas."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, cast

from nasa_video.files.frames import Frames
from nasa_video.files.live_sinks import LOW_LATENCY_MP4, StreamSink
from nasa_video.serve.outgoing import MediaPipe, Outgoing

FRAME_NUMBER = struct.Struct(">I")
"""Before every JPEG: the frame's number in the stream, from 0."""

# A cluster goes out when the next begins, so each holds one frame.
_WEBM = ("-live", "1", "-cluster_time_limit", "1", "-flush_packets", "1", "-f", "webm", "pipe:1")
_VP9 = ("-c:v", "libvpx-vp9", "-b:v", "0", "-crf", "24", "-deadline", "realtime", "-cpu-used", "8")
_NO_LOOKAHEAD = ("-lag-in-frames", "0", "-auto-alt-ref", "0", "-g", "12")
_AV1 = ("-c:v", "libsvtav1", "-preset", "12", "-crf", "30", "-g", "12")
_LOW_DELAY = ("-svtav1-params", "pred-struct=1:lookahead=0:lp=1:scd=0")


@dataclass(frozen=True)
class Kind:
    """One way to send pictures: the type that MediaSource takes, and ffmpeg's options."""

    mime: str
    encoding: Sequence[str] = ()


# The level in the MP4's name covers 1080p; what a stream really needs is in its header.
KINDS = {
    "mp4": Kind('video/mp4; codecs="avc1.42C028"', LOW_LATENCY_MP4),
    "webm": Kind('video/webm; codecs="vp09.00.40.08"', (*_VP9, *_NO_LOOKAHEAD, *_WEBM)),
    "av1": Kind('video/webm; codecs="av01.0.08M.08"', (*_AV1, *_LOW_DELAY, *_WEBM)),
    "jpeg": Kind("image/jpeg"),
}


class MediaEncoder(Protocol):
    """Takes frames, sends messages; OutputError where the encoder fails, Gone where the client has left."""

    def write(self, frames: Frames) -> None: ...

    def finish(self) -> object:
        """Send what is still held back."""

    def abort(self) -> object:
        """Stop at once."""


def open_encoder(
    kind: str, outgoing: Outgoing, size: tuple[int, int], fps: float, first_frame: int, scale: int
) -> MediaEncoder:
    """An encoder of frames of (height, width), enlarged by ``scale``; the first is number ``first_frame``."""
    if kind == "jpeg":
        return JpegEncoder(outgoing, first_frame)
    # Started now, while the first frames are being made.
    sink = VideoEncoder(outgoing, fps, scale, KINDS[kind].encoding)
    sink.open(*size)
    return sink


class VideoEncoder(StreamSink):
    """ffmpeg, whose output becomes messages until it is stopped: nothing of it follows the next encoder's."""

    def __init__(self, outgoing: Outgoing, fps: float, scale: int, encoding: Sequence[str]) -> None:
        self._pipe = MediaPipe(outgoing)
        super().__init__(cast(IO[bytes], self._pipe), fps, scale=scale, encoding=encoding)

    def abort(self) -> Path | None:
        self._pipe.stop()
        return super().abort()


class JpegEncoder:
    """One message a frame: its number, four bytes, then the JPEG. The client enlarges."""

    def __init__(self, outgoing: Outgoing, first_frame: int) -> None:
        self._outgoing = outgoing
        self._next = first_frame

    def write(self, frames: Frames) -> None:
        from PIL import Image

        for frame in frames:
            buffer = io.BytesIO()
            # Without chroma subsampling: pictures of 64 pixels would lose their colours.
            Image.fromarray(frame).save(buffer, "JPEG", quality=90, subsampling=0)
            self._outgoing.send_media(FRAME_NUMBER.pack(self._next) + buffer.getvalue())
            self._next += 1

    def finish(self) -> None:
        """Nothing is held back."""

    def abort(self) -> None:
        """Nothing to stop."""
