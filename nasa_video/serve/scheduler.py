"""Turns: each active task makes one chunk in turn; the others wait in line."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Protocol

log = logging.getLogger(__name__)


class Busy(Exception):
    """No place, and no room to wait for one."""


class Task(Protocol):
    """Something that is made chunk by chunk. Its methods are called by the scheduler's thread, one at a time."""

    @property
    def endless(self) -> bool:
        """Whether it may be asked to make room for those who wait; this may change while it runs."""
        ...

    def ready(self) -> bool:
        """Whether it wants to make a step now: it is not paused, and its viewer needs more soon."""
        ...

    def step(self) -> bool:
        """Make a chunk; False when there is nothing left to make."""
        ...

    def fail(self, error: BaseException) -> None:
        """A step raised."""
        ...

    def expire(self) -> None:
        """It was ended because others waited and its turn was over."""
        ...

    def queued(self, place: int) -> None:
        """Its place in the line, from 1; 0 when it holds a place."""
        ...


class Scheduler:
    """A thread that gives ``max_active`` tasks turns of a chunk, and lets up to ``max_waiting`` more wait in order.

    A task that has held its place for ``turn_seconds`` and is endless gives it up when another waits.
    """

    def __init__(self, max_active: int, max_waiting: int, turn_seconds: float) -> None:
        self.max_active = max_active
        self.max_waiting = max_waiting
        self.turn_seconds = turn_seconds
        self._active: dict[Task, float] = {}
        self._waiting: deque[Task] = deque()
        self._turns: deque[Task] = deque()
        self._condition = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="nasa-video scheduler", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """End after the running step."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def counts(self) -> tuple[int, int]:
        """How many tasks hold a place, and how many wait."""
        with self._condition:
            return len(self._active), len(self._waiting)

    def submit(self, task: Task) -> None:
        """Give a task a place, or a place in the line.

        Raises:
            Busy: the line is full.
        """
        with self._condition:
            if len(self._active) >= self.max_active and len(self._waiting) >= self.max_waiting:
                raise Busy(f"{len(self._active)} are being made and {len(self._waiting)} wait; try again later")
            self._waiting.append(task)
            self._admit()
            self._condition.notify_all()

    def remove(self, task: Task) -> None:
        """Free a task's place at once, whatever runs; nothing happens where it has none."""
        with self._condition:
            self._forget(task)

    def wake(self) -> None:
        """A task may have become ready."""
        with self._condition:
            self._condition.notify_all()

    def _forget(self, task: Task) -> None:
        self._active.pop(task, None)
        for queue in (self._turns, self._waiting):
            if task in queue:
                queue.remove(task)
        self._admit()
        self._condition.notify_all()

    def _admit(self) -> None:
        moved = False
        while self._waiting and len(self._active) < self.max_active:
            task = self._waiting.popleft()
            self._active[task] = time.monotonic()
            self._turns.append(task)
            task.queued(0)
            moved = True
        newest = len(self._waiting) - 1
        for place, task in enumerate(self._waiting):
            if moved or place == newest:
                task.queued(place + 1)

    def _next(self) -> Task | None:
        """The ready task whose last turn is longest ago."""
        self._expire_one()
        for task in list(self._turns):
            if task.ready():
                self._turns.remove(task)
                self._turns.append(task)
                return task
        return None

    def _expire_one(self) -> None:
        if not self._waiting:
            return
        now = time.monotonic()
        over = [task for task, since in self._active.items() if task.endless and now - since > self.turn_seconds]
        if over:
            self._forget(over[0])
            over[0].expire()

    def _work(self) -> None:
        while True:
            with self._condition:
                while not self._stopping and (task := self._next()) is None:
                    self._condition.wait(0.5 if self._waiting else None)
                if self._stopping or task is None:
                    return
            try:
                more = task.step()
            except BaseException as error:  # Whatever one task raises must not end the others.
                self.remove(task)
                task.fail(error)
            else:
                if not more:
                    self.remove(task)
            del task  # A finished stream holds a key-value cache; it goes now, not when the next one comes.
