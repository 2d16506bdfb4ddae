"""What each chunk of a running stream shows, and the timeline that makes the same again."""

from __future__ import annotations

import threading
import warnings

from nasa_video.errors import InputError
from nasa_video.guidance.methods import ClassifierFree
from nasa_video.serve.outgoing import Gone
from nasa_video.serve.protocol import Wanted
from nasa_video.serve.settings import MAX_CHANGES
from nasa_video.video.controller import PromptWarning
from nasa_video.video.pipeline import VideoPipeline
from nasa_video.video.request import PromptState, TimelineEntry, VideoRequest, spell_fully


class LiveCues:
    """A `PromptStateOf` that may change: a change acts from the next chunk that is begun.

    ``wanted`` is checked against the model before it counts, since a stream that raises has ended. ``notes``: what its
    texts' reader should know.

    Raises:
        InputError: as `check`.
    """

    def __init__(self, pipeline: VideoPipeline, wanted: Wanted) -> None:
        self.pipeline = pipeline
        self.wanted = wanted
        self.closed = False
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._fixed: dict[int, PromptState] = {}
        self._changes: list[tuple[int, PromptState]] = []
        self._cue = self.check(wanted)

    @property
    def next_chunk(self) -> int:
        """The chunk from which a change acts."""
        with self._lock:
            return max(self._fixed, default=-1) + 1

    def check(self, wanted: Wanted) -> PromptState:
        """The cue, if the model can show it.

        Raises:
            InputError: a scale that the method cannot take, a negative that cannot act, a change that a running stream
                cannot make, or too many changes.
        """
        cue = wanted.state(self.pipeline)
        if self._changes:
            first = self._changes[0][1].guidance
            if cue.guidance and isinstance(cue.guidance, ClassifierFree) != isinstance(first, ClassifierFree):
                raise InputError("a running video cannot change to or from classifier-free guidance; start it anew")
            if len(self._changes) >= MAX_CHANGES:
                raise InputError(f"a stream takes {MAX_CHANGES} changes; start it anew")
        if self._changes and _same_texts(wanted, self.wanted) and (self._cue.guided or not cue.guided):
            self.notes = []
            return cue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PromptWarning)
            # Not as a stream of its own, for which there may be no memory beside the one that runs.
            self.pipeline.check_state(cue)
        self.notes = [str(warning.message) for warning in caught if issubclass(warning.category, PromptWarning)]
        self.notes += _unknown_words(self.pipeline, [wanted.prompt, *(term.text for term in wanted.negatives)])
        return cue

    def change(self, wanted: Wanted) -> None:
        """From the next chunk on show something else.

        Raises:
            InputError: as `check`; everything stays as it was.
        """
        cue = self.check(wanted)
        with self._lock:
            self._cue, self.wanted = cue, wanted

    def __call__(self, chunk: int) -> PromptState:
        if self.closed:
            raise Gone("the stream was stopped")
        with self._lock:
            if chunk not in self._fixed:
                self._fixed[chunk] = self._cue
                # The chunk before is still asked for: by the pass that writes its keys, and to see what is new.
                self._fixed.pop(chunk - 3, None)
                if not self._changes or self._changes[-1][1] != self._cue:
                    self._changes.append((chunk, self._cue))
            return self._fixed[chunk]

    def timeline(
        self, model: str, seed: int, steps: int | None, first_chunk_steps: int | None, frames: int
    ) -> VideoRequest:
        """What ``generate --timeline`` makes the first ``frames`` frames from again."""
        fps = self.pipeline.preset.video.fps
        with self._lock:
            changes = list(self._changes)
        entries = []
        before: PromptState | None = None
        for chunk, cue in changes:
            shown_before = self.pipeline.frames_until(chunk)
            if shown_before < frames:
                entries.append(_entry(shown_before / fps, cue, before))
                before = cue
        return VideoRequest(
            model=model, seed=seed, steps=steps, first_chunk_steps=first_chunk_steps, frames=frames,
            timeline=tuple(entries),
        )  # fmt: skip


def _same_texts(one: Wanted, other: Wanted) -> bool:
    """Whether only the scale or what becomes of the window differ, which need no text encoder."""
    return one.model_copy(update={"scale": other.scale, "on_change": other.on_change}) == other


def _unknown_words(pipeline: VideoPipeline, texts: list[str]) -> list[str]:
    if pipeline.preset.vocabulary != "sprites":
        return []
    from nasa_video.sprites.vocabulary import unknown_words

    words = sorted({word for text in texts for word in unknown_words(text, pipeline.text_encoder)})
    if not words:
        return []
    return [f"this model lives in a small world of coloured shapes and has never seen {', '.join(words)}"]


def _entry(at: float, state: PromptState, before: PromptState | None) -> TimelineEntry:
    """What differs from the state before; everything for the first."""

    def new(name: str) -> bool:
        return before is None or getattr(state, name) != getattr(before, name)

    return TimelineEntry(
        at=at,
        prompt=state.prompts[0] if new("prompts") else None,
        negatives=state.negatives[0] if new("negatives") else None,
        guidance=(spell_fully(state.guidance) if state.guidance else "none") if new("guidance") else None,
        on_change=state.on_change if new("on_change") else None,
    )
