"""A video that plays while it is made: the worker's side."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from nasa_video.errors import InputError
from nasa_video.files.frames import Frames
from nasa_video.serve.cues import LiveCues
from nasa_video.serve.delivery import Delivery, Made, Picture
from nasa_video.serve.feeder import Feeder
from nasa_video.serve.library import Library
from nasa_video.serve.media import KINDS
from nasa_video.serve.messages import message_of
from nasa_video.serve.outgoing import Gone, Outgoing
from nasa_video.serve.protocol import Command, Media, Position, Start, Update, Wanted
from nasa_video.serve.recorder import Recorder
from nasa_video.serve.settings import MAX_PENDING, ServeSettings
from nasa_video.video.pipeline import Chunk
from nasa_video.video.request import PromptStateOf, VideoRequest

log = logging.getLogger(__name__)
Reason = Literal["finished", "stopped", "turn over", "failed", "left"]
Pair = tuple[Chunk, Frames | None]
"""A chunk and its unguided twin's frames."""
_SLACK_SECONDS = 0.25
_HELD_FRAMES = 4
"""An encoder holds its newest frame back until the next, and browsers stop a little before the end of their buffer."""


class LiveStream:
    """One client's stream (a `Task`).

    A chunk is made just before the viewer needs it, so that what was typed meanwhile acts on it. Whoever has not said
    that anything was shown, gets two chunks.

    Args:
        key: names it in URLs; whoever knows it may download.
        wake: tells the worker that `ready` may have changed.
        ended: called once, when nothing more will be sent.

    ``made`` is the number of frames that were made so far.
    """

    def __init__(
        self,
        key: str,
        start: Start,
        library: Library,
        settings: ServeSettings,
        folder: Path,
        outgoing: Outgoing,
        wake: Callable[[], None],
        ended: Callable[[LiveStream], None],
    ) -> None:
        self.key = key
        self.start = start
        self.model = library.name(start.model)
        self.recorder: Recorder | None = None
        self.reason: Reason = "finished"
        self.has_ended = threading.Event()
        self.made = 0
        self._library, self._settings, self._folder = library, settings, folder
        self._outgoing, self._wake, self._ended = outgoing, wake, ended
        self._wanted: Wanted = start
        self._updates: deque[Update] = deque()
        self._paused = self._over = False
        self._cues: LiveCues | None = None
        self._picture: Picture | None = None
        self._source: Iterator[Pair] | None = None
        self._feeder: Feeder[Made] | None = None
        self._delivery: Delivery | None = None
        self._lock = threading.Lock()
        self._position = 0
        self._wanted_since: float | None = None
        self._moved_at = time.monotonic()
        self._waits: deque[float] = deque(maxlen=3)

    # What the client says; called by the event loop.

    def hear(self, message: Update | Media | Position | Command) -> None:
        """Take a message that is for the stream.

        Raises:
            InputError: changes come faster than they can be looked at.
        """
        if isinstance(message, Position):
            # One for the stream before may come late.
            if message.stream == self.key:
                self._move_to(min(message.frame, self.made))
        elif isinstance(message, Update):
            if len(self._updates) >= MAX_PENDING:
                raise InputError(f"{MAX_PENDING} changes are waiting to be looked at, so this one was left out")
            self._updates.append(message)
        elif isinstance(message, Media):
            if self._delivery is not None:
                self._delivery.wanted_kind = message.media[0]
        elif message.type == "stop":
            self.close("stopped")
        else:
            self._paused = message.type == "pause"
            self._outgoing.say("state", state="paused" if self._paused else "playing")
        self._wake()

    def close(self, reason: Reason) -> None:
        """Stop as soon as may be: before the model's next call. What was made is still sent, except to who has left."""
        with self._lock:
            if self._over:
                return
            self._over = True
            self.reason = reason
            if self._cues is not None:
                self._cues.closed = True
            self._source = None
            feeder = self._feeder
        if feeder is None:
            self._finish(None)
        else:
            feeder.end(cancel=reason == "left")

    def timeline(self) -> VideoRequest | None:
        """What makes the frames that were sent so far again; None before there is one."""
        if self._cues is None or self._delivery is None or not self._delivery.num_frames:
            return None
        start, frames = self.start, self._delivery.num_frames
        return self._cues.timeline(self.model, start.seed, start.steps, start.first_steps, frames)

    def join(self, timeout: float | None = None) -> None:
        """Wait until everything is sent, or nothing can be any more; only after `close`."""
        if self._feeder is not None:
            self._feeder.join(timeout)

    # The task; called by the worker.

    @property
    def endless(self) -> bool:
        """Whether nobody knows when it will end: it has no last frame, or its viewer has held it up for a turn."""
        if self.start.frames is None:
            return True
        held_up = self._feeder is not None and self._held_up(self._feeder)
        return held_up and time.monotonic() - self._moved_at > self._settings.turn_seconds

    def ready(self) -> bool:
        if self._over:
            return False
        if self._feeder is None or self._updates:
            return True
        if self._held_up(self._feeder):
            self._wanted_since = None
            return False
        if self._wanted_since is None:
            self._wanted_since = time.monotonic()
        return True

    def step(self) -> bool:
        if self._feeder is None:
            self._begin()
        if self._updates:
            self._change(self._updates.popleft())
            if self._updates:  # One a turn: whoever sends many of them holds up no other stream.
                return not self._over
        source = self._source
        if source is None or self._paused or not self._viewer_needs_more():
            return not self._over
        began = time.monotonic()
        chunk, plain = next(source, (None, None))
        if chunk is None:
            self.close("finished")
            return False
        now = self._moved_at = time.monotonic()
        self._waits.append(now - (self._wanted_since or began))
        self._wanted_since = None
        made = Made(chunk, plain, self.made, now - began, len(chunk.frames) * len(self._waits) / sum(self._waits))
        self.made += len(chunk.frames)
        assert self._feeder is not None
        self._feeder.put(made)
        if self.made != self.start.frames:
            return True
        # At once: an end that waited for the viewer to get there would keep a place that nobody needs.
        self.close("finished")
        return False

    def fail(self, error: BaseException) -> None:
        if not isinstance(error, Gone):
            self._outgoing.say("error", code="failed", message=message_of(error))
        self.close("failed")

    def expire(self) -> None:
        self.close("turn over")

    def told_place(self, place: int) -> None:
        if place:
            self._outgoing.say("queued", place=place)

    def _begin(self) -> None:
        start = self.start
        if start.frames is not None and start.frames > self._settings.max_frames:
            raise InputError(f"at most {self._settings.max_frames} frames, got {start.frames}; leave it out for no end")
        picture, source = self._open()
        with self._lock:
            if self._over:
                raise Gone("the client has left")
            self._picture, self._source = picture, source
            if self._settings.record_seconds:
                limit = round(self._settings.record_seconds * picture.fps)
                self.recorder = Recorder(self._folder, picture.fps, limit, 1 if picture.compare else picture.scale)
            kind = start.media[0]
            self._say_started(kind, picture)
            if self._cues is not None:
                self._say_notes(self._cues)
            self._delivery = Delivery(
                picture, kind, self._outgoing, self.recorder, lambda: self._position, self._wake, self._finish
            )
            self._feeder = Feeder("nasa-video stream", self._delivery)

    def _open(self) -> tuple[Picture, Iterator[Pair]]:
        """Where the chunks come from; checks what was asked for, and generates nothing yet."""
        start = self.start
        pipeline = self._library.get(self.model)
        cues = self._cues = LiveCues(pipeline, start)

        def chunks(states: PromptStateOf) -> Iterator[Chunk]:
            return pipeline.stream(
                start.prompt,
                states=states,
                seed=start.seed,
                frames=start.frames,
                endless=start.frames is None,
                steps=start.steps,
                first_chunk_steps=start.first_steps,
            )

        guided = chunks(cues)
        video = pipeline.preset.video
        chunk_frames = pipeline.frames_until(2) - pipeline.frames_until(1)
        picture = Picture(video.height, video.width, video.fps, video.upscale, start.compare, chunk_frames)
        if not start.compare:
            return picture, ((chunk, None) for chunk in guided)
        plain = chunks(lambda chunk: cues(chunk).unguided)
        return picture, ((chunk, next(plain).frames) for chunk in guided)

    def _say_started(self, kind: str, picture: Picture) -> None:
        height, width = picture.sent_size
        self._outgoing.say(
            "started",
            stream=self.key,
            media=kind,
            mime=KINDS[kind].mime,
            fps=picture.fps,
            width=width * picture.scale,
            height=height * picture.scale,
            model=self.model,
            seed=self.start.seed,
            compare=picture.compare,
            frames=self.start.frames,
        )

    def _change(self, update: Update) -> None:
        assert self._cues is not None
        try:
            self._cues.change(update.applied_to(self._cues.wanted))
        except InputError as error:
            self._outgoing.say("error", code="refused", message=str(error), id=update.id)
        else:
            self._outgoing.say("accepted", from_chunk=self._cues.next_chunk, id=update.id)
            self._say_notes(self._cues)

    def _say_notes(self, cues: LiveCues) -> None:
        for note in cues.notes:
            self._outgoing.say("note", message=note)

    def _held_up(self, feeder: Feeder[Made]) -> bool:
        """Whether it is its viewer who lets it wait, not the worker."""
        return self._paused or not feeder.has_room or not self._viewer_needs_more()

    def _viewer_needs_more(self) -> bool:
        """Whether what the viewer has not seen yet lasts no longer than making more will take."""
        assert self._picture is not None
        chunk_frames = self._picture.chunk_frames
        if not self._position:
            # Something to begin with, however fast chunks are made; the first is the shortest, so these are two.
            return self.made <= chunk_frames
        lead = self._picture.fps * (_SLACK_SECONDS + 1.5 * max(self._waits, default=0.0)) + _HELD_FRAMES
        return self.made - self._position <= min(lead, 2 * chunk_frames)

    def _move_to(self, frame: int) -> None:
        if frame > self._position:
            self._position = frame
            self._moved_at = time.monotonic()

    def _finish(self, error: BaseException | None) -> None:
        """The stream's own thread has sent everything, or cannot go on."""
        if error is not None and not isinstance(error, Gone):
            self.reason = "failed"
            self._outgoing.say("error", code="failed", message=message_of(error))
        with self._lock:
            self._over = True
            if self._cues is not None:
                self._cues.closed = True
            self._source = None
        frames = self._delivery.num_frames if self._delivery else 0
        self._outgoing.say("ended", stream=self.key, reason=self.reason, frames=frames)
        self.has_ended.set()
        self._ended(self)
