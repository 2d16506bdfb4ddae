"""A video that plays while it is made: the scheduler's side."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from nasa_video.errors import InputError
from nasa_video.files.frames import Frames
from nasa_video.serve.delivery import Delivery, Recorder, SentChunk, StreamFormat
from nasa_video.serve.media import KINDS, Gone, Outgoing
from nasa_video.serve.protocol import Command, Media, Position, Start, Update, describe_state
from nasa_video.serve.settings import MAX_PENDING
from nasa_video.serve.states import LiveStates
from nasa_video.serve.worker import Production, Worker, explain_failure
from nasa_video.video.pipeline import Chunk
from nasa_video.video.request import PromptStateOf, VideoRequest

if TYPE_CHECKING:
    from nasa_video.serve.server_state import ServerState

Pair = tuple[Chunk, Frames | None]
"""A chunk and its unguided twin's frames."""
_SLACK_SECONDS = 0.25
_HELD_FRAMES = 4
"""An encoder holds its newest frame back until the next, and browsers stop a little before the end of their buffer."""


class LiveStream(Production[Pair, SentChunk]):
    """One client's stream.

    A chunk is made just before the viewer needs it, so that what was typed meanwhile acts on it. Whoever has not said
    that anything was shown, gets two chunks.

    Args:
        on_end: called once, when nothing more will be sent.

    ``made`` is the number of frames that were made so far.
    """

    def __init__(
        self,
        server: ServerState,
        key: str,
        start: Start,
        outgoing: Outgoing,
        on_end: Callable[[LiveStream], None],
    ) -> None:
        super().__init__(server, key, start.model)
        self.start = start
        if start.frames is not None and start.frames > server.settings.max_frames:
            raise InputError(
                f"at most {server.settings.max_frames} frames, got {start.frames}; leave it out for no end"
            )
        self.recorder: Recorder | None = None
        self.has_ended = threading.Event()
        self.made = 0
        self._outgoing, self._on_end = outgoing, on_end
        self._updates: deque[Update] = deque()
        self._paused = False
        self._states: LiveStates | None = None
        self._delivery: Delivery | None = None
        self._position = 0
        self._wanted_since: float | None = None
        self._moved_at = time.monotonic()
        self._waits: deque[float] = deque(maxlen=3)

    # What the client says; called by the event loop.

    def receive(self, message: Update | Media | Position | Command) -> None:
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
        self.server.scheduler.wake()

    def timeline(self) -> VideoRequest | None:
        """What makes the frames that were sent so far again; None before there is one."""
        if self._states is None or self._delivery is None or not self._delivery.num_frames:
            return None
        request = VideoRequest(seed=0).merged(self.start).merged(VideoRequest(model=self.model))
        return self._states.timeline(request, self._delivery.num_frames)

    def discard(self) -> None:
        """End it, and delete its recording."""
        self.close("left")
        if self.recorder is not None:
            self.recorder.close()

    # The task; called by the scheduler.

    @property
    def endless(self) -> bool:
        """One with an end gives way as well, once its viewer has let it wait for a whole turn."""
        if self.start.frames is None:
            return True
        held_up = self._worker is not None and not self._wants_more()
        return held_up and time.monotonic() - self._moved_at > self.server.settings.turn_seconds

    def ready(self) -> bool:
        if self._over:
            return False
        if self._worker is None or self._updates:
            return True
        if not self._wants_more():
            self._wanted_since = None
            return False
        if self._wanted_since is None:
            self._wanted_since = time.monotonic()
        return True

    def step(self) -> bool:
        if self._worker is None:
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
        rate = len(chunk.frames) * len(self._waits) / sum(self._waits)
        assert self._worker is not None
        self._worker.put(SentChunk(chunk, plain, self.made, now - began, rate))
        self.made += len(chunk.frames)
        if self.made != self.start.frames:
            return True
        # At once: an end that waited for the viewer to get there would keep a place that nobody needs.
        self.close("finished")
        return False

    def queued(self, place: int) -> None:
        if place:
            self._outgoing.say("queued", place=place)

    def _begin(self) -> None:
        form, source = self._open()
        settings = self.server.settings
        with self._lock:
            if self._over:
                raise Gone("the client has left")
            self._source = source
            if settings.record_seconds:
                limit = round(settings.record_seconds * form.fps)
                self.recorder = Recorder(self.server.folder, form.fps, limit, 1 if form.compare else form.scale)
            self._say_started(form)
            self._say_notes()
            self._delivery = Delivery(self, form, self._outgoing)
            self._worker = Worker("nasa-video stream", self._delivery)

    def _open(self) -> tuple[StreamFormat, Iterator[Pair]]:
        """Where the chunks come from; checks what was asked for, and generates nothing yet."""
        start = self.start
        pipeline = self.server.registry.get(self.model)
        states = self._states = LiveStates(pipeline, start)

        own = ("prompt", "seed", "frames", "steps", "first_chunk_steps")
        request = VideoRequest(**{name: getattr(start, name) for name in own})

        def chunks(state_of: PromptStateOf) -> Iterator[Chunk]:
            return pipeline.stream(request, states=self.while_wanted(state_of), endless=start.frames is None)

        form = StreamFormat.of(pipeline, compare=bool(start.compare))
        guided = chunks(states)
        if not form.compare:
            return form, ((chunk, None) for chunk in guided)
        plain = chunks(lambda chunk: states(chunk).unguided)
        return form, ((chunk, next(plain).frames) for chunk in guided)

    def _say_started(self, form: StreamFormat) -> None:
        height, width = form.sent_size
        kind = self.start.media[0]
        self._outgoing.say(
            "started",
            stream=self.key,
            media=kind,
            mime=KINDS[kind].mime,
            fps=form.fps,
            width=width * form.scale,
            height=height * form.scale,
            model=self.model,
            seed=self.start.seed or 0,
            compare=form.compare,
            frames=self.start.frames,
            **self._now(),
        )

    def _now(self) -> dict[str, object]:
        """What the next chunk shows, as the client would be told of it."""
        states = self._states
        return {} if states is None else describe_state(states.state, states.pipeline.preset.guidance)

    def _change(self, update: Update) -> None:
        assert self._states is not None
        try:
            self._states.change(update)
        except InputError as error:
            self._outgoing.say("error", code="refused", message=str(error), id=update.id)
        else:
            self._outgoing.say("accepted", from_chunk=self._states.next_chunk, id=update.id, **self._now())
            self._say_notes()

    def _say_notes(self) -> None:
        for note in self._states.notes if self._states else ():
            self._outgoing.say("note", message=note)

    def note_failure(self, error: BaseException) -> None:
        if not isinstance(error, Gone):
            self._outgoing.say("error", code="failed", message=explain_failure(error))

    def _wants_more(self) -> bool:
        """False where it is its viewer who lets it wait, not the scheduler."""
        assert self._worker is not None
        return not self._paused and self._worker.has_room and self._viewer_needs_more()

    def _viewer_needs_more(self) -> bool:
        """Whether what the viewer has not seen yet lasts no longer than making more will take."""
        assert self._delivery is not None
        form = self._delivery.form
        if not self._position:
            # Something to begin with, however fast chunks are made; the first is the shortest, so these are two.
            return self.made <= form.chunk_frames
        lead = form.fps * (_SLACK_SECONDS + 1.5 * max(self._waits, default=0.0)) + _HELD_FRAMES
        return self.made - self._position <= min(lead, 2 * form.chunk_frames)

    @property
    def position(self) -> int:
        """Frames that the viewer has seen."""
        return self._position

    def _move_to(self, frame: int) -> None:
        if frame > self._position:
            self._position = frame
            self._moved_at = time.monotonic()

    def ended(self, error: BaseException | None) -> None:
        super().ended(error)
        frames = self._delivery.num_frames if self._delivery else 0
        self._outgoing.say("ended", stream=self.key, reason=self.reason, frames=frames)
        self.has_ended.set()
        self._on_end(self)
