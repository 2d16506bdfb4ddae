"""What goes to one client, in order, from any thread; bounded, so that a slow client slows only its own stream."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
from collections import deque
from typing import Any

LIMIT_BYTES = 4 * 1024 * 1024


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
