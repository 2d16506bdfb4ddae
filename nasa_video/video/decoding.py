"""Latents to chunks of pictures, in turn with the model or beside it."""

# B batch, T latent frames, F pictures, C channels, h w latent height and width, H W picture height and width

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from nasa_video.guidance.state import Effect
from nasa_video.video.timeline import Cue

T = TypeVar("T")


@dataclass(frozen=True)
class Made:
    """Finished latents of a chunk, and what was known when they were made.

    Attributes:
        latents: (B, T, C, h, w), normalised.
        shown: its pictures are given on; those of a given prefix are only seen by the decoder.
        restart: latents with which a new rollout begins: the decoder forgets, sees them, and their pictures are left
            out, since the rollout before has shown them. None goes on.
    """

    index: int
    latents: Tensor
    cue: Cue
    effect: Effect | None = None
    own_effect: Effect | None = None
    shown: bool = True
    restart: Tensor | None = None


class DecodeQueue(Generic[T]):
    """Decodes in order; at most ``ahead`` chunks wait while the model goes on with the next.

    With ``ahead`` = 0 each is decoded at once. Otherwise a thread does it, on CUDA in a stream of its own: chunks come
    later by ``ahead``, and the working memory of model and decoder is taken at the same time. What decoding raises is
    raised where the next chunk is asked for. Use as a context manager: leaving it drops what waits, and ends the
    thread after what it is at.
    """

    def __init__(self, decode: Callable[[Made], T], ahead: int, device: torch.device) -> None:
        self._decode = decode
        self._ahead = ahead
        self._waiting: deque[Future[T]] = deque()
        self._latest: Future[T] | None = None
        self._thread = ThreadPoolExecutor(1, "nasa-video-decode") if ahead else None
        self._stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None

    def __enter__(self) -> DecodeQueue[T]:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def put(self, made: Made) -> Iterator[T]:
        """Decode a chunk; yields what is to be given on now, in order."""
        if self._thread is None:
            future: Future[T] = Future()
            future.set_result(self._decode(made))
        else:
            future = self._thread.submit(self._beside, made, self._mark())
        self._waiting.append(future)
        self._latest = future
        while len(self._waiting) > self._ahead:
            yield self._waiting.popleft().result()

    def rest(self) -> Iterator[T]:
        """What still waits."""
        while self._waiting:
            yield self._waiting.popleft().result()

    def latest(self) -> T:
        """The chunk that was put last; waits for it. It is yielded in its turn all the same."""
        assert self._latest is not None
        return self._latest.result()

    def _mark(self) -> Any:
        return None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()

    def _beside(self, made: Made, ready: Any) -> T:
        if self._stream is None:
            return self._decode(made)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            if made.latents.is_cuda:  # those of a given prefix may wait in the host's memory
                made.latents.record_stream(self._stream)
            return self._decode(made)
