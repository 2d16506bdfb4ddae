"""Hours of use of `nasa-video serve` in minutes: visitors who come, watch, change their minds and go.

    python scripts/load_test.py --minutes 3 --speed 20 [--model FOLDER] [--output FILE.json]

Visitors play `--speed` times faster than the clock, so one minute is that many minutes of viewing. Every few visits
one misbehaves: malformed and oversize messages, floods, connections cut without a word, killed encoders.

The minutes are `--rounds` equal ones, between which everybody leaves. Whatever a stream leaves behind is there again
after each of them, so a leak grows from the first round to the last. `memory_mb` is what the process holds;
`heap_used_mb` is what of it is in use, `heap_free_mb` what malloc keeps of what was freed, and `trimmed_mb` is
`memory_mb` after malloc has given that back. Only use that grows is a leak: the free part depends on which thread
happened to free what. `--trace` also prints which Python lines hold more than before (slow).

Before the visitors come, `--pictures` streams of one viewer each measure the first picture. The last line is JSON.
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
import statistics
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import psutil
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from nasa_video.serve.server import Server
from nasa_video.serve.settings import ServeSettings

NEGATIVES = ("red", "blue", "blurry", "snow", "border")


class Load:
    """The visitors of one server and what became of them."""

    def __init__(self, server: Server, speed: float, until: float) -> None:
        self.server, self.speed, self.until = server, speed, until
        self.counts: collections.Counter[str] = collections.Counter()
        self.frames = 0.0
        self._lock = threading.Lock()

    def count(self, what: str, amount: int = 1) -> None:
        with self._lock:
            self.counts[what] += amount

    def visitor(self, number: int) -> None:
        """Visit after visit."""
        luck = random.Random(number)
        while time.monotonic() < self.until:
            try:
                self.visit(luck)
            except (ConnectionClosed, TimeoutError, OSError) as error:
                self.count(f"ended by {type(error).__name__}")

    def visit(self, luck: random.Random) -> None:
        self.count("visits")
        with open_socket(self.server) as socket:

            def send(kind: str, **content: Any) -> None:
                socket.send(json.dumps({"type": kind, **content}))

            media = luck.choice(["mp4", "mp4", "jpeg", "webm"])
            send("start", prompt="a red ball", seed=luck.randrange(1000), media=[media], compare=luck.random() < 0.2)
            began, key, shown = 0.0, "", 0
            leave = time.monotonic() + luck.uniform(2, 8)
            mischief = luck.random()
            while time.monotonic() < leave:
                try:
                    item = socket.recv(timeout=0.1)
                except TimeoutError:
                    item = b""
                if isinstance(item, str):
                    message = json.loads(item)
                    self.count(message["type"])
                    if message["type"] == "started":
                        key, began = message["stream"], time.monotonic()
                    elif message["type"] == "chunk":
                        shown = message["first_frame"] + message["frames"]
                        if luck.random() < 0.2:
                            send("update", negatives=[{"text": luck.choice(NEGATIVES)}])
                    elif message["type"] == "ended" or message.get("code") == "busy":
                        break
                elif item:
                    self.count("media bytes", len(item))
                if began:
                    send("position", stream=key, frame=int((time.monotonic() - began) * 12 * self.speed))
                if mischief < 0.04:
                    socket.send('{"type": "nonsense"}')
                elif mischief < 0.06:
                    socket.send("x" * 100_000)
                elif mischief < 0.08:
                    for _ in range(200):
                        send("pause")
                elif mischief < 0.10 and shown:
                    self.kill_an_encoder(luck)
                    mischief = 1
            with self._lock:
                self.frames += shown
            if luck.random() < 0.3:
                self.count("cut without a word")
                socket.socket.close()
            elif key and luck.random() < 0.5:
                send("stop")

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
    return connect(address, max_size=None, compression=None, max_queue=None)


def first_picture(server: Server, media: str) -> tuple[float, float]:
    """(seconds until a picture is there, seconds that its chunk took), from a warm server that nobody else uses."""
    mark = {"mp4": b"moof", "webm": b"\x1f\x43\xb6\x75", "jpeg": b"\xff\xd8"}[media]
    chunk, arrived = 0.0, 0.0
    with open_socket(server) as socket:
        began = time.perf_counter()
        socket.send(json.dumps({"type": "start", "prompt": "a red ball", "media": [media]}))
        while not (chunk and arrived):
            item = socket.recv(timeout=60)
            if isinstance(item, str):
                message = json.loads(item)
                chunk = chunk or float(message.get("seconds", 0))
            elif mark in item and not arrived:
                arrived = time.perf_counter() - began
    return arrived, chunk


def first_pictures(server: Server, count: int) -> dict[str, dict[str, float]]:
    """For every way to send pictures the chunk's own time and what the first picture takes beyond it."""
    report = {}
    for media in ("mp4", "webm", "jpeg"):
        pairs = []
        for _ in range(count):
            pairs.append(first_picture(server, media))
            settle(server)
        beyond = sorted(1000 * (arrived - chunk) for arrived, chunk in pairs)
        report[media] = {
            "chunk_ms": round(1000 * statistics.median(chunk for _, chunk in pairs)),
            "beyond_ms": round(statistics.median(beyond)),
            "best_beyond_ms": round(beyond[0]),
        }
    return report


class HeapInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in _names]


def measure() -> dict[str, float]:
    """What this process holds; the heap's part only with glibc."""
    gc.collect()
    process = psutil.Process()
    held: dict[str, float] = {
        "threads": threading.active_count(),
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
    """Wait until every visitor's things are gone."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (server.hub.sessions or psutil.Process().children()):
        time.sleep(0.2)
    for kept in server.hub.streams.clear():
        kept.join(10)


def main() -> None:
    """Run the visitors, print the figures, fail where something leaked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=5, help="streams to measure the first picture with")
    parser.add_argument("--trace", action="store_true", help="which Python lines hold more than before")
    parser.add_argument("--speed", type=float, default=20, help="how much faster than the clock visitors watch")
    parser.add_argument("--visitors", type=int, default=12)
    parser.add_argument("--model", default="sprites")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()

    server = Server(ServeSettings(models=(options.model,), max_streams=4, max_waiting=6, turn_seconds=3), port=0)
    server.hub.warm_up()
    thread = threading.Thread(target=server.serve_until_stopped, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)

    def run(seconds: float) -> Load:
        load = Load(server, options.speed, time.monotonic() + seconds)
        visitors = [threading.Thread(target=load.visitor, args=(i,)) for i in range(options.visitors)]
        for visitor in visitors:
            visitor.start()
        for visitor in visitors:
            visitor.join()
        settle(server)
        return load

    pictures = first_pictures(server, options.pictures) if options.pictures else {}
    run(10)  # Pools and caches fill in the first seconds of any server; they are no leak.
    before, middle = measure(), time.monotonic()
    if options.trace:
        tracemalloc.start(10)
        first = tracemalloc.take_snapshot()
    rounds, counts, frames = [], collections.Counter[str](), 0.0
    for _ in range(options.rounds):
        load = run(60 * options.minutes / options.rounds)
        counts.update(load.counts)
        frames += load.frames
        rounds.append(measure())
    after = rounds[-1]
    if options.trace:
        for line in tracemalloc.take_snapshot().compare_to(first, "lineno")[:15]:
            print(line)
    report = {
        "minutes": round((time.monotonic() - middle) / 60, 2),
        "minutes_watched": round(frames / 12 / 60, 1),
        "visitors": options.visitors,
        "first_picture": pictures,
        "counts": dict(sorted(counts.items())),
        "before": before,
        "rounds": rounds,
        "machine": f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}",
    }
    server.should_exit = True
    thread.join(20)
    text = json.dumps(report)
    if options.output:
        options.output.write_text(text + "\n")
    print(text)
    leaks = [name for name in ("threads", "processes") if after[name] > before[name]]
    leaks += ["files"] * (after["files"] > before["files"] + 3)
    leaks += ["memory_mb"] * (after["memory_mb"] > 1.15 * before["memory_mb"] + 30)
    leaks += ["heap_used_mb"] * (after.get("heap_used_mb", 0) > rounds[0].get("heap_used_mb", 0) + 10)
    if leaks:
        sys.exit(f"leaked: {', '.join(leaks)}")


if __name__ == "__main__":
    main()
