"""The way of a stream's chunks to its viewer: encoder, messages, recording; runs in the stream's own thread."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nasa_video.errors import OutputError
from nasa_video.files.frames import Frames, enlarge
from nasa_video.files.live_sinks import StreamSink
from nasa_video.files.sheets import comparison_labels, side_by_side
from nasa_video.serve.media import KINDS, MediaEncoder, open_encoder
from nasa_video.serve.outgoing import Gone, Outgoing
from nasa_video.serve.protocol import describe_state
from nasa_video.serve.recorder import Recorder
from nasa_video.video.pipeline import Chunk

MAX_RESTARTS = 5


@dataclass(frozen=True)
class Picture:
    """Size (pixels, as the model makes it), rate and integer upscaling of a stream's pictures.

    ``chunk_frames``: pictures of every chunk but the first.
    """

    height: int
    width: int
    fps: float
    scale: int
    compare: bool
    chunk_frames: int

    @property
    def sent_size(self) -> tuple[int, int]:
        """(height, width) of what is encoded: both videos beside each other where they are compared."""
        return self.height, self.width * (2 if self.compare else 1)


@dataclass(frozen=True)
class Made:
    """A finished chunk, with its unguided twin where they are compared.

    ``seconds`` is what the model took, ``fps`` the rate at which this viewer's frames are made, waiting included.
    """

    chunk: Chunk
    plain: Frames | None
    first_frame: int
    seconds: float
    fps: float

    @property
    def sent(self) -> Frames:
        """What is encoded for the viewer."""
        frames: Frames = self.chunk.frames
        return frames if self.plain is None else np.concatenate([self.plain, frames], axis=2)


class Delivery:
    """Sends chunks to one client and records them (a `Consumer`).

    Args:
        kind: one of `KINDS`.
        position: frames that the viewer has seen.
        freed: called when there is room for another chunk.
        finished: called once at the end, with the error that ended it.
    """

    def __init__(
        self,
        picture: Picture,
        kind: str,
        outgoing: Outgoing,
        recorder: Recorder | None,
        position: Callable[[], int],
        freed: Callable[[], None],
        finished: Callable[[BaseException | None], None],
    ) -> None:
        self.picture = picture
        self.kind = kind
        self.outgoing = outgoing
        self.recorder = recorder
        self.num_frames = 0
        self.wanted_kind = kind
        self._position, self._freed, self._finished = position, freed, finished
        self._encoder: MediaEncoder | None = None
        self._unseen: deque[Made] = deque()
        self._encoder_used = False
        self._restarts = 0

    def begin(self) -> None:
        """Start the encoder, while the first chunk is being made."""
        self._open(0)

    def consume(self, item: Made) -> None:
        """Tell of a chunk, then send and record it."""
        self._freed()
        chunk = item.chunk
        self._unseen.append(item)
        while self._unseen[0] is not item and self._end_of(self._unseen[0]) <= self._position():
            self._unseen.popleft()
        self.outgoing.say(
            "chunk",
            index=chunk.index,
            first_frame=item.first_frame,
            frames=len(chunk.frames),
            effect=dataclasses.asdict(chunk.own_effect) if chunk.own_effect and chunk.state.guided else None,
            seconds=round(item.seconds, 4),
            fps=round(item.fps, 2),
            **describe_state(chunk.state),
        )
        self.num_frames = self._end_of(item)
        try:
            if self._broken():
                self._restart()
            else:
                self._send(item)
        finally:
            # After the viewer's pictures, since its first frame starts an ffmpeg; also for one who has left meanwhile.
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
        self._finished(error)
        if self.recorder is not None:
            self.recorder.seal()

    def _end_of(self, item: Made) -> int:
        return item.first_frame + len(item.chunk.frames)

    def _send(self, item: Made) -> None:
        assert self._encoder is not None
        self._encoder_used = True
        try:
            self._encoder.write(item.sent)
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
                self._encoder.write(item.sent)
        except OutputError:
            return False
        self._encoder_used = bool(waiting)
        return True

    def _open(self, first_frame: int) -> None:
        picture = self.picture
        self._encoder = open_encoder(
            self.kind, self.outgoing, picture.sent_size, picture.fps, first_frame, picture.scale
        )

    def _record(self, recorder: Recorder, item: Made) -> None:
        recorder.write(self._recorded(item))
        if recorder.full:
            kept = f"{recorder.max_frames / recorder.fps:g} s"
            self.outgoing.say("note", message=f"the first {kept} are kept for download; the timeline goes on")

    def _recorded(self, item: Made) -> Frames:
        if item.plain is None:
            return item.chunk.frames
        pair = [enlarge(frames, self.picture.scale) for frames in (item.plain, item.chunk.frames)]
        state = item.chunk.state
        return side_by_side(pair, comparison_labels(state.guidance, state.negatives[0] if state.negatives else ()))
