"""Who may talk to the server: Host, Origin, token, sizes and rates; and the headers that bind the page.

A page of another site can make a browser call any address, also one of this machine. It cannot forge Host and Origin,
so they are checked on every request. Beyond loopback a token is needed as well.
"""

from __future__ import annotations

import hashlib
import ipaddress
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nasa_video.serve.settings import MAX_MESSAGE_BYTES, ServeSettings

OPEN_PATHS = frozenset({"/", "/healthz", "/login", "/docs", "/favicon.svg"})
"""What needs no token: the page itself, which holds no secret, and what it needs to ask for one."""
_SAFE = frozenset({"GET", "HEAD"})


class Guard:
    """ASGI middleware; refuses with a status and a reason, before anything of the request is used."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self.app = app
        self.token = settings.token
        self.open_paths = open_paths
        self.allowed_hosts = frozenset(name.lower() for name in (*settings.allowed_hosts, "localhost"))
        self._posts = Buckets(settings.posts_per_second)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None and scope["type"] == "websocket":
            # Before the handshake is accepted: the client sees status 403.
            await send({"type": "websocket.close", "code": 1008, "reason": refusal[1]})
        elif refusal is not None:
            await JSONResponse({"error": refusal[1]}, refusal[0], headers=_headers("'none'"))(scope, receive, send)
        elif scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            await self.app(scope, _limited(receive), _with_headers(send, headers.get("host", "")))

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if not self._allows_host(host):
            return 421, "this server is not called by that name; open it by localhost, its IP address, or --allow-host"
        changes = scope["type"] == "websocket" or scope["method"] not in _SAFE
        origin = headers.get("origin")
        if changes and origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "requests from pages of other sites are refused"
        if scope["path"] not in self.open_paths and not self._has_token(headers):
            return 401, "this server needs its token"
        if scope["type"] == "http" and changes:
            if not headers.get("content-length", "0").isdecimal():
                return 400, "the length of the body is no number"
            if int(headers.get("content-length", "0")) > MAX_MESSAGE_BYTES:
                return 413, f"a body has at most {MAX_MESSAGE_BYTES} bytes"
            if not self._posts.take(client_of(scope)):
                return 429, "too many requests; wait a second"
        return None

    def _allows_host(self, host: str) -> bool:
        """An IP address cannot be pointed elsewhere by a foreign name server, a name can."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self.allowed_hosts
        return True

    def _has_token(self, headers: Headers) -> bool:
        if self.token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and same_token(_as_sent(given.strip()), self.token):
            return True
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        name = cookie_name(self.token)
        return name in cookies and same_token(cookies[name].value, cookie_value(self.token))


def same_token(given: str, token: str) -> bool:
    """Compare without telling by the time how much was right."""
    return secrets.compare_digest(given.encode(errors="replace"), token.encode())


def cookie_name(token: str) -> str:
    """One a server: cookies are shared by all ports of a host."""
    return f"nasa-video-{hashlib.sha256(token.encode()).hexdigest()[:8]}"


def cookie_value(token: str) -> str:
    """What stands for the token in a cookie, which cannot hold every text."""
    return hashlib.sha256(f"cookie {token}".encode()).hexdigest()


def _as_sent(header: str) -> str:
    """The text of a header, whose bytes are UTF-8 and are read as Latin-1."""
    return header.encode("latin-1").decode(errors="replace")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def own_names() -> tuple[str, ...]:
    """This machine's names, under which a server beyond loopback may be called."""
    name = socket.gethostname().lower()
    return tuple(dict.fromkeys((name, name.split(".")[0], f"{name.split('.')[0]}.local")))


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


def _headers(connect: str) -> dict[str, str]:
    policy = (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )
    return {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-store",
    }


def _with_headers(send: Send, host: str) -> Send:
    # Some browsers do not count the WebSocket of the same host as 'self'. The host was checked before.
    connect = f"'self' ws://{host} wss://{host}"

    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(_headers(connect))
        await send(message)

    return sender


def _limited(receive: Receive) -> Callable[[], Awaitable[Message]]:
    """A body that is sent in pieces without a length is cut off as soon as it is too long."""
    taken = 0

    async def receiver() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > MAX_MESSAGE_BYTES:
            return {"type": "http.disconnect"}
        return message

    return receiver
