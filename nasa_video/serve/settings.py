"""What an operator may set, with limits that keep one machine useful to several people."""

from __future__ import annotations

from dataclasses import dataclass

from nasa_video.guidance.attention import Backend
from nasa_video.models.presets import DEFAULT_MODEL

MAX_MESSAGE_BYTES = 64 * 1024
"""Longest message or request body that is read at all."""
MAX_PROMPT = 2000
MAX_NEGATIVE = 400
MAX_NEGATIVES = 16
MAX_GUIDANCE = 400
"""Characters of a method's spelling, and of a model's name."""
MAX_ENTRIES = 200
"""Of a job's timeline."""
MAX_CHANGES = 5000
"""Changes that one stream's timeline keeps; after these it must be started anew."""
MAX_PENDING = 8
"""Changes that wait until the worker has looked at them: each encodes its texts, in one of its stream's turns."""


@dataclass(frozen=True)
class ServeSettings:
    """Settings of one server.

    Attributes:
        models: what clients may choose from, the first by default: presets, folders or hub ids, as the operator names
            them. Nothing that a client sends is ever opened.
        device, attention: as in ``VideoPipeline.from_pretrained``.
        memory: see ``memory_plan.MEMORY_CHOICES``; None is "full".
        token: needed by every client; None needs none (loopback only).
        allowed_hosts: names besides localhost and IP addresses that a browser may call the server by.
        max_sessions: open WebSockets.
        max_streams: streams and jobs that hold a place at once, in turns of one chunk; each holds a key-value cache.
        max_waiting: streams and jobs that wait for a place.
        turn_seconds: how long a stream keeps its place while others wait, if it has no end, or if its viewer has not
            moved on for so long.
        max_frames: longest job, and longest stream that is not endless.
        max_results: finished streams and jobs that are kept for download.
        keep_seconds: how long they are kept.
        record_seconds: how much of a stream is recorded for download; 0 records nothing.
        messages_per_second: of one client, on average; twice as many at once.
        posts_per_second: that change something, of one client address, likewise.
    """

    models: tuple[str, ...] = (DEFAULT_MODEL,)
    device: str | None = None
    attention: Backend = "sdpa"
    memory: str | None = None
    token: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    max_sessions: int = 64
    max_streams: int = 4
    max_waiting: int = 32
    turn_seconds: float = 120.0
    max_frames: int = 1200
    max_results: int = 16
    keep_seconds: float = 600.0
    record_seconds: float = 600.0
    messages_per_second: float = 30.0
    posts_per_second: float = 5.0
