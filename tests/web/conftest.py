"""A real server on a free port, clients that speak its protocol, and Debian's Chromium."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from nasa_video.serve.server import Server
from nasa_video.serve.settings import ServeSettings

PATIENCE = 60.0
"""Seconds until a test gives up: this machine may be busy with other things."""


def eventually(what: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Wait until `what` is true, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


class Client:
    """A client of the WebSocket that is written with docs/serve.md alone."""

    def __init__(self, server: Server, **options: Any) -> None:
        self.socket: ClientConnection = connect(
            f"{server.address.replace('http', 'ws')}ws", max_size=None, compression=None, open_timeout=PATIENCE, **options
        )
        self.media: list[bytes] = []
        self.heard: list[dict[str, Any]] = []
        self.key = ""
        self.hear("hello")

    def send(self, kind: str, **content: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **content}))

    def start(self, prompt: str = "a red ball", **content: Any) -> dict[str, Any]:
        self.send("start", prompt=prompt, **content)
        started = self.hear("started")
        self.key = started["stream"]
        return started

    def hear(self, *kinds: str, seconds: float = PATIENCE) -> dict[str, Any]:
        """The next message of one of these kinds."""
        deadline = time.monotonic() + seconds
        while True:
            item = self.socket.recv(timeout=max(0.0, deadline - time.monotonic()))
            if isinstance(item, bytes):
                self.media.append(item)
                continue
            message: dict[str, Any] = json.loads(item)
            self.heard.append(message)
            if message["type"] in kinds:
                return message
            assert message["type"] != "error", message

    def watch(self, chunks: int) -> list[dict[str, Any]]:
        """Look at chunks, as fast as they come."""
        seen = []
        for _ in range(chunks):
            seen.append(self.hear("chunk"))
            self.at(seen[-1]["first_frame"] + seen[-1]["frames"])
        return seen

    def at(self, frame: int) -> None:
        self.send("position", stream=self.key, frame=frame)

    def nothing_for(self, seconds: float) -> bool:
        """Whether no chunk comes for so long."""
        try:
            self.hear("chunk", seconds=seconds)
        except TimeoutError:
            return True
        return False

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def serve(model_folder: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers of the tiny model, with other settings where a test needs them."""
    started: list[tuple[Server, threading.Thread]] = []

    def start(host: str = "127.0.0.1", **settings: Any) -> Server:
        settings.setdefault("models", (str(model_folder),))
        server = Server(ServeSettings(**settings), host, port=0)
        thread = threading.Thread(target=server.serve_until_stopped, daemon=True)
        thread.start()
        started.append((server, thread))
        eventually(lambda: server.started)
        return server

    yield start
    for server, thread in started:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert not server.hub.folder.exists(), "the server's files are gone with it"


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    return serve()


@pytest.fixture
def client_of() -> Iterator[Callable[..., Client]]:
    with contextlib.ExitStack() as stack:

        def make(server: Server, **options: Any) -> Client:
            client = Client(server, **options)
            stack.callback(client.close)
            return client

        yield make


@pytest.fixture
def client(server: Server, client_of: Callable[..., Client]) -> Client:
    return client_of(server)


def chromium() -> str | None:
    """The browser's program, if there is one."""
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Chromium context without a window."""
    executable = chromium()
    if executable is None:
        message = "no Chromium: apt-get install chromium, or run scripts/run_tests.py as root on Debian"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("browser"),
            executable_path=executable,
            headless=True,
            args=["--no-sandbox", "--disable-gpu", *quiet],
            viewport={"width": 1200, "height": 900},
            accept_downloads=True,
        )
        context.set_default_timeout(PATIENCE * 1000)
        yield context
        context.close()
