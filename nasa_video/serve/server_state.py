"""Everything that one server shares: models, scheduler, streams, jobs, files."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from nasa_video.serve.jobs import Job
from nasa_video.serve.media import Outgoing
from nasa_video.serve.protocol import ServedRequest, Start
from nasa_video.serve.registry import ModelRegistry
from nasa_video.serve.scheduler import Scheduler
from nasa_video.serve.settings import ServeSettings
from nasa_video.serve.stream import LiveStream

_TIDY_SECONDS = 10.0
_SECONDS_TO_END = 5.0


class Expiring(Protocol):
    """What a store keeps for a while after its end."""

    @property
    def key(self) -> str: ...

    @property
    def finished_at(self) -> float | None:
        """When it was finished (monotonic seconds); None while it is in use."""

    def join(self, timeout: float) -> None:
        """Wait until its encoder and its thread are gone; only after `discard`."""

    def discard(self) -> None:
        """End it, and delete its files."""


Item = TypeVar("Item", bound=Expiring)


class ExpiringStore(Generic[Item]):
    """Items by key, with those that are in use; of the finished ones at most ``limit``, each for ``seconds``."""

    def __init__(self, limit: int, seconds: float) -> None:
        self.limit = limit
        self.seconds = seconds
        self._items: dict[str, Item] = {}
        self._lock = threading.Lock()

    def put(self, item: Item) -> None:
        """Add something."""
        with self._lock:
            self._items[item.key] = item
        self.tidy()

    def get(self, key: str) -> Item | None:
        """What has this key, if it is still here."""
        self.tidy()
        with self._lock:
            return self._items.get(key)

    def values(self) -> list[Item]:
        """Everything that is still here."""
        with self._lock:
            return list(self._items.values())

    def tidy(self) -> None:
        """Throw away what is too old or too many."""
        now = time.monotonic()
        with self._lock:
            ages = sorted((item.finished_at, key) for key, item in self._items.items() if item.finished_at is not None)
            surplus = max(0, len(ages) - self.limit)
            old = [key for i, (since, key) in enumerate(ages) if i < surplus or now - since > self.seconds]
        self.remove(*old)

    def remove(self, *keys: str) -> None:
        """Throw these away."""
        with self._lock:
            items = [item for key in keys if (item := self._items.pop(key, None)) is not None]
        for item in items:
            item.discard()

    def clear(self) -> list[Item]:
        """Throw everything away, and return what that was."""
        items = self.values()
        self.remove(*(item.key for item in items))
        return items


class ServerState:
    """State of one server; `open` and `close` bracket its life."""

    preview: dict[str, Any] | None = None
    """What every viewer is shown, where that is fixed."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.registry = ModelRegistry(settings)
        self.scheduler = Scheduler(settings.max_streams, settings.max_waiting, settings.turn_seconds)
        self.streams: ExpiringStore[LiveStream] = ExpiringStore(settings.max_results, settings.keep_seconds)
        self.jobs: ExpiringStore[Job] = ExpiringStore(settings.max_results, settings.keep_seconds)
        self.sessions = 0
        self.folder = Path(tempfile.mkdtemp(prefix="nasa-video-serve-"))
        self._closing = threading.Event()
        self._tidier = threading.Thread(target=self._tidy, name="nasa-video tidier", daemon=True)

    def warm_up(self) -> None:
        """Load the first model and make a chunk with it, so that the first viewer does not wait for that.

        Raises:
            InputError: its weights are missing.
        """
        pipeline = self.registry.get(self.registry.name(None))
        next(pipeline.stream("a first picture", frames=pipeline.frames_until(1)))

    def open(self) -> None:
        """Start the scheduler."""
        self.scheduler.start()
        self._tidier.start()

    def close(self) -> None:
        """End everything and delete its files."""
        self._closing.set()
        self.scheduler.stop()
        deadline = time.monotonic() + _SECONDS_TO_END
        ended: list[LiveStream | Job] = [*self.streams.clear(), *self.jobs.clear()]
        for item in ended:
            item.join(max(0.0, deadline - time.monotonic()))
        shutil.rmtree(self.folder, ignore_errors=True)

    def new_stream(self, start: Start, outgoing: Outgoing) -> LiveStream:
        """Begin a stream, or let it wait.

        Raises:
            InputError: a model that is not offered.
            Busy: too many wait.
        """

        def on_end(stream: LiveStream) -> None:
            self.scheduler.remove(stream)
            self.streams.tidy()

        stream = self.make_stream(secrets.token_urlsafe(16), start, outgoing, on_end)
        self.scheduler.submit(stream)
        self.streams.put(stream)
        return stream

    def make_stream(
        self, key: str, start: Start, outgoing: Outgoing, on_end: Callable[[LiveStream], None]
    ) -> LiveStream:
        """The stream of a client."""
        return LiveStream(self, key, start, outgoing, on_end)

    def new_job(self, request: ServedRequest) -> Job:
        """Begin a job, or let it wait; errors as `new_stream`, and what its request cannot ask of the model."""
        job = Job(self, secrets.token_urlsafe(16), request)
        self.scheduler.submit(job)
        self.jobs.put(job)
        return job

    def cancel(self, job: Job) -> None:
        """Free a job's place and stop it."""
        self.scheduler.remove(job)
        job.close("left")

    def _tidy(self) -> None:
        while not self._closing.wait(_TIDY_SECONDS):
            self.streams.tidy()
            self.jobs.tidy()
