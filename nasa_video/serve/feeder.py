"""A thread that takes finished chunks, so that an encoder or a disk never holds up the worker."""

from __future__ import annotations

import queue
import threading
from typing import Generic, Protocol, TypeVar

Item = TypeVar("Item", contravariant=True)
_IDLE_SECONDS = 0.25


class Consumer(Protocol[Item]):
    """What a feeder's thread calls."""

    def begin(self) -> None:
        """First call."""

    def consume(self, item: Item) -> None:
        """Take one item."""

    def idle(self) -> None:
        """A quarter of a second has passed without one."""

    def finish(self, error: BaseException | None) -> None:
        """Last call; ``error`` is what one of the others raised."""


class Feeder(Generic[Item]):
    """Hands items to a consumer in a thread of its own."""

    def __init__(self, name: str, consumer: Consumer[Item]) -> None:
        self._consumer = consumer
        self._items: queue.Queue[Item | None] = queue.Queue()
        self._cancelled = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def has_room(self) -> bool:
        """Whether nothing waits to be taken."""
        return self._items.empty()

    def put(self, item: Item) -> None:
        """Hand over an item; whoever looks at `has_room` before keeps the queue at one."""
        self._items.put(item)

    def end(self, *, cancel: bool = False) -> None:
        """End the thread after the items that wait, or without them; may be repeated."""
        self._cancelled |= cancel
        self._items.put(None)

    def join(self, timeout: float | None = None) -> None:
        """Wait for the thread's end, except in the thread itself."""
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._consumer.begin()
            while not self._cancelled:
                try:
                    item = self._items.get(timeout=_IDLE_SECONDS)
                except queue.Empty:
                    self._consumer.idle()
                    continue
                if item is None or self._cancelled:
                    break
                self._consumer.consume(item)
        except BaseException as problem:  # Told through `finish`: nobody looks at a thread.
            error = problem
        self._consumer.finish(error)
