"""A video in the making: its chunks go to a thread of its own, so that no encoder or disk ever holds up the model."""

from __future__ import annotations

import logging
import queue
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import torch

from causvid_adapter.errors import CausvidAdapterError
from nasa_video.errors import NasaVideoError
from nasa_video.serve.media import Gone
from nasa_video.video.request import PromptState, PromptStateOf

if TYPE_CHECKING:
    from nasa_video.serve.server_state import ServerState

log = logging.getLogger(__name__)
Source = TypeVar("Source")
Item = TypeVar("Item")
Reason = Literal["finished", "stopped", "turn over", "failed", "left"]
_IDLE_SECONDS = 0.25


class Consumer(Generic[Item]):
    """What a worker calls."""

    def begin(self) -> None:
        """First call."""

    @abstractmethod
    def consume(self, item: Item) -> None:
        """Take one item."""

    def idle(self) -> None:
        """A quarter of a second has passed without one."""

    @abstractmethod
    def finish(self, error: BaseException | None) -> None:
        """Last call; ``error`` is what one of the others raised."""


class Worker(Generic[Item]):
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


class Production(Generic[Source, Item]):
    """A video in the making (a `Task`): the scheduler calls for its chunks, a worker takes them on.

    Attributes:
        key: names it in URLs; whoever knows it may look at it.
        reason: why it ended, or will.
        finished_at: when it ended (monotonic seconds); None before.
    """

    def __init__(self, server: ServerState, key: str, model: str | None) -> None:
        self.key = key
        self.model = server.registry.name(model)
        self.server = server
        self.reason: Reason = "finished"
        self.finished_at: float | None = None
        self._over = False
        self._source: Iterator[Source] | None = None
        self._worker: Worker[Item] | None = None
        self._lock = threading.Lock()

    @property
    def endless(self) -> bool:
        """Whether it gives its place up when its turn is over and others wait."""
        return False

    def close(self, reason: Reason) -> None:
        """Stop as soon as may be: before the model's next call. What was made is still taken on, unless all left."""
        with self._lock:
            if self._over:
                return
            self._over = True
            self.reason = reason
            self._source = None
            worker = self._worker
        if worker is None:
            self.ended(None)
        else:
            worker.end(cancel=reason == "left")

    def join(self, timeout: float | None = None) -> None:
        """Wait until its encoder and its thread are gone; only after `close`."""
        if self._worker is not None:
            self._worker.join(timeout)

    def fail(self, error: BaseException) -> None:
        """A step raised."""
        self.note_failure(error)
        self.close("failed")

    def expire(self) -> None:
        """Its turn is over, and others wait."""
        self.close("turn over")

    def ended(self, error: BaseException | None) -> None:
        """Its worker has ended, or there was none; ``error`` is what ended it."""
        if error is not None:
            self.note_failure(error)
            self.reason = self.reason if isinstance(error, Gone) else "failed"
        with self._lock:
            self._over = True
            self._source = None
        self.finished_at = time.monotonic()

    def note_failure(self, error: BaseException) -> None:
        """Tell whoever asked for it."""

    def while_wanted(self, states: PromptStateOf) -> PromptStateOf:
        """The same states, which raise `Gone` once it is over: the model is not called again."""

        def state_of(chunk: int) -> PromptState:
            if self._over:
                raise Gone("the video was stopped")
            return states(chunk)

        return state_of


def explain_failure(error: BaseException) -> str:
    """The message of an error that a person can mend; any other one goes to the server's log."""
    if isinstance(error, NasaVideoError | CausvidAdapterError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "there is not enough memory for one more video; stop another one, or ask for fewer at once"
    log.error("a video failed", exc_info=error)
    return "something went wrong inside the server; its log says what"
