"""The way of a stream's chunks to its viewer: encoder, messages, recording; runs in the stream's own thread."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nasa_video.errors import OutputError
from nasa_video.files.ffmpeg_sink import FfmpegSink
from nasa_video.files.formats import FORMATS, join
from nasa_video.files.frames import Frames, enlarge
from nasa_video.files.live_sinks import StreamSink
from nasa_video.files.metadata import to_json
from nasa_video.files.sheets import comparison_labels, side_by_side
from nasa_video.guidance.methods import Settings
from nasa_video.serve.media import KINDS, Gone, MediaEncoder, Outgoing, open_encoder
from nasa_video.serve.protocol import describe_state
from nasa_video.serve.worker import Consumer
from nasa_video.video.pipeline import Chunk, VideoPipeline

if TYPE_CHECKING:
    from nasa_video.serve.stream import LiveStream

MAX_RESTARTS = 5


@dataclass(frozen=True)
class StreamFormat:
    """Size (pixels, as the model makes it), rate and integer upscaling of a stream's frames.

    ``chunk_frames``: frames of every chunk but the first. ``guidance``: the model's own settings by method.
    """

    height: int
    width: int
    fps: float
    scale: int
    compare: bool
    chunk_frames: int
    guidance: Settings

    @classmethod
    def of(cls, pipeline: VideoPipeline, *, compare: bool) -> StreamFormat:
        """The format in which a model streams by itself."""
        video = pipeline.preset.video
        chunk_frames = pipeline.frames_until(2) - pipeline.frames_until(1)
        guidance = pipeline.preset.guidance
        return cls(video.height, video.width, video.fps, video.upscale, compare, chunk_frames, guidance)

    @property
    def sent_size(self) -> tuple[int, int]:
        """(height, width) of what is encoded: both videos beside each other where they are compared."""
        return self.height, self.width * (2 if self.compare else 1)


@dataclass(frozen=True)
class SentChunk:
    """A finished chunk, with its unguided twin where they are compared.

    ``seconds`` is what the model took, ``fps`` the rate at which this viewer's frames are made, waiting included.
    """

    chunk: Chunk
    plain: Frames | None
    first_frame: int
    seconds: float
    fps: float

    @property
    def frames(self) -> Frames:
        """What is encoded for the viewer."""
        frames: Frames = self.chunk.frames
        return frames if self.plain is None else np.concatenate([self.plain, frames], axis=2)

    @property
    def end(self) -> int:
        """The number of its last frame, and one."""
        return self.first_frame + len(self.chunk.frames)


class Delivery(Consumer[SentChunk]):
    """Sends a stream's chunks to its client and records them."""

    def __init__(self, stream: LiveStream, form: StreamFormat, outgoing: Outgoing) -> None:
        self.form = form
        self.kind = self.wanted_kind = stream.start.media[0]
        self.outgoing = outgoing
        self.recorder = stream.recorder
        self.num_frames = 0
        self._stream = stream
        self._encoder: MediaEncoder | None = None
        self._unseen: deque[SentChunk] = deque()
        self._encoder_used = False
        self._restarts = 0

    def begin(self) -> None:
        """Start the encoder, while the first chunk is being made."""
        self._open(0)

    def consume(self, item: SentChunk) -> None:
        """Tell of a chunk, then send and record it."""
        self._stream.server.scheduler.wake()
        chunk = item.chunk
        self._unseen.append(item)
        while self._unseen[0] is not item and self._unseen[0].end <= self._stream.position:
            self._unseen.popleft()
        self.outgoing.say(
            "chunk",
            index=chunk.index,
            first_frame=item.first_frame,
            frames=len(chunk.frames),
            effect=dataclasses.asdict(chunk.own_effect) if chunk.own_effect and chunk.state.guided else None,
            seconds=round(item.seconds, 4),
            fps=round(item.fps, 2),
            **describe_state(chunk.state, self.form.guidance),
        )
        self.num_frames = item.end
        try:
            if self._broken():
                self._restart()
            else:
                self._send(item)
        finally:
            # After the viewer's frames, since its first frame starts an ffmpeg; also for one who has left meanwhile.
            if self.recorder is not None and not self.recorder.full:
                self._record(self.recorder, item)

    def idle(self) -> None:
        """Mend an encoder that has died, or change it where the client has asked."""
        if self._broken():
            self._restart()

    def finish(self, error: BaseException | None) -> None:
        """Send the last frames."""
        if self._encoder is not None:
            if error is None and self._encoder_used:
                try:
                    self._flush()
                except (OutputError, Gone) as problem:
                    error = problem
            self._encoder.abort()
        self._unseen.clear()
        self._encoder = None
        self._stream.ended(error)
        if self.recorder is not None:
            self.recorder.seal()

    def _send(self, item: SentChunk) -> None:
        assert self._encoder is not None
        self._encoder_used = True
        try:
            self._encoder.write(item.frames)
        except OutputError:
            self._restart()

    def _flush(self) -> None:
        """End the encoder; one that was killed shortly before is replaced, so that its last frames are not lost."""
        assert self._encoder is not None
        try:
            self._encoder.finish()
        except OutputError:
            self._restart()
            self._encoder.finish()

    def _broken(self) -> bool:
        dead = isinstance(self._encoder, StreamSink) and not self._encoder.running
        return dead or self.wanted_kind != self.kind

    def _restart(self) -> None:
        """A new encoder, from the first chunk on that the viewer has not seen to its end."""
        while not self._replace():
            pass

    def _replace(self) -> bool:
        """One attempt at that; False where the new encoder is killed as well."""
        assert self._encoder is not None
        self._encoder.abort()
        if self.outgoing.closed:
            raise Gone("the client has left")
        self._restarts += 1
        if self._restarts > MAX_RESTARTS:
            raise OutputError("the video encoder failed again and again; the frames made so far can be downloaded")
        self.kind = self.wanted_kind
        waiting = list(self._unseen)
        first = waiting[0].first_frame if waiting else self.num_frames
        # Before the encoder can send anything: what follows this message belongs to the new video.
        self.outgoing.say("media", media=self.kind, mime=KINDS[self.kind].mime, first_frame=first)
        self._open(first)
        try:
            for item in waiting:
                self._encoder.write(item.frames)
        except OutputError:
            return False
        self._encoder_used = bool(waiting)
        return True

    def _open(self, first_frame: int) -> None:
        form = self.form
        self._encoder = open_encoder(self.kind, self.outgoing, form.sent_size, form.fps, first_frame, form.scale)

    def _record(self, recorder: Recorder, item: SentChunk) -> None:
        recorder.write(self._recorded(item))
        if recorder.full:
            kept = f"{recorder.max_frames / recorder.fps:g} s"
            self.outgoing.say("note", message=f"the first {kept} are kept for download; the timeline goes on")

    def _recorded(self, item: SentChunk) -> Frames:
        if item.plain is None:
            return item.chunk.frames
        pair = [enlarge(frames, self.form.scale) for frames in (item.plain, item.chunk.frames)]
        state = item.chunk.state
        return side_by_side(pair, comparison_labels(state.guidance, state.negatives[0]))


