"""Chromium comes through a tunnel, from another site, and among many others."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_client import PATIENCE
from live_page import data, play, saved, until, wait_for_frame

from nasa_video.files.source import read_frames
from nasa_video.serve.app import Server


@contextlib.contextmanager
def tunnel(target: int) -> Iterator[int]:
    """What `ssh -L PORT:localhost:TARGET` does: bytes from another port to the server's and back."""
    listener = socket.create_server(("127.0.0.1", 0))
    ends: list[socket.socket] = [listener]

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(1 << 16):
                sink.sendall(part)
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", target))
                ends.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


def test_it_works_through_a_tunnel(server: Server, open_page: Any, tmp_path: Path) -> None:
    with tunnel(server.listener.getsockname()[1]) as port:
        page = open_page(f"http://localhost:{port}/")
        play(page)
        wait_for_frame(page, 20)
        page.click("#stop")
        page.wait_for_selector("body[data-state=ended]")
        video = saved(page, "#save-video", tmp_path / "shown.mp4")
        assert len(read_frames(video)) == int(data(page, "frames"))


ATTACK = """<!doctype html><title>waiting</title><script>
const heard = new Promise((tell) => {
  const socket = new WebSocket("SERVER".replace("http", "ws") + "ws");
  socket.onopen = () => tell("open");
  socket.onclose = () => tell("refused");
});
const tried = [
  fetch("SERVERmodels").then(() => "read", () => "refused"),
  fetch("SERVERv1/videos", { method: "POST", body: '{"prompt": "a ball"}' }).then(() => "read", () => "refused"),
  fetch("SERVERv1/videos", { method: "POST", body: '{"prompt": "a ball"}', mode: "no-cors" })
    .then(() => "sent", () => "refused"),
  heard,
];
Promise.all(tried).then((all) => (document.title = all.join(" ")));
</script><iframe src="SERVER"></iframe>"""


@pytest.fixture
def other_site(server: Server) -> Iterator[str]:
    """The address of a page of another origin that tries what it can."""
    page = ATTACK.replace("SERVER", server.address).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *arguments: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield f"http://localhost:{site.server_address[1]}/"
        site.shutdown()


def test_a_page_of_another_site_gets_nothing(server: Server, browser: Any, other_site: str) -> None:
    page = browser.new_page()
    page.goto(other_site)
    until(page, "document.title !== 'waiting'")
    assert page.title() == "refused refused refused refused"
    assert server.state.sessions == 0
    assert not server.state.jobs.values(), "what it could send unseen has made nothing"
    assert page.frames[1].locator("#start").count() == 0, "nor can the page be framed"
    page.close()


def test_a_page_among_twenty_clients(serve: Callable[..., Server], open_page: Any, client_of: Any) -> None:
    server = serve(max_streams=4, turn_seconds=1.0)
    finished: list[str] = []

    def visit() -> None:
        client = client_of(server)
        client.send("start", prompt="a ball", media=["jpeg"], frames=21)
        finished.append(client.hear("ended")["reason"])

    visitors = [threading.Thread(target=visit) for _ in range(19)]
    for visitor in visitors:
        visitor.start()
    page = open_page(server.address)
    play(page)
    wait_for_frame(page, 15)
    for visitor in visitors:
        visitor.join(PATIENCE)
    assert finished == ["finished"] * 19
