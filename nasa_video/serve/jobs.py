"""Jobs: a video made to its end without a viewer (``POST /v1/videos``)."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any, Literal

from nasa_video.errors import InputError, OutputError
from nasa_video.files.ffmpeg_sink import FfmpegSink
from nasa_video.guidance.state import Effect
from nasa_video.models.presets import find_preset
from nasa_video.serve.media import Gone
from nasa_video.serve.protocol import ServedRequest
from nasa_video.serve.worker import Consumer, Production, Worker, explain_failure
from nasa_video.video.pipeline import Chunk
from nasa_video.video.request import PromptWarning, VideoRequest

if TYPE_CHECKING:
    from nasa_video.serve.server_state import ServerState

State = Literal["queued", "running", "done", "failed", "cancelled"]


class Job(Production[Chunk, Chunk], Consumer[Chunk]):
    """One video file in the making; it takes its own chunks on.

    Raises:
        InputError: a model that is not offered, a guidance that it cannot take, or too many frames.
    """

    def __init__(self, server: ServerState, key: str, request: ServedRequest) -> None:
        super().__init__(server, key, request.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptWarning)
            self.recipe = VideoRequest(model=self.model).merged(request).resolved(find_preset(self.model))
        self.total = self.recipe.frames or 0
        if self.total > server.settings.max_frames:
            raise InputError(f"at most {server.settings.max_frames} frames, got {self.total}")
        self.path = server.folder / f"{key}.mp4"
        self.place = 0
        self._error: str | None = None
        self._effect: Effect | None = None
        self._frames = 0
        self._sink: FfmpegSink | None = None

    @property
    def state(self) -> State:
        """As ``GET /v1/videos/{id}`` says it."""
        if self.finished_at is None:
            return "queued" if self._worker is None else "running"
        return "failed" if self._error else "done" if self.reason == "finished" else "cancelled"

    def describe(self) -> dict[str, Any]:
        """The body of ``GET /v1/videos/{id}``."""
        return {
            "id": self.key,
            "status": self.state,
            "place": self.place if self.state == "queued" else None,
            "progress": round(self._frames / self.total, 4),
            "frames": self._frames,
            "total_frames": self.total,
            "model": self.model,
            "seed": self.recipe.seed,
            "effect": dataclasses.asdict(self._effect) if self._effect else None,
            "error": self._error,
            "content": f"v1/videos/{self.key}/content" if self.state == "done" else None,
        }

    def discard(self) -> None:
        """Cancel it, and delete its file."""
        self.close("left")
        self.path.unlink(missing_ok=True)

    # The task; called by the scheduler.

    def ready(self) -> bool:
        return not self._over and (self._worker is None or self._worker.has_room)

    def step(self) -> bool:
        if self._worker is None:
            self._begin()
        source = self._source
        chunk = next(source, None) if source is not None else None
        if chunk is None:
            self.close("finished")
            return False
        assert self._worker is not None
        self._worker.put(chunk)
        return True

    def queued(self, place: int) -> None:
        self.place = place

    def note_failure(self, error: BaseException) -> None:
        if not isinstance(error, Gone):
            self._error = explain_failure(error)

    def _begin(self) -> None:
        recipe, pipeline = self.recipe, self.server.registry.get(self.model)
        video = pipeline.preset.video
        chunks = pipeline.stream(recipe, states=self.while_wanted(pipeline.states(recipe)))
        with self._lock:
            if self._over:
                raise Gone("the job was cancelled")
            self._source = chunks
            self._sink = FfmpegSink(self.path, video.fps, recipe.to_metadata(), scale=video.upscale)
            self._worker = Worker("nasa-video job", self)

    # The consumer; called by the job's own thread.

    def consume(self, item: Chunk) -> None:
        self.server.scheduler.wake()
        assert self._sink is not None
        self._sink.write(item.frames)
        self._frames += len(item.frames)
        self._effect = item.effect

    def finish(self, error: BaseException | None) -> None:
        """Complete the file, or remove what there is of it."""
        if self._sink is not None and error is None and self.reason == "finished":
            try:
                self._sink.metadata["effect"] = dataclasses.asdict(self._effect) if self._effect else None
                self._sink.finish()
            except OutputError as problem:
                error = problem
        elif self._sink is not None and (kept := self._sink.abort()) is not None:
            kept.unlink(missing_ok=True)
        self.ended(error)
        self.server.scheduler.wake()
