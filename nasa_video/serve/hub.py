"""Everything that one server shares: models, worker, streams, jobs, files."""

from __future__ import annotations

import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nasa_video.serve.jobs import Job
from nasa_video.serve.library import Library
from nasa_video.serve.outgoing import Outgoing
from nasa_video.serve.protocol import Start, VideoRequest
from nasa_video.serve.settings import ServeSettings
from nasa_video.serve.shelf import Shelf
from nasa_video.serve.stream import LiveStream
from nasa_video.serve.worker import Worker

_TIDY_SECONDS = 10.0
_SECONDS_TO_END = 5.0


class KeptStream:
    """A stream on the shelf."""

    def __init__(self, stream: LiveStream) -> None:
        self.stream = stream
        self.key = stream.key
        self.finished_at: float | None = None

    def join(self, timeout: float) -> None:
        """Wait until its encoder and its thread are gone."""
        self.stream.join(timeout)

    def discard(self) -> None:
        """End it, and delete its recording."""
        self.stream.close("left")
        if self.stream.recorder is not None:
            self.stream.recorder.close()


class Hub:
    """State of one server; `open` and `close` bracket its life."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.library = Library(settings)
        self.worker = Worker(settings.max_streams, settings.max_waiting, settings.turn_seconds)
        self.streams: Shelf[KeptStream] = Shelf(settings.max_results, settings.keep_seconds)
        self.jobs: Shelf[Job] = Shelf(settings.max_results, settings.keep_seconds)
        self.sessions = 0
        self.folder = Path(tempfile.mkdtemp(prefix="nasa-video-serve-"))
        self._closing = threading.Event()
        self._tidier = threading.Thread(target=self._tidy, name="nasa-video tidier", daemon=True)

    @property
    def preview(self) -> dict[str, Any] | None:
        """What every viewer is shown, where that is fixed."""
        return None

    def warm_up(self) -> None:
        """Load the first model and make a chunk with it, so that the first viewer does not wait for that.

        Raises:
            InputError: its weights are missing.
        """
        pipeline = self.library.get(self.library.name(None))
        next(pipeline.stream("a first picture", frames=pipeline.frames_until(1)))

    def open(self) -> None:
        """Start the worker."""
        self.worker.start()
        self._tidier.start()

    def close(self) -> None:
        """End everything and delete its files."""
        self._closing.set()
        self.worker.stop()
        deadline = time.monotonic() + _SECONDS_TO_END
        ended: list[KeptStream | Job] = [*self.streams.clear(), *self.jobs.clear()]
        for thing in ended:
            thing.join(max(0.0, deadline - time.monotonic()))
        shutil.rmtree(self.folder, ignore_errors=True)

    def new_stream(self, start: Start, outgoing: Outgoing) -> LiveStream:
        """Begin a stream, or put it in the line.

        Raises:
            InputError: a model that is not offered.
            Busy: the line is full.
        """

        def ended(stream: LiveStream) -> None:
            self.worker.remove(stream)
            kept.finished_at = time.monotonic()
            self.streams.tidy()

        key = secrets.token_urlsafe(16)
        stream = self.make_stream(key, start, outgoing, ended)
        kept = KeptStream(stream)
        self.worker.submit(stream)
        self.streams.put(kept)
        return stream

    def make_stream(
        self, key: str, start: Start, outgoing: Outgoing, ended: Callable[[LiveStream], None]
    ) -> LiveStream:
        """The stream of a client."""
        return LiveStream(key, start, self.library, self.settings, self.folder, outgoing, self.worker.wake, ended)

    def new_job(self, request: VideoRequest) -> Job:
        """Begin a job, or put it in the line; errors as `new_stream`."""
        job = Job(secrets.token_urlsafe(16), request, self.library, self.settings, self.folder, self.worker.wake)
        self.worker.submit(job)
        self.jobs.put(job)
        return job

    def cancel(self, job: Job) -> None:
        """Free a job's place and stop it."""
        self.worker.remove(job)
        job.cancel()

    def _tidy(self) -> None:
        while not self._closing.wait(_TIDY_SECONDS):
            self.streams.tidy()
            self.jobs.tidy()
