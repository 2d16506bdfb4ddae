"""What streams, jobs and those who break them leave behind: nothing that grows with their number."""

from __future__ import annotations

import collections
import re
import socket
import threading
from typing import Any

import httpx
import psutil
from live_client import Client, eventually, ffmpegs

from nasa_video.serve.app import Server

POOL = "AnyIO worker thread"
"""Threads in which FastAPI runs what is no coroutine; kept for the next one, at most forty."""


def use(server: Server, client_of: Any) -> None:
    """A stream that is started anew, one whose encoder is killed, one that is cut, a job, one that is cancelled."""
    client: Client = client_of(server)
    client.start(media=["mp4"])
    client.watch(1)
    client.start(media=["mp4"])
    client.watch(1)
    for encoder in ffmpegs("pipe:1"):
        encoder.kill()
    client.watch(1)
    client.socket.socket.shutdown(socket.SHUT_RDWR)
    keys = [httpx.post(f"{server.address}v1/videos", json={"prompt": "a ball"}).json()["id"] for _ in range(2)]
    httpx.delete(f"{server.address}v1/videos/{keys[0]}")
    httpx.get(f"{server.address}models")
    eventually(lambda: httpx.get(f"{server.address}v1/videos/{keys[1]}").json()["status"] == "done")
    eventually(lambda: server.state.sessions == 0 and server.state.scheduler.counts == (0, 0))
    for kept in [*server.state.streams.clear(), *server.state.jobs.clear()]:
        kept.join(10)


def held() -> tuple[collections.Counter[str], int, int, int]:
    """Threads by what they do, without the pool's; the pool's; the system's beside Python's; child processes."""
    names = collections.Counter(re.sub(r"Thread-\d+", "", thread.name) for thread in threading.enumerate())
    pooled = names.pop(POOL, 0)
    process = psutil.Process()
    return names, pooled, process.num_threads() - threading.active_count(), len(process.children())


def test_no_thread_and_no_process_stays(server: Server, client_of: Any) -> None:
    use(server, client_of)
    names, _, native, children = held()
    for _ in range(4):
        use(server, client_of)
    eventually(lambda: held()[0] == names, seconds=10)
    _, pooled, native_later, children_later = held()
    ours = {name for name in names if name.startswith(("asyncio_", "ffmpeg", "nasa-video"))}
    assert ours == {"nasa-video scheduler", "nasa-video tidier"}
    assert pooled <= 3, "these visitors ask for one thing after the other"
    assert (native_later, children_later) == (native, children)
