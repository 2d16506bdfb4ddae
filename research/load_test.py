"""An hour's use of `nasa-video serve`: visitors who come, wait, watch, change their minds, misbehave and go.

    python research/load_test.py [--watched 60] [--rounds 3] [--visitors 12] [--model FOLDER] [--output FILE.json]

What is simulated is `--watched` minutes of video, shown to viewers; the clock is left out: a visitor has seen a chunk
as soon as it has come, so the run takes as long as the machine needs for the work. How long a visitor stays is counted
in seconds of video too. Without `--model` the model is a tiny one of random weights: it is the server that is tested.

Some visits misbehave: malformed and oversize messages, floods, connections cut without a word, killed encoders; some
are jobs (`POST /v1/videos`), half of them cancelled. The minutes are `--rounds` equal ones, between which everybody
leaves. Whatever a stream leaves behind is there again after each of them, so a leak grows from the first round to the
last. `memory_mb` is what the process holds (the visitors live in it, too); `heap_used_mb` is what of it is in use,
`heap_free_mb` what malloc keeps of what was freed, `trimmed_mb` is `memory_mb` after malloc has given that back. Only
use that grows is a leak: the free part depends on which thread happened to free what. The last line is JSON; the exit
status says whether anything leaked.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import gc
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from socket import SHUT_RDWR
from typing import Any

import httpx
import psutil
from tiny_model import write_tiny_model
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from nasa_video.models.presets import find_preset
from nasa_video.serve.app import Server
from nasa_video.serve.settings import ServeSettings

NEGATIVES = ("red", "blue", "blurry", "snow", "border")
POOLS = ("asyncio_", "AnyIO worker")
"""Names of threads that asyncio and AnyIO keep for the next call; each pool has a limit of its own."""
PATIENCE = 60.0
"""Seconds that a visitor waits in the line."""


class Load:
    """The visitors of one server and what became of them, until this much video was watched or the time is up."""

    def __init__(self, server: Server, fps: float, minutes: float, until: float) -> None:
        self.server, self.fps, self.until = server, fps, until
        self.left = 60 * minutes * fps
        self.frames = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    @property
    def over(self) -> bool:
        """Whether enough was watched."""
        return self.frames >= self.left or time.monotonic() > self.until

    def count(self, what: str, amount: int = 1) -> None:
        with self._lock:
            self.counts[what] += amount

    def visitor(self, number: int) -> None:
        """Visit after visit."""
        luck = random.Random(number)
        while not self.over:
            try:
                if luck.random() < 0.1:
                    self.order(luck)
                else:
                    self.visit(luck)
            except (ConnectionClosed, TimeoutError, OSError, httpx.HTTPError) as error:
                self.count(f"ended by {type(error).__name__}")

    def order(self, luck: random.Random) -> None:
        """A job, to its end or to its cancelling."""
        with httpx.Client(base_url=self.server.address, timeout=30) as http:
            answer = http.post("v1/videos", json={"prompt": "a red ball", "frames": 33, "seed": luck.randrange(1000)})
            self.count(f"jobs answered with {answer.status_code}")
            if answer.status_code != 202:
                time.sleep(1)
                return
            key, cancels = answer.json()["id"], luck.random() < 0.5
            while not self.over:
                job = http.get(f"v1/videos/{key}").json()
                if job["status"] not in ("queued", "running"):
                    self.count(f"jobs {job['status']}")
                    break
                if cancels and job["frames"]:
                    http.delete(f"v1/videos/{key}")
                    cancels = False
                time.sleep(0.5)

    def visit(self, luck: random.Random) -> None:
        """A stream, from its start to the visitor's leaving."""
        self.count("visits")
        with open_socket(self.server) as socket:
            media = luck.choice(["mp4", "mp4", "mp4", "jpeg", "webm", "av1"])
            negatives = [{"text": luck.choice(NEGATIVES)}]
            self.count(f"asked for {media}")
            start = {"prompt": "a star", "seed": luck.randrange(1000), "media": [media], "negatives": negatives}
            socket.send(json.dumps({"type": "start", "compare": luck.random() < 0.1, **start}))
            self.watch(socket, luck, leave=luck.uniform(1, 120) * self.fps)
            if luck.random() < 0.3:
                self.count("cut without a word")
                socket.socket.shutdown(SHUT_RDWR)  # To close it would send nothing while its thread reads.
            elif luck.random() < 0.5:
                socket.send('{"type": "stop"}')

    def watch(self, socket: ClientConnection, luck: random.Random, leave: float) -> None:
        """Look at every chunk that comes, until ``leave`` frames were seen."""
        key, seen, mischief, patience = "", 0, luck.random(), time.monotonic() + PATIENCE
        while seen < leave and not self.over:
            item = socket.recv(timeout=max(0.0, patience - time.monotonic()))
            if isinstance(item, bytes):
                self.count("media bytes", len(item))
                continue
            message = json.loads(item)
            self.count(f"heard {message['type']}")
            patience = time.monotonic() + PATIENCE
            if message["type"] == "started":
                key = message["stream"]
            elif message["type"] == "chunk":
                with self._lock:
                    self.frames += message["frames"]
                seen = message["first_frame"] + message["frames"]
                socket.send(json.dumps({"type": "position", "stream": key, "frame": seen}))
                if luck.random() < 0.2:
                    socket.send(json.dumps({"type": "update", "negatives": [{"text": luck.choice(NEGATIVES)}]}))
                if mischief < 0.15:
                    self.misbehave(socket, luck, mischief)
                    mischief = 1
            elif message["type"] == "ended":
                return
            elif message["type"] == "error":
                self.count(f"refused: {message['code']}")
                if message["code"] == "busy":
                    time.sleep(1)
                    return

    def misbehave(self, socket: ClientConnection, luck: random.Random, how: float) -> None:
        """Once in a visit."""
        if how < 0.04:
            socket.send('{"type": "nonsense"}')
        elif how < 0.06:
            self.count("oversize messages")
            socket.send("x" * 100_000)
        elif how < 0.10:
            self.count("floods")
            for _ in range(200):
                socket.send('{"type": "pause"}')
        else:
            self.kill_an_encoder(luck)

    def kill_an_encoder(self, luck: random.Random) -> None:
        encoders = psutil.Process().children()
        luck.shuffle(encoders)
        for child in encoders:
            with contextlib.suppress(psutil.NoSuchProcess):  # It has ended by itself.
                if "pipe:1" in child.cmdline():
                    child.kill()
                    self.count("encoders killed")
                    return


