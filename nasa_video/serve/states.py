"""What each chunk of a running stream shows, and the timeline that makes the same again."""

from __future__ import annotations

import dataclasses
import threading
import warnings

from nasa_video.errors import InputError
from nasa_video.guidance.methods import ClassifierFree, Guidance
from nasa_video.serve.protocol import describe_state
from nasa_video.serve.settings import MAX_CHANGES
from nasa_video.text.vocabulary import describe_unknown_words, find_vocabulary
from nasa_video.video.pipeline import VideoPipeline
from nasa_video.video.request import (
    PromptRequest,
    PromptState,
    PromptWarning,
    TimelineEntry,
    VideoRequest,
    find_guidance,
)


class LiveStates:
    """A `PromptStateOf` that may change: a change acts from the next chunk that is begun.

    ``wanted`` is checked against the model before it counts, since a stream that raises has ended. ``notes``: what its
    texts' reader should know.

    Raises:
        InputError: as `check`.
    """

    def __init__(self, pipeline: VideoPipeline, wanted: PromptRequest) -> None:
        self.pipeline = pipeline
        self.wanted = PromptRequest().merged(wanted)
        self.notes: list[str] = []
        self._lock = threading.Lock()
        self._fixed: dict[int, PromptState] = {}
        self._changes: list[tuple[int, PromptState]] = []
        self._state = self.check(self.wanted)

    @property
    def state(self) -> PromptState:
        """What the next chunk will show."""
        return self._state

    @property
    def next_chunk(self) -> int:
        """The chunk from which a change acts."""
        with self._lock:
            return max(self._fixed, default=-1) + 1

    def check(self, wanted: PromptRequest) -> PromptState:
        """The prompt state, if the model can show it.

        Raises:
            InputError: a scale that the method cannot take, a negative that cannot act, a change that a running stream
                cannot make, or too many changes.
        """
        preset = self.pipeline.preset
        state = PromptState.of(
            wanted.prompt or "",
            wanted.negatives,
            find_guidance(wanted.guidance, preset),
            wanted.on_change or preset.sampler.on_change,
        )
        if self._changes:
            first = self._changes[0][1].guidance
            if state.guidance and isinstance(state.guidance, ClassifierFree) != isinstance(first, ClassifierFree):
                raise InputError("a running video cannot change to or from classifier-free guidance; press Restart")
            if len(self._changes) >= MAX_CHANGES:
                raise InputError(f"a stream takes {MAX_CHANGES} changes; start another one")
            if _same_keys(state, self._state):
                self.notes = []
                return state
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PromptWarning)
            # Not as a stream of its own, for which there may be no memory beside the one that runs.
            self.pipeline.check_state(state)
        self.notes = [str(warning.message) for warning in caught if issubclass(warning.category, PromptWarning)]
        texts = [*state.prompts, *(negative.text for negative in state.negatives[0])]
        unknown = describe_unknown_words(find_vocabulary(preset.vocabulary), texts, self.pipeline.text_encoder)
        self.notes += [unknown] if unknown else []
        return state

    def change(self, change: PromptRequest) -> None:
        """From the next chunk on show something else.

        Raises:
            InputError: as `check`; everything stays as it was.
        """
        wanted = self.wanted.merged(change)
        state = self.check(wanted)
        with self._lock:
            self._state, self.wanted = state, wanted

    def __call__(self, chunk: int) -> PromptState:
        with self._lock:
            if chunk not in self._fixed:
                self._fixed[chunk] = self._state
                # The chunk before is still asked for: by the pass that writes its keys, and to see what is new.
                self._fixed.pop(chunk - 3, None)
                if not self._changes or self._changes[-1][1] != self._state:
                    self._changes.append((chunk, self._state))
            return self._fixed[chunk]

    def timeline(self, request: VideoRequest, frames: int) -> VideoRequest:
        """What ``generate --timeline`` makes the first ``frames`` frames of a request from again."""
        fps = self.pipeline.preset.video.fps
        with self._lock:
            changes = list(self._changes)
        entries: list[TimelineEntry] = []
        before: dict[str, object] = {}
        for chunk, state in changes:
            shown_before = self.pipeline.frames_until(chunk)
            if shown_before < frames:
                now = describe_state(state, self.pipeline.preset.guidance)
                new = {name: value for name, value in now.items() if name not in before or before[name] != value}
                entries.append(TimelineEntry(at=shown_before / fps, **new))
                before = now
        own = ("model", "seed", "steps", "first_chunk_steps")
        return VideoRequest(**{name: getattr(request, name) for name in own}, frames=frames, timeline=tuple(entries))


def _same_keys(state: PromptState, current: PromptState) -> bool:
    """Whether two states need the same keys of the text encoder: only the scale or the window's treatment differ."""
    if (state.prompts, state.negatives) != (current.prompts, current.negatives) or state.guided > current.guided:
        return False
    return _at_scale_0(state.guidance) == _at_scale_0(current.guidance)


def _at_scale_0(method: Guidance | None) -> Guidance | None:
    return method and dataclasses.replace(method, scale=method.identity)
