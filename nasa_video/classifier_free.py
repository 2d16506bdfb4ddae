"""Classifier-free guidance for a causal model: the denoiser runs once a prompt, each with a KV cache of its own."""

from __future__ import annotations

from causvid_adapter import CausalWan, KVCache
from causvid_adapter.kv_cache import RopeMode
from torch import Tensor

from nasa_video.guidance import ClassifierFree, cfg, shares
from nasa_video.steering import PromptKeys, Steering


class BranchCaches:
    """One KV cache a branch: the positive prompt's first, then the negatives'."""

    def __init__(self, branches: list[KVCache]) -> None:
        self.branches = branches

    def commit(self) -> None:
        """Commit every branch."""
        for cache in self.branches:
            cache.commit()

    def reset(self) -> None:
        """Forget every branch."""
        for cache in self.branches:
            cache.reset()

    def seek(self, frame: int) -> None:
        """Place the next chunk of every branch."""
        for cache in self.branches:
            cache.seek(frame)

    @property
    def num_bytes(self) -> int:
        """Bytes of all branches."""
        return sum(cache.num_bytes for cache in self.branches)


class ClassifierFreeDenoiser:
    """Wraps a causal model whose cross-attention is steered, so that the chunk loop never knows of guidance."""

    def __init__(self, model: CausalWan, steering: Steering, num_negatives: int) -> None:
        self.model = model
        self.steering = steering
        self.num_negatives = num_negatives
        self.guidance: ClassifierFree | None = None
        self.positive: PromptKeys | None = None
        self.negatives: list[tuple[PromptKeys, float]] = []

    def new_cache(
        self,
        height: int,
        width: int,
        window_frames: int | None = None,
        sink_frames: int = 0,
        rope: RopeMode = "absolute",
    ) -> BranchCaches:
        """Caches of the positive branch and of every negative one."""
        return BranchCaches(
            [self.model.new_cache(height, width, window_frames, sink_frames, rope) for _ in range(1 + self.num_negatives)]
        )

    def __call__(self, latents: Tensor, timestep: float, context: Tensor | None, *, cache: BranchCaches) -> Tensor:
        """``v+ + (scale - 1) sum_i w_i (v+ - v-_i)``; the clean pass only writes keys."""
        v_pos = self._run(self.positive, latents, timestep, cache.branches[0])
        branches = cache.branches[1 : 1 + len(self.negatives)]
        v_negs = [self._run(keys, latents, timestep, c) for (keys, _), c in zip(self.negatives, branches, strict=True)]
        if self.guidance is None or not v_negs or timestep == 0:
            return v_pos
        weights = shares([(keys.layers[0], weight) for keys, weight in self.negatives])
        # Weights below one leave the rest of the reference at the positive prompt.
        v_neg = sum((w * v for w, v in zip(weights, v_negs, strict=True)), start=(1.0 - sum(weights)) * v_pos)
        guided = cfg(v_pos, v_neg, scale=self.guidance.scale)
        norm = v_pos.float().norm()
        change = (guided - v_pos).float().norm() / norm.clamp_min(1e-12)
        subtracted = ((self.guidance.scale - 1) * v_neg).float().norm()
        self.steering.meter.add_values(change, subtracted / (subtracted + self.guidance.scale * norm).clamp_min(1e-12))
        return guided

    def _run(self, keys: PromptKeys | None, latents: Tensor, timestep: float, cache: KVCache) -> Tensor:
        self.steering.positive = keys
        return self.model(latents, timestep, None, cache=cache)  # type: ignore[no-any-return]
