"""A real server on a free port, clients that speak its protocol, and Debian's Chromium."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_client import PATIENCE, Client, eventually

from nasa_video.serve.app import Server
from nasa_video.serve.settings import ServeSettings
from nasa_video.serve.states import LiveStates
from nasa_video.video.pipeline import VideoPipeline
from nasa_video.video.request import PromptState


@pytest.fixture(scope="session")
def pipelines() -> dict[str, VideoPipeline]:
    """Models that were loaded once, for all servers of these tests."""
    return {}


@pytest.fixture
def serve(model_folder: Path, pipelines: dict[str, VideoPipeline]) -> Iterator[Callable[..., Server]]:
    """Starts servers of the tiny model, with other settings where a test needs them."""
    started: list[tuple[Server, threading.Thread]] = []

    def start(host: str = "127.0.0.1", **settings: Any) -> Server:
        settings.setdefault("models", (str(model_folder),))
        server = Server(ServeSettings(**settings), host, port=0)
        server.state.registry._loaded = pipelines
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
        assert not server.state.folder.exists(), "the server's files are gone with it"


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


@pytest.fixture
def hold_second_chunk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing of a stream's second chunk is made before this is set."""
    go_on = threading.Event()
    cue_of = LiveStates.__call__

    def held(self: LiveStates, chunk: int) -> PromptState:
        if chunk == 1:
            go_on.wait(PATIENCE)
        return cue_of(self, chunk)

    monkeypatch.setattr(LiveStates, "__call__", held)
    yield go_on
    go_on.set()


def chromium() -> str | None:
    """The browser's program, if there is one."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


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


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages, with a script that runs before theirs; none of them may raise or break the policy until the end."""
    pages, complaints = [], []

    def open_(address: str, script: str = "") -> Any:
        page = browser.new_page()
        page.add_init_script(script)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: "Content Security" in message.text and complaints.append(message.text))
        page.goto(address)
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.close()
    assert not complaints