def open_socket(server: Server) -> ClientConnection:
    """A visitor's connection. Unbounded: one that stopped reading would take ten seconds to leave."""
    address = f"{server.address.replace('http', 'ws')}ws"
    return connect(address, max_size=None, compression=None, max_queue=None, open_timeout=30)


class HeapInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def measure() -> dict[str, Any]:
    """What this process holds; the heap's part only with glibc."""
    gc.collect()
    process = psutil.Process()
    names = [thread.name for thread in threading.enumerate()]
    pooled = sum(name.startswith(POOLS) for name in names)
    held: dict[str, Any] = {
        "threads": len(names) - pooled,
        "pool_threads": pooled,
        "thread_names": sorted(names),
        "processes": len(process.children()),
        "files": process.num_fds(),
        "python_blocks": sys.getallocatedblocks(),
        "memory_mb": round(process.memory_info().rss / 1e6, 1),
    }
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = HeapInfo
        heap = libc.mallinfo2()
        held["heap_used_mb"] = round((heap.uordblks + heap.hblkhd) / 1e6, 1)
        held["heap_free_mb"] = round(heap.fordblks / 1e6, 1)
        libc.malloc_trim(0)
        held["trimmed_mb"] = round(process.memory_info().rss / 1e6, 1)
    return held


def settle(server: Server) -> None:
    """Wait until every visitor's things are gone, and forget what is kept for download."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (server.state.sessions or psutil.Process().children()):
        time.sleep(0.2)
    for kept in [*server.state.streams.clear(), *server.state.jobs.clear()]:
        kept.join(10)


def main() -> None:
    """Run the visitors, print the figures, fail where something leaked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watched", type=float, default=60, help="minutes of video")
    parser.add_argument("--limit", type=float, default=60, help="minutes of the clock after which it ends unfinished")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--visitors", type=int, default=12)
    parser.add_argument("--model", help="a tiny random one, if left out")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(options, options.model or str(write_tiny_model(Path(folder), default_steps=1)))
    text = json.dumps(report)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)
    if report["leaked"]:
        sys.exit(f"leaked: {', '.join(report['leaked'])}")
    if report["minutes_watched"] < options.watched:
        sys.exit("the time was up before enough was watched")


def run(options: argparse.Namespace, model: str) -> dict[str, Any]:
    """The rounds, from a warm server to its end."""
    fps = find_preset(model).video.fps
    server = Server(ServeSettings(models=(model,), max_streams=4, max_waiting=6, turn_seconds=10), port=0)
    server.state.warm_up()
    thread = threading.Thread(target=server.serve_until_stopped, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    until = time.monotonic() + 60 * options.limit

    def round_of(minutes: float) -> Load:
        load = Load(server, fps, minutes, until)
        visitors = [threading.Thread(target=load.visitor, args=(i,)) for i in range(options.visitors)]
        for visitor in visitors:
            visitor.start()
        for visitor in visitors:
            visitor.join()
        settle(server)
        return load

    round_of(options.watched / 30)  # Pools and caches fill in the first minutes of any server; they are no leak.
    before, middle = measure(), time.monotonic()
    rounds, counts, frames = [], collections.Counter[str](), 0
    for _ in range(options.rounds):
        load = round_of(options.watched / options.rounds)
        counts.update(load.counts)
        frames += load.frames
        rounds.append(measure())
    minutes = (time.monotonic() - middle) / 60
    server.should_exit = True
    thread.join(20)
    return {
        "minutes": round(minutes, 1),
        "minutes_watched": round(frames / fps / 60, 1),
        "visitors": options.visitors,
        "counts": dict(sorted(counts.items())),
        "before": before,
        "rounds": rounds,
        "leaked": leaks(before, rounds),
        "machine": f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
    }


def leaks(before: dict[str, Any], rounds: list[dict[str, Any]]) -> list[str]:
    """What is more after the last round than it may be."""
    first, last = rounds[0], rounds[-1]
    leaked = [name for name in ("threads", "processes") if last[name] > before[name]]
    leaked += ["files"] * (last["files"] > before["files"] + 3)
    leaked += ["memory_mb"] * (last["memory_mb"] > 1.15 * before["memory_mb"] + 30)
    leaked += ["heap_used_mb"] * (last.get("heap_used_mb", 0) > first.get("heap_used_mb", 0) + 5)
    return leaked


if __name__ == "__main__":
    main()
