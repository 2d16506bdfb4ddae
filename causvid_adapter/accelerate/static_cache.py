"""A KV cache whose tensors keep their shapes and places, for ``torch.compile`` and CUDA graphs.

What changes from chunk to chunk is only in tensors: where the chunk's keys go, and which places hold keys. Attention
runs over the whole capacity and masks the rest, so that one graph serves every chunk of a video.
"""

# B batch, S tokens of a chunk, K tokens of the capacity, H heads, D head dim

from __future__ import annotations

import torch
from torch import Tensor

from causvid_adapter.cache import KVCache
from causvid_adapter.errors import ShapeError
from causvid_adapter.window import UNLIMITED, Window


class StaticKVCache(KVCache):
    """A :class:`~causvid_adapter.KVCache` of fixed capacity: the window, or the whole video where that is shorter.

    Raises:
        ShapeError: neither a window nor a length is given, so that there is no capacity.
    """

    def __init__(
        self,
        num_layers: int,
        tokens_per_frame: int,
        window: Window = UNLIMITED,
        num_frames: int | None = None,
    ) -> None:
        if window.frames is None and num_frames is None:
            raise ShapeError(
                "a compiled model needs a window or the video's length, by which its buffers are sized; set a window, "
                "or give the number of frames"
            )
        super().__init__(num_layers, tokens_per_frame, window, num_frames)
        self.capacity = window.capacity(1, 0, num_frames)

    def reset(self) -> None:
        """Forget everything; the next allocation may be of any batch size."""
        super().reset()
        self._slots: Tensor | None = None
        self.mask: Tensor | None = None

    def allocate(self, batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make the buffers, once a video.

        Raises:
            ShapeError: they are there, for another batch.
        """
        first = self._keys[0] if self._keys else None
        if first is not None:
            if first.shape[0] != batch:
                raise ShapeError(
                    f"the cache holds a batch of {first.shape[0]}, got a batch of {batch}; reset() it or use a new "
                    "cache"
                )
            return
        tokens = self.capacity * self.tokens_per_frame

        def buffer() -> Tensor:
            # Zeros, and not what was in memory: a masked NaN is still a NaN.
            made = torch.zeros(batch, tokens, heads, head_dim, dtype=dtype, device=device)
            torch._dynamo.mark_static_address(made, guard=False)  # type: ignore[no-untyped-call]
            return made

        self._keys = [buffer() for _ in range(self.num_layers)]
        self._values = [buffer() for _ in range(self.num_layers)]
        self.mask = torch.zeros(1, 1, 1, tokens, dtype=torch.bool, device=device)

    def begin(self, chunk_frames: int) -> None:
        """Make room for a chunk, and point the tensors at its place; after :meth:`allocate`.

        Raises:
            ShapeError: the video becomes longer than the capacity it was made for.
        """
        assert self.mask is not None, "CausalWan allocates before it begins"
        super().begin(chunk_frames)
        held = self.frames_held
        if held + chunk_frames > self.capacity:
            raise ShapeError(
                f"the cache was made for {self.capacity} latent frames; this is frame {held + chunk_frames}"
            )
        start, tokens = held * self.tokens_per_frame, chunk_frames * self.tokens_per_frame
        slots = torch.arange(start, start + tokens, device=self.mask.device)
        if self._slots is None or self._slots.shape != slots.shape:
            self._slots = slots
        else:
            self._slots.copy_(slots)
        self.mask[..., : start + tokens] = True
        self.mask[..., start + tokens :] = False

    @property
    def positions(self) -> tuple[Tensor, Tensor]:
        """As of KVCache; keys have positions in the whole capacity, also where nothing is held."""
        chunk, keys = super().positions
        return (chunk, torch.arange(self.capacity)) if self.window.rope == "window" else (chunk, keys)

    def extend(self, layer: int, k_BSHD: Tensor, v_BSHD: Tensor) -> tuple[Tensor, Tensor]:
        """The whole buffers, (B, K, H, D), with the chunk staged in its place; attend to them under :attr:`mask`.

        Raises:
            ShapeError: the keys carry a gradient; a static cache is for generating.
        """
        if torch.is_grad_enabled() and k_BSHD.requires_grad:
            raise ShapeError("a static cache takes no keys with a gradient; train with KVCache")
        keys, values, slots = self._keys[layer], self._values[layer], self._slots
        assert keys is not None
        assert values is not None
        assert slots is not None
        keys.index_copy_(1, slots, k_BSHD.to(keys.dtype))
        values.index_copy_(1, slots, v_BSHD.to(values.dtype))
        return keys, values

    def commit(self) -> None:
        """Make the staged chunk history. Call it after the clean pass, once."""
        if self._chunk_frames == 0:
            raise RuntimeError("nothing to commit: run the clean chunk through the model first")
        # Which layers were staged is not noted while they run: a graph that did so would have to be made anew.
        self._staged_layers = set(range(self.num_layers))
        super().commit()
