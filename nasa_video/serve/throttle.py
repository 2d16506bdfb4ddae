"""Rates: a bucket that fills evenly, and one for every client address."""

from __future__ import annotations

import ipaddress
import time

from starlette.types import Scope


class Bucket:
    """Lets ``rate`` things a second pass, and up to twice as many at once."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._level = 2 * rate
        self._then = time.monotonic()

    def take(self) -> bool:
        """Whether one more may pass."""
        self._fill()
        if self._level < 1:
            return False
        self._level -= 1
        return True

    @property
    def full(self) -> bool:
        """Whether it is as good as new."""
        self._fill()
        return self._level >= 2 * self.rate

    def _fill(self) -> None:
        now = time.monotonic()
        self._level = min(2 * self.rate, self._level + (now - self._then) * self.rate)
        self._then = now


class Buckets:
    """A bucket for each client, so that nobody uses up another's; at most ``limit``, whoever comes.

    Only buckets that are full again are dropped, so that forgetting gives nobody more. While all of them are in use,
    clients without one share one.
    """

    def __init__(self, rate: float, limit: int = 1024) -> None:
        self.rate = rate
        self.limit = limit
        self._of: dict[str, Bucket] = {}
        self._shared = Bucket(rate)

    def __len__(self) -> int:
        return len(self._of)

    def take(self, client: str) -> bool:
        """Whether one more of a client's may pass."""
        if client not in self._of and len(self._of) >= self.limit:
            self._of = {name: bucket for name, bucket in self._of.items() if not bucket.full}
            if len(self._of) >= self.limit:
                return self._shared.take()
        return self._of.setdefault(client, Bucket(self.rate)).take()


def client_of(scope: Scope) -> str:
    """The address that a request came from; of IPv6 the network that one customer is given, in which all are theirs."""
    host: str = (scope.get("client") or ("", 0))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    return host if address.ipv4_mapped else str(ipaddress.IPv6Network((address.packed, 64), strict=False))
