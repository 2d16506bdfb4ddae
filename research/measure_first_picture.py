"""How long the first picture takes beyond its chunk: python research/measure_first_picture.py [--count 5].

A client of a warm server that nobody else uses starts a stream; the time until the first bytes that hold a picture have
come, less what the model took for the first chunk. `beyond_cpu_ms` is what all that work costs in CPU time, the
encoder's start and the client included, less the model's: on an idle machine nothing takes longer than that unless it
waits, on a busy one it says what part of `beyond_ms` was waiting for a CPU. With `--browser` it is Chromium's page that
starts the streams, and the picture is on its screen. Lists are least, median and most. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from load_test import open_socket, settle
from tiny_model import write_tiny_model

from nasa_video.serve.app import Server
from nasa_video.serve.delivery import StreamFormat
from nasa_video.serve.media import Outgoing
from nasa_video.serve.protocol import Start
from nasa_video.serve.server_state import ServerState
from nasa_video.serve.settings import ServeSettings
from nasa_video.serve.stream import LiveStream, Pair

PICTURES = {"mp4": b"moof", "webm": b"\x1f\x43\xb6\x75", "av1": b"\x1f\x43\xb6\x75", "jpeg": b"\xff\xd8"}


class TimedStream(LiveStream):
    """Notes what the model's first chunk took of the worker's CPU time."""

    model_cpu = 0.0

    def _open(self) -> tuple[StreamFormat, Iterator[Pair]]:
        form, source = super()._open()

        def timed() -> Iterator[Pair]:
            began = time.thread_time()
            first = next(source)
            TimedStream.model_cpu = time.thread_time() - began
            yield first
            yield from source

        return form, timed()


class TimedState(ServerState):
    """Gives every client such a stream."""

    def make_stream(self, key: str, start: Start, outgoing: Outgoing, on_end: Callable[..., None]) -> LiveStream:
        return TimedStream(self, key, start, outgoing, on_end)


def cpu_seconds() -> float:
    """Of this process and the encoders that it has started."""
    process = psutil.Process()
    used = process.cpu_times()
    return used.user + used.system + sum(sum(child.cpu_times()[:2]) for child in process.children())


def first_picture(server: Server, media: str) -> dict[str, float]:
    """Of one stream; all in seconds."""
    chunk = arrived = 0.0
    with open_socket(server) as socket:
        cpu, began = cpu_seconds(), time.perf_counter()
        socket.send(json.dumps({"type": "start", "prompt": "a red ball", "media": [media]}))
        while not (chunk and arrived):
            item = socket.recv(timeout=120)
            if isinstance(item, str):
                chunk = chunk or float(json.loads(item).get("seconds", 0))
            elif PICTURES[media] in item and not arrived:
                arrived, used = time.perf_counter() - began, cpu_seconds() - cpu
    return {"chunk": chunk, "beyond": arrived - chunk, "beyond_cpu": used - TimedStream.model_cpu}


def page_of(server: Server, stack: contextlib.ExitStack) -> Any:
    """The live page in Debian's Chromium."""
    from playwright.sync_api import sync_playwright

    chromium = stack.enter_context(sync_playwright()).chromium
    browser = chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
    stack.callback(browser.close)
    page = browser.new_page()
    page.goto(server.address)
    page.wait_for_selector("body[data-state=ready]")
    page.evaluate("document.querySelector('details').open = true")
    return page


def picture_on_screen(page: Any, media: str) -> dict[str, float]:
    """Of one stream of the page, from the click to the screen; in seconds."""
    page.select_option("#media", media)
    page.click("#start")
    page.wait_for_selector("body[data-first-picture]", timeout=120_000)
    whole, chunk = (float(page.evaluate(f"document.body.dataset.{name}")) for name in ("firstPicture", "firstChunk"))
    page.click("#stop")
    page.wait_for_selector("body[data-state=ended]")
    return {"chunk": chunk, "beyond": whole - chunk}


def main() -> None:
    """Measure every way to send pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--model", help="a tiny random one, if left out")
    parser.add_argument("--media", nargs="+", default=[*PICTURES], choices=[*PICTURES])
    parser.add_argument("--browser", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = options.model or str(write_tiny_model(Path(folder), default_steps=1))
        server = Server(TimedState(ServeSettings(models=(model,))), port=0)
        server.state.warm_up()
        thread = threading.Thread(target=server.serve_until_stopped, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        report: dict[str, Any] = {"model": options.model or "tiny, random"}
        page = page_of(server, stack) if options.browser else None
        for media in options.media:
            runs = []
            for _ in range(options.count + 1):
                runs.append(picture_on_screen(page, media) if page else first_picture(server, media))
                if page is None:
                    settle(server)
            del runs[0]  # What is loaded at the first use of an encoder is loaded once.
            report[media] = {
                f"{name}_ms": [round(1000 * f(run[name] for run in runs)) for f in (min, statistics.median, max)]
                for name in runs[0]
            }
        stack.close()
        server.should_exit = True
        thread.join(20)
    report["machine"] = f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    print(json.dumps(report))


if __name__ == "__main__":
    main()
