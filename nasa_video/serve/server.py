"""Runs the application: the address, the token, the socket."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import socket
from collections.abc import Callable

import uvicorn

from nasa_video.errors import InputError
from nasa_video.serve.app import create_app
from nasa_video.serve.hub import Hub
from nasa_video.serve.security import is_loopback, own_names
from nasa_video.serve.settings import MAX_MESSAGE_BYTES, ServeSettings


class Server(uvicorn.Server):
    """A hub behind a listening socket. ``run`` blocks until a signal; ``address`` is known before.

    Raises:
        InputError: the address cannot be listened at.
    """

    def __init__(
        self,
        settings: ServeSettings,
        host: str = "127.0.0.1",
        port: int = 8000,
        make_hub: Callable[[ServeSettings], Hub] = Hub,
    ) -> None:
        if not is_loopback(host):
            settings = dataclasses.replace(
                settings,
                token=settings.token or secrets.token_urlsafe(18),
                allowed_hosts=(*settings.allowed_hosts, *own_names()),
            )
        self.settings = settings
        self.listener = _listen(host, port)
        self.hub = make_hub(settings)
        super().__init__(
            uvicorn.Config(
                create_app(self.hub),
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="websockets-sansio",
                ws_max_size=MAX_MESSAGE_BYTES,
                # A client that vanished without a word: its place is free after at most this long.
                ws_ping_interval=2.0,
                ws_ping_timeout=8.0,
                # Compression gains nothing on video and costs a context of 300 kB a client.
                ws_per_message_deflate=False,
                timeout_graceful_shutdown=2,
                backlog=128,
            )
        )

    @property
    def address(self) -> str:
        """Where a browser finds the page, without the token."""
        host, port = self.listener.getsockname()[:2]
        host = "localhost" if is_loopback(host) or host in ("0.0.0.0", "::") else host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    @property
    def address_with_token(self) -> str:
        """The same, with the token behind a ``#``, which browsers keep to themselves."""
        return self.address if self.settings.token is None else f"{self.address}#token={self.settings.token}"

    def serve_until_stopped(self) -> None:
        """Serve; returns after Ctrl-C or a call from another thread that sets ``should_exit``."""
        try:
            # When everything has ended in order, uvicorn raises the Ctrl-C that made it end once more.
            with contextlib.suppress(KeyboardInterrupt):
                self.run([self.listener])
        finally:
            self.listener.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)  # Now: a browser that is opened at once waits in the queue instead of being refused.
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen at {host} port {port}: {reason}; choose another --port or --host") from error
    return listener
