"""Classifier-free guidance for a causal model: the denoiser runs once a prompt, each with a KV cache of its own."""

from __future__ import annotations

from torch import Tensor

from causvid_adapter import CausalWan, KVCache
from causvid_adapter.window import UNLIMITED, Window
from nasa_video.guidance.formulas import cfg
from nasa_video.guidance.methods import ClassifierFree
from nasa_video.guidance.state import GuidanceState, PromptKeys


class BranchCaches:
    """The histories of the positive and of the negative branch."""

    def __init__(self, positive: KVCache, negative: KVCache) -> None:
        self.positive = positive
        self.negative = negative

    def commit(self) -> None:
        """Commit both branches."""
        self.positive.commit()
        self.negative.commit()

    def reset(self) -> None:
        """Forget both branches."""
        self.positive.reset()
        self.negative.reset()

    def seek(self, frame: int) -> None:
        """Place the next chunk of both branches."""
        self.positive.seek(frame)
        self.negative.seek(frame)

    @property
    def num_bytes(self) -> int:
        """Bytes of both branches."""
        return self.positive.num_bytes + self.negative.num_bytes


class ClassifierFreeDenoiser:
    """Wraps a causal model whose cross-attention is steered, so that the chunk loop never knows of guidance.

    Both branches run in every call, so that the negative one has its history when a negative prompt appears in the
    middle of a video. Set ``positive``, ``negative`` (the empty prompt, where there is none) and ``guidance`` before
    each chunk; without a guidance the positive branch is returned as it is.
    """

    def __init__(self, model: CausalWan, steering: GuidanceState) -> None:
        self.model = model
        self.steering = steering
        self.guidance: ClassifierFree | None = None
        self.positive: PromptKeys | None = None
        self.negative: PromptKeys | None = None

    def new_cache(
        self, height: int, width: int, window: Window = UNLIMITED, num_frames: int | None = None
    ) -> BranchCaches:
        """Two caches: guidance in output space costs twice the history."""
        sizes = (height, width, window, num_frames)
        return BranchCaches(self.model.new_cache(*sizes), self.model.new_cache(*sizes))

    def __call__(self, latents: Tensor, timestep: float, context: Tensor | None, *, cache: BranchCaches) -> Tensor:
        """The guided flow, (B, T, C, H, W); in the clean pass (t = 0) only the keys matter."""
        v_pos = self._run(self.positive, latents, timestep, cache.positive)
        v_neg = self._run(self.negative, latents, timestep, cache.negative)
        if self.guidance is None or not self.guidance.active or timestep == 0:
            return v_pos
        scale = self.guidance.scale
        guided = cfg(v_pos, v_neg, scale=scale)
        norm_pos, norm_neg = v_pos.float().norm(), v_neg.float().norm()
        self.steering.meter.add_values(
            (guided - v_pos).float().norm() / norm_pos.clamp_min(1e-12),
            (scale - 1) * norm_neg / ((scale - 1) * norm_neg + scale * norm_pos).clamp_min(1e-12),
        )
        return guided

    def _run(self, keys: PromptKeys | None, latents: Tensor, timestep: float, cache: KVCache) -> Tensor:
        if keys is None:
            raise ValueError(
                "set positive and negative of the denoiser before a call; an empty prompt has keys as well"
            )
        before, self.steering.positive = self.steering.positive, keys
        try:
            return self.model(latents, timestep, None, cache=cache)  # type: ignore[no-any-return]
        finally:
            self.steering.positive = before
