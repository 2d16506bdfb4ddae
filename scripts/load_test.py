"""Hours of use of `nasa-video serve` in minutes: visitors who come, watch, change their minds and go.

    python scripts/load_test.py --minutes 3 --speed 20 [--model FOLDER] [--output FILE.json]

Visitors play `--speed` times faster than the clock, so one minute is that many minutes of viewing. Every few visits
one misbehaves: malformed and oversize messages, floods, connections cut without a word, killed encoders. The last
line is JSON: what happened, and threads, processes, files and memory before and after.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

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
        with connect(f"{self.server.address.replace('http', 'ws')}ws", max_size=None, compression=None) as socket:

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
        encoders = [child for child in psutil.Process().children() if "pipe:1" in child.cmdline()]
        if encoders:
            os.kill(luck.choice(encoders).pid, signal.SIGKILL)
            self.count("encoders killed")


def measure() -> dict[str, float]:
    """What this process holds."""
    process = psutil.Process()
    return {
        "threads": threading.active_count(),
        "processes": len(process.children()),
        "files": process.num_fds(),
        "memory_mb": round(process.memory_info().rss / 1e6, 1),
    }


def settle(server: Server) -> None:
    """Wait until every visitor's things are gone."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (server.hub.sessions or psutil.Process().children()):
        time.sleep(0.2)
    server.hub.streams.clear()
    time.sleep(1)


def main() -> None:
    """Run the visitors, print the figures, fail where something leaked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3)
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

    run(10)  # Pools and caches fill in the first seconds of any server; they are no leak.
    before, middle = measure(), time.monotonic()
    load = run(60 * options.minutes)
    after = measure()
    report = {
        "minutes": round((time.monotonic() - middle) / 60, 2),
        "minutes_watched": round(load.frames / 12 / 60, 1),
        "visitors": options.visitors,
        "counts": dict(sorted(load.counts.items())),
        "before": before,
        "after": after,
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
    if leaks:
        sys.exit(f"leaked: {', '.join(leaks)}")


if __name__ == "__main__":
    main()