class Recorder:
    """Frames into parts of an MP4; a download ends the part that is being written and joins all of them.

    Args:
        folder: where its own folder is made.
        max_frames: what comes after these is not kept.
        scale: integer upscaling.
    """

    def __init__(self, folder: Path, fps: float, max_frames: int, scale: int) -> None:
        self.fps = fps
        self.max_frames = max_frames
        self.num_frames = 0
        self._scale = scale
        self._folder = Path(tempfile.mkdtemp(prefix="recording-", dir=folder))
        self._parts: list[Path] = []
        self._sink: FfmpegSink | None = None
        self._lock = threading.Lock()
        self._closed = False

    @property
    def full(self) -> bool:
        """Whether nothing more is kept."""
        return self.num_frames >= self.max_frames

    def write(self, frames: Frames) -> None:
        """Keep frames, up to the limit. Never raises: a recording that fails must not end a stream."""
        with self._lock:
            frames = frames[: self.max_frames - self.num_frames]
            if self._closed or not len(frames):
                return
            if self._sink is None:
                self._sink = FfmpegSink(self._folder / f"part{len(self._parts)}.mp4", self.fps, scale=self._scale)
            self.num_frames += len(frames)
            try:
                self._sink.write(frames)
            except OutputError:  # What was given to a killed ffmpeg is kept; the next frames start a new part.
                self._end_part()

    def seal(self) -> None:
        """End the running part: called when the stream ends, so that a download finds it ready."""
        with self._lock:
            self._end_part()

    def save(self, metadata: dict[str, Any]) -> Path:
        """Everything so far as one MP4 in a file of its own, which the caller removes.

        Raises:
            OutputError: there is nothing, or it cannot be written.
        """
        with self._lock:
            self._end_part()
            if self._closed or not self._parts:
                raise OutputError("nothing was recorded")
            handle, name = tempfile.mkstemp(suffix=".mp4", dir=self._folder)
            os.close(handle)
            joined = self._folder / "joined.mp4"
            join(self._parts, joined)
            FORMATS[".mp4"].convert(joined, Path(name), to_json(metadata))
            joined.unlink()
            return Path(name)

    def close(self) -> None:
        """Forget everything, files included."""
        with self._lock:
            self._closed = True
            if self._sink is not None:
                self._sink.abort()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _end_part(self) -> None:
        if self._sink is None:
            return
        sink, self._sink = self._sink, None
        with contextlib.suppress(OutputError):
            sink.finish()
        if (kept := sink.abort()) is not None:
            self._parts.append(kept)
