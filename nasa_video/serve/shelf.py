"""Keeps finished things for a while, and forgets the oldest."""

from __future__ import annotations

import threading
import time
from typing import Generic, Protocol, TypeVar


class Keepable(Protocol):
    """Something with a key that can be thrown away."""

    @property
    def key(self) -> str: ...

    @property
    def finished_at(self) -> float | None:
        """When it was finished (monotonic seconds); None while it is in use."""
        ...

    def discard(self) -> None:
        """Delete its files."""


Thing = TypeVar("Thing", bound=Keepable)


class Shelf(Generic[Thing]):
    """Things by key, with those that are in use; of the finished ones at most ``limit``, each for ``seconds``."""

    def __init__(self, limit: int, seconds: float) -> None:
        self.limit = limit
        self.seconds = seconds
        self._things: dict[str, Thing] = {}
        self._lock = threading.Lock()

    def put(self, thing: Thing) -> None:
        """Add something."""
        with self._lock:
            self._things[thing.key] = thing
        self.tidy()

    def get(self, key: str) -> Thing | None:
        """What has this key, if it is still here."""
        self.tidy()
        with self._lock:
            return self._things.get(key)

    def remove(self, key: str) -> None:
        """Throw one thing away."""
        with self._lock:
            thing = self._things.pop(key, None)
        if thing is not None:
            thing.discard()

    def tidy(self) -> None:
        """Throw away what is too old or too many."""
        now = time.monotonic()
        with self._lock:
            ages = sorted((t.finished_at, key) for key, t in self._things.items() if t.finished_at is not None)
            surplus = max(0, len(ages) - self.limit)
            old = [key for i, (since, key) in enumerate(ages) if i < surplus or now - since > self.seconds]
            things = [self._things.pop(key) for key in old]
        for thing in things:
            thing.discard()

    def clear(self) -> list[Thing]:
        """Throw everything away, and return what that was."""
        with self._lock:
            things = list(self._things.values())
            self._things.clear()
        for thing in things:
            thing.discard()
        return things
