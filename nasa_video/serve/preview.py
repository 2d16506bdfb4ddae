"""``generate --preview``: the live page shows one run that goes on whether anybody looks or not."""

from __future__ import annotations

import dataclasses
import threading
import time
import webbrowser
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Self

from nasa_video.serve.app import Server
from nasa_video.serve.delivery import StreamFormat
from nasa_video.serve.media import Outgoing
from nasa_video.serve.protocol import Start, Update, describe_state
from nasa_video.serve.server_state import ServerState
from nasa_video.serve.settings import ServeSettings
from nasa_video.serve.stream import LiveStream, Pair
from nasa_video.video.pipeline import Chunk, VideoPipeline
from nasa_video.video.request import VideoRequest

MAX_HELD_BYTES = 256 * 1024 * 1024
_SECONDS_FOR_A_BROWSER = 20.0


class Ring:
    """The newest chunks of a run, for viewers that come late or reload."""

    def __init__(self, max_bytes: int = MAX_HELD_BYTES) -> None:
        self.done = False
        self._pairs: deque[Pair] = deque()
        self._first = 0
        self._bytes = 0
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    def add(self, pair: Pair) -> None:
        """Keep a pair, and forget the oldest ones beyond the limit."""
        with self._lock:
            self._pairs.append(pair)
            self._bytes += pair[0].frames.nbytes
            while self._bytes > self._max_bytes and len(self._pairs) > 1:
                self._bytes -= self._pairs.popleft()[0].frames.nbytes
                self._first += 1

    def has(self, number: int) -> bool:
        """Whether there is something to show after ``number`` chunks, be it the end."""
        with self._lock:
            return self.done or number < self._first + len(self._pairs)

    def read(self, taken: Callable[[int], None]) -> Iterator[Pair]:
        """From the oldest chunk to the newest; `has` says when to go on. ``taken`` hears how far it is."""
        number = 0
        while True:
            with self._lock:
                number = max(number, self._first)
                if number >= self._first + len(self._pairs):
                    return
                pair = self._pairs[number - self._first]
            number += 1
            taken(number)
            yield pair


class PreviewStream(LiveStream):
    """A viewer of the run: as a live stream, but the chunks are made elsewhere and cannot be changed."""

    run: Preview
    _taken = 0

    def ready(self) -> bool:
        return super().ready() and (self._worker is None or self.run.ring.has(self._taken))

    def step(self) -> bool:
        if self._worker is None:  # Nothing more: the first chunk may not be there yet, and `ready` waits for it.
            self._begin()
            return True
        return super().step()

    def _open(self) -> tuple[StreamFormat, Iterator[Pair]]:
        def taken(number: int) -> None:
            self._taken = number

        assert self.run.form is not None
        return self.run.form, self.run.ring.read(taken)

    def _change(self, update: Update) -> None:
        self._outgoing.say("error", code="refused", message="this is the preview of a run; its texts are fixed")


class PreviewState(ServerState):
    """Gives every viewer the same run."""

    run: Preview

    def make_stream(
        self, key: str, start: Start, outgoing: Outgoing, on_end: Callable[[LiveStream], None]
    ) -> LiveStream:
        stream = PreviewStream(self, key, start, outgoing, on_end)
        stream.run = self.run
        return stream


class Preview:
    """Serves the page for one run inside a ``with`` block, whose end waits until nobody watches any more.

    Args:
        say: where the address is told.
        port: 0 takes a free one.
        open_page: opens a browser; None takes Python's `webbrowser`.
    """

    def __init__(
        self, say: Callable[[str], None], port: int = 0, open_page: Callable[[str], object] | None = None
    ) -> None:
        self.ring = Ring()
        self.form: StreamFormat | None = None
        self.description: dict[str, Any] | None = None
        self.server: Server | None = None
        self._say, self._port, self._open_page = say, port, open_page or webbrowser.open
        self._thread: threading.Thread | None = None
        self._somebody_came = False

    def watch(
        self, pipeline: VideoPipeline, recipe: VideoRequest, chunks: Iterator[Chunk], unguided: Iterator[Chunk] | None
    ) -> tuple[Iterator[Chunk], Iterator[Chunk] | None]:
        """Start the page; returns iterators that give the same chunks and show them."""
        form = StreamFormat.of(pipeline, compare=unguided is not None)
        assert recipe.height
        assert recipe.width
        assert recipe.fps
        self.form = dataclasses.replace(form, height=recipe.height, width=recipe.width, fps=recipe.fps)
        shown = describe_state(pipeline.states(recipe)(0), form.guidance)
        self.description = {**shown, "on_change": recipe.on_change, "compare": form.compare, "seed": recipe.seed}
        self._serve(str(recipe.model))
        last: list[Chunk] = []

        def guided() -> Iterator[Chunk]:
            for chunk in chunks:
                last[:] = [chunk]
                if unguided is None:
                    self._add((chunk, None))
                yield chunk

        def plain(source: Iterator[Chunk]) -> Iterator[Chunk]:
            for chunk in source:
                self._add((last[0], chunk.frames))
                yield chunk

        return guided(), plain(unguided) if unguided is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.ring.done = True
        if self.server is None or self._thread is None:
            return
        self.server.state.scheduler.wake()
        try:
            if kind is None:
                self._wait(self.server.state)
        finally:
            self.server.should_exit = True
            self._thread.join(10)

    def _add(self, pair: Pair) -> None:
        self.ring.add(pair)
        assert self.server is not None
        self._somebody_came |= self.server.state.sessions > 0
        self.server.state.scheduler.wake()

    def _serve(self, model: str) -> None:
        state = PreviewState(ServeSettings(models=(model,), max_streams=8))
        state.run, state.preview = self, self.description
        self.server = Server(state, port=self._port)
        self._thread = threading.Thread(target=self.server.serve_until_stopped, name="nasa-video preview", daemon=True)
        self._thread.start()
        self._say(f"preview at {self.server.address}")
        self._open_page(self.server.address)

    def _wait(self, state: ServerState) -> None:
        self._say("the preview stays until its page is closed, or Ctrl-C")
        deadline = time.monotonic() + _SECONDS_FOR_A_BROWSER
        # A page that is reloaded is away for a moment.
        absent = 0
        while absent < 4:
            if state.sessions:
                self._somebody_came, absent = True, 0
            elif self._somebody_came or time.monotonic() > deadline:
                absent += 1
            time.sleep(0.5)
