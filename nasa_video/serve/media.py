"""How messages and frames reach a client: one bounded queue; a fragmented video for MediaSource, or JPEG frames."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import struct
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

from nasa_video.files.frames import Frames
from nasa_video.files.live_sinks import LOW_LATENCY_MP4, StreamSink

LIMIT_BYTES = 4 * 1024 * 1024
"""Of media that may wait for one client: a slow one slows only its own stream."""
FRAME_NUMBER = struct.Struct(">I")
"""Before every JPEG: the frame's number in the stream, from 0."""

# A cluster goes out when the next begins, so each holds one frame.
_WEBM = ("-live", "1", "-cluster_time_limit", "1", "-flush_packets", "1", "-f", "webm", "pipe:1")
_VP9 = ("-c:v", "libvpx-vp9", "-b:v", "0", "-crf", "24", "-deadline", "realtime", "-cpu-used", "8")
_NO_LOOKAHEAD = ("-lag-in-frames", "0", "-auto-alt-ref", "0", "-g", "12")
_AV1 = ("-c:v", "libsvtav1", "-preset", "12", "-crf", "30", "-g", "12")
_LOW_DELAY = ("-svtav1-params", "pred-struct=1:lookahead=0:lp=1:scd=0")


class Gone(Exception):
    """The client has left, so nothing can be sent to it."""


class Outgoing:
    """A queue of text (str) and media (bytes) messages that an event loop empties."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[str | bytes] = deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()
        self._available = asyncio.Event()

    def say(self, kind: str, **content: Any) -> None:
        """Queue a JSON message; never waits, and does nothing for a client that has left."""
        with contextlib.suppress(Gone):
            self._put(json.dumps({"type": kind, **content}))

    def send_media(self, data: bytes, stopped: threading.Event | None = None) -> None:
        """Queue a binary message; waits while too much is queued.

        Raises:
            Gone: the client has left or its sender was stopped, now or while this waited.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or _is_set(stopped) or self._bytes < LIMIT_BYTES)
            if _is_set(stopped):
                raise Gone("another encoder has taken over")
            self._put(data)

    def stop(self, sender: threading.Event) -> None:
        """Let nothing more through of whoever sends with this event."""
        with self._changed:
            sender.set()
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether the client has left."""
        return self._closed

    async def get(self) -> str | bytes | None:
        """The next message; None after `close`."""
        while True:
            self._available.clear()
            with self._changed:
                if self._closed:
                    return None
                if self._items:
                    item = self._items.popleft()
                    self._bytes -= len(item)
                    self._changed.notify_all()
                    return item
            await self._available.wait()

    async def drained(self) -> None:
        """Wait until little is queued: who answers a client that reads nothing would answer without end."""
        while len(self._items) > 1000 and not self._closed:
            await asyncio.sleep(0.05)

    def close(self) -> None:
        """Nothing goes out any more; whoever waits to send gets `Gone`."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._bytes = 0
            self._changed.notify_all()
        self._wake()

    def _put(self, item: str | bytes) -> None:
        with self._changed:
            if self._closed:
                raise Gone("the client has left")
            self._items.append(item)
            self._bytes += len(item)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # The loop has ended, and with it the client.
            self._loop.call_soon_threadsafe(self._available.set)


def _is_set(event: threading.Event | None) -> bool:
    return event is not None and event.is_set()


class MediaPipe(io.RawIOBase):
    """The file that an encoder writes to: every write becomes a binary message."""

    def __init__(self, outgoing: Outgoing) -> None:
        super().__init__()
        self._outgoing = outgoing
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Whatever is still written is dropped: `write` raises `Gone`, also one that waits."""
        self._outgoing.stop(self._stopped)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = bytes(data)
        self._outgoing.send_media(content, self._stopped)
        return len(content)


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
        self._messages = MediaPipe(outgoing)
        super().__init__(cast(IO[bytes], self._messages), fps, scale=scale, encoding=encoding)

    def abort(self) -> Path | None:
        self._messages.stop()
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
