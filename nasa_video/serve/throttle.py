"""Rates: a bucket that fills evenly."""

from __future__ import annotations

import time


class Bucket:
    """Lets ``rate`` things a second pass, and up to twice as many at once."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._level = 2 * rate
        self._then = time.monotonic()

    def take(self) -> bool:
        """Whether one more may pass."""
        now = time.monotonic()
        self._level = min(2 * self.rate, self._level + (now - self._then) * self.rate)
        self._then = now
        if self._level < 1:
            return False
        self._level -= 1
        return True
