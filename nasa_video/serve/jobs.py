"""Jobs: a video made to its end without a viewer (``POST /v1/videos``)."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from nasa_video.errors import InputError, OutputError
from nasa_video.files.ffmpeg_sink import FfmpegSink
from nasa_video.guidance.state import Effect
from nasa_video.serve.feeder import Feeder
from nasa_video.serve.library import Library
from nasa_video.serve.messages import message_of
from nasa_video.serve.outgoing import Gone
from nasa_video.serve.protocol import VideoRequest
from nasa_video.serve.settings import ServeSettings
from nasa_video.video.pipeline import Chunk, VideoPipeline
from nasa_video.video.request import PromptState
from nasa_video.video.request import VideoRequest as Recipe

State = Literal["queued", "running", "done", "failed", "cancelled"]


class Job:
    """One video file in the making (a `Task`, and the `Consumer` of its own chunks)."""

    endless = False

    def __init__(
        self,
        key: str,
        request: VideoRequest,
        library: Library,
        settings: ServeSettings,
        folder: Path,
        wake: Callable[[], None],
    ) -> None:
        self.key = key
        self.request = request
        self.model = library.name(request.model)
        self.path = folder / f"{key}.mp4"
        self.state: State = "queued"
        self.place = 0
        self.finished_at: float | None = None
        self._library, self._settings, self._wake = library, settings, wake
        self._error: str | None = None
        self._effect: Effect | None = None
        self._frames = self._total = 0
        self._cancelled = False
        self._chunks: Iterator[Chunk] | None = None
        self._feeder: Feeder[Chunk] | None = None
        self._sink: FfmpegSink | None = None
        self._lock = threading.Lock()

    def describe(self) -> dict[str, Any]:
        """The body of ``GET /v1/videos/{id}``."""
        return {
            "id": self.key,
            "status": self.state,
            "place": self.place if self.state == "queued" else None,
            "progress": round(self._frames / self._total, 4) if self._total else 0.0,
            "frames": self._frames,
            "total_frames": self._total or None,
            "model": self.model,
            "seed": self.request.seed,
            "effect": dataclasses.asdict(self._effect) if self._effect else None,
            "error": self._error,
            "content": f"v1/videos/{self.key}/content" if self.state == "done" else None,
        }

    def cancel(self) -> None:
        """Stop before the model's next call."""
        with self._lock:
            if self.finished_at is not None:
                return
            self._cancelled = True
            feeder = self._feeder
        if feeder is None:
            self.finish(None)
        else:
            feeder.end(cancel=True)

    def join(self, timeout: float) -> None:
        """Wait until its encoder and its thread are gone; only after `cancel`."""
        if self._feeder is not None:
            self._feeder.join(timeout)

    def discard(self) -> None:
        """Delete the file."""
        self.cancel()
        self.path.unlink(missing_ok=True)

    # The task; called by the worker.

    def ready(self) -> bool:
        return not self._cancelled and (self._feeder is None or self._feeder.has_room)

    def step(self) -> bool:
        if self._chunks is None:
            self._begin()
        assert self._chunks is not None
        assert self._feeder is not None
        chunk = next(self._chunks, None)
        if chunk is None:
            self._feeder.end()
            return False
        self._feeder.put(chunk)
        return True

    def fail(self, error: BaseException) -> None:
        self._chunks = None
        if self._feeder is None:
            self.finish(error)
        else:
            if not isinstance(error, Gone):
                self._error = message_of(error)
            self._feeder.end(cancel=True)

    def expire(self) -> None:
        """A job has an end, so it keeps its place."""

    def told_place(self, place: int) -> None:
        self.place = place

    def _begin(self) -> None:
        request = self.request
        pipeline = self._library.get(self.model)
        state = request.state(pipeline)
        frames = pipeline.preset.video.frames if request.frames is None else request.frames
        if frames > self._settings.max_frames:
            raise InputError(f"at most {self._settings.max_frames} frames, got {frames}")

        def states(chunk: int) -> PromptState:
            if self._cancelled:
                raise Gone("the job was cancelled")
            return state

        recipe = self._recipe(pipeline, frames)
        chunks = pipeline.stream(recipe, states=states)
        with self._lock:
            if self._cancelled:
                raise Gone("the job was cancelled")
            self._chunks, self._total, self.state = chunks, frames, "running"
            video = pipeline.preset.video
            self._sink = FfmpegSink(self.path, video.fps, recipe.to_metadata(), scale=video.upscale)
            self._feeder = Feeder("nasa-video job", self)

    def _recipe(self, pipeline: VideoPipeline, frames: int) -> Recipe:
        request = self.request
        recipe = Recipe(
            prompt=request.prompt,
            negatives=request.state(pipeline).negatives[0],
            guidance=request.guidance_of(pipeline) or "none",
            seed=request.seed,
            steps=request.steps,
            first_chunk_steps=request.first_steps,
            frames=frames,
        )
        return pipeline.resolve(recipe)

    # The consumer; called by the job's own thread.

    def begin(self) -> None:
        pass

    def idle(self) -> None:
        pass

    def consume(self, item: Chunk) -> None:
        self._wake()
        assert self._sink is not None
        self._sink.write(item.frames)
        self._frames += len(item.frames)
        self._effect = item.effect

    def finish(self, error: BaseException | None) -> None:
        """Complete the file, or remove what there is of it."""
        if error is None and self._sink is not None and not self._cancelled and self._error is None:
            try:
                self._sink.metadata["effect"] = dataclasses.asdict(self._effect) if self._effect else None
                self._sink.finish()
            except OutputError as problem:
                error = problem
        elif self._sink is not None and (kept := self._sink.abort()) is not None:
            kept.unlink(missing_ok=True)
        if error is not None and not isinstance(error, Gone):
            self._error = message_of(error)
        with self._lock:
            self._chunks = None
            self.state = "failed" if self._error else "cancelled" if self._cancelled else "done"
            self.finished_at = time.monotonic()
        self._wake()
