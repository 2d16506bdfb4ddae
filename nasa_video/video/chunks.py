"""A chunk's way from latents to frames: finished by the model, decoded in turn or beside it."""

# B batch, T latent frames, F frames, C channels, h w latent height and width, H W height and width in pixels

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from causvid_adapter.rollouts import overlap_pictures
from nasa_video.files.frames import frames_from_tensor
from nasa_video.guidance.state import Effect
from nasa_video.video.request import PromptState

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

    from nasa_video.models.loading import Decoder

# Decoders overshoot a little on any clean frame; only more than this counts as out of range.
RANGE_MARGIN = 0.05


@dataclass(frozen=True)
class LatentChunk:
    """Finished latents of a chunk, and what was known when they were made.

    Attributes:
        latents: (B, T, C, h, w), normalised.
        shown: its frames are given on; those of context latents are only seen by the decoder.
        restart: latents with which a new rollout begins: the decoder forgets, sees them, and their frames are left
            out, since the rollout before has shown them. None goes on.
    """

    index: int
    latents: Tensor
    state: PromptState
    effect: Effect | None = None
    own_effect: Effect | None = None
    shown: bool = True
    restart: Tensor | None = None


@dataclass(frozen=True)
class Chunk:
    """Finished frames of one chunk.

    Attributes:
        index: from 0.
        frames: (F, H, W, 3) uint8 RGB; (B, F, H, W, 3) from ``stream_batch``.
        latents: (B, T, C, h, w), normalised.
        state: what it was made for.
        effect: what guidance did since the video's start; None while nothing was guided.
        own_effect: what it did since the chunk before was finished; None where nothing was guided.
        out_of_range: share of colour values that the decoder put beyond black or white by more than 5 %, one a sample.
    """

    index: int
    frames: np.ndarray[Any, np.dtype[np.uint8]]
    latents: Tensor
    state: PromptState
    effect: Effect | None
    out_of_range: list[float]
    own_effect: Effect | None = None


@dataclass(frozen=True)
class DecodedChunk:
    """A chunk; ``tail`` is the frame (B, 3, H, W) with which another rollout would begin."""

    chunk: Chunk
    shown: bool
    tail: Tensor


class ChunkDecoder:
    """Decodes the chunks of one video, in order.

    Args:
        new_decoder: makes the decoder of a rollout.
        frames_per_chunk: latent frames.
    """

    def __init__(
        self, vae: AutoencoderKLWan, new_decoder: Callable[[AutoencoderKLWan], Decoder], frames_per_chunk: int
    ) -> None:
        self._vae = vae
        self._new_decoder = new_decoder
        self._decoder = new_decoder(vae)
        self._overlap = overlap_pictures(frames_per_chunk, vae.config.scale_factor_temporal)

    def __call__(self, made: LatentChunk) -> DecodedChunk:
        """The chunk's frames."""
        if made.restart is not None:
            self._decoder = self._new_decoder(self._vae)
            self._decoder.decode(made.restart.to(self._vae.device))
        pixels = self._decoder.decode(made.latents.to(self._vae.device), clamp=False)
        out_of_range = (pixels.abs() > 1 + RANGE_MARGIN).float().mean(dim=(1, 2, 3, 4))
        frames = np.stack([frames_from_tensor(sample) for sample in pixels])
        tail = pixels[:, -self._overlap].clamp(-1, 1).clone()
        chunk = Chunk(made.index, frames, made.latents, made.state, made.effect, out_of_range.tolist(), made.own_effect)
        return DecodedChunk(chunk, made.shown, tail)


class DecodeQueue:
    """Decodes in order; at most ``ahead`` chunks wait while the model goes on with the next.

    With ``ahead`` = 0 each is decoded at once. Otherwise a thread does it, on CUDA in a stream of its own: chunks come
    later by ``ahead``, and the working memory of model and decoder is taken at the same time. What decoding raises is
    raised where the next chunk is asked for. Use as a context manager: leaving it drops what waits, and ends the
    thread after what it is at.
    """

    def __init__(self, decode: Callable[[LatentChunk], DecodedChunk], ahead: int, device: torch.device) -> None:
        self._decode = decode
        self._ahead = ahead
        self._waiting: deque[Future[DecodedChunk]] = deque()
        self._latest: Future[DecodedChunk] | None = None
        self._thread = ThreadPoolExecutor(1, "nasa-video-decode") if ahead else None
        self._stream = torch.cuda.Stream(device) if ahead and device.type == "cuda" else None

    def __enter__(self) -> DecodeQueue:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def decoded(self, chunks: Iterator[LatentChunk]) -> Iterator[Chunk]:
        """Every chunk that is shown, decoded."""
        with self:
            for made in chunks:
                yield from (done.chunk for done in self.put(made) if done.shown)
            yield from (done.chunk for done in self.rest() if done.shown)

    def put(self, made: LatentChunk) -> Iterator[DecodedChunk]:
        """Decode a chunk; yields what is to be given on now, in order."""
        if self._thread is None:
            future: Future[DecodedChunk] = Future()
            future.set_result(self._decode(made))
        else:
            future = self._thread.submit(self._beside, made, self._mark())
        self._waiting.append(future)
        self._latest = future
        while len(self._waiting) > self._ahead:
            yield self._waiting.popleft().result()

    def rest(self) -> Iterator[DecodedChunk]:
        """What still waits."""
        while self._waiting:
            yield self._waiting.popleft().result()

    def latest(self) -> DecodedChunk:
        """The chunk that was put last; waits for it. It is yielded in its turn all the same."""
        assert self._latest is not None
        return self._latest.result()

    def _mark(self) -> Any:
        return None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()

    def _beside(self, made: LatentChunk, ready: Any) -> DecodedChunk:
        if self._stream is None:
            return self._decode(made)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            if made.latents.is_cuda:  # context latents may wait in the host's memory
                made.latents.record_stream(self._stream)
            return self._decode(made)
