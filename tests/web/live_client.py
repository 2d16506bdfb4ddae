"""A client that speaks the server's protocol, written from docs/reference/live_protocol.md alone."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
from websockets.sync.client import ClientConnection, connect

from nasa_video.serve.app import Server

PATIENCE = 60.0
"""Seconds until a test gives up: this machine may be busy with other things."""


def eventually(what: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Wait until `what` is true, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def ffmpegs(purpose: str = "") -> list[psutil.Process]:
    """The ffmpeg processes of this one, with this among their arguments; "pipe:1" are those that send to viewers."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            command = child.cmdline()
            # Empty in the moment of its end.
            if command and "ffmpeg" in command[0] and (not purpose or purpose in command):
                found.append(child)
    return found


class Look:
    """A task that makes nothing: the worker has looked at all others between its turns."""

    endless = False

    def __init__(self) -> None:
        self.turns = 0
        self.done = threading.Event()

    def ready(self) -> bool:
        return True

    def step(self) -> bool:
        self.turns += 1
        if self.turns == 3:
            self.done.set()
        return self.turns < 3

    def fail(self, error: BaseException) -> None:
        raise AssertionError from error

    def expire(self) -> None: ...

    def queued(self, place: int) -> None: ...


def every_task_had_its_turn(server: Server) -> None:
    """Wait until every stream that wanted to make a chunk has made one; needs a free place."""
    look = Look()
    server.state.scheduler.submit(look)
    assert look.done.wait(PATIENCE)


class Client:
    """One connection."""

    def __init__(self, server: Server, **options: Any) -> None:
        self.socket: ClientConnection = connect(
            f"{server.address.replace('http', 'ws')}ws",
            max_size=None,
            compression=None,
            max_queue=None,  # A client that stops reading would not see that its closing is answered.
            open_timeout=PATIENCE,
            **options,
        )
        self.media: list[bytes] = []
        self.heard: list[dict[str, Any]] = []
        self.key = ""
        self.hear("hello")

    def send(self, kind: str, **content: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **content}))

    def start(self, prompt: str = "a red ball", **content: Any) -> dict[str, Any]:
        self.send("start", prompt=prompt, **content)
        return self.hear("started")

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
            if message["type"] == "started":
                self.key = message["stream"]
            elif message["type"] == "media":
                self.media.clear()  # A new video begins.
            if message["type"] in kinds:
                return message
            if message["type"] == "chunk":
                # Passed over on the way to another message, but seen: generation must not wait for it.
                self.at(message["first_frame"] + message["frames"])
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

    def close(self) -> None:
        self.socket.close()
