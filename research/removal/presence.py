# ruff: noqa: D103, E741
"""Presence from attention: what a layer records, how it is reduced, and the words that come of it.

What the attention layer records, in every guided call, for each negative: two numbers a token,

    strength  |Z- - Z0| / |Z+|                 how much the negative finds to say, beside what the prompt says
    along     cos(Z- - Z0, Z+ - Z0)            how much of that the prompt's branch says itself

(B, Q) each, heads merged (lengths and products over all channels). They are reduced over tokens to mean, largest and
standard deviation of the strength and the mean of along: (B, 4) a layer, (B, layers, 4) a step. Nothing else is kept;
reading it is the only synchronisation.

Python:  recorder = Recorder(rule); lab.make(..., rule=recorder); recorder.features → (B, terms, steps, layers, 4)
"""

from __future__ import annotations

import torch
from torch import Tensor

STATS = ("mean", "largest", "spread", "along")


@torch.no_grad()
def reduced(own: Tensor, z_pos: Tensor, z0: Tensor) -> Tensor:
    """(B, 4) of one layer from Z- - Z0 and Z+ (B, Q, H, D) and the padding's value (1, 1, H, D)."""
    own, z_pos = own.float().flatten(2), z_pos.float().flatten(2)
    p = z_pos - z0.float().flatten(2)
    strength = own.norm(dim=-1) / z_pos.norm(dim=-1).clamp_min(1e-9)
    along = (own * p).sum(-1) / (own.norm(dim=-1) * p.norm(dim=-1)).clamp_min(1e-9)
    return torch.stack((strength.mean(1), strength.amax(1), strength.std(1), along.mean(1)), 1)


class Recorder:
    """Wraps a rule; `scale` 0 of it is a probe of the unguided video."""

    def __init__(self, rule=None):
        self.rule, self.parts, self.now = rule, [], None

    def begin(self, size, width):
        self.now = {}
        self.parts.append(self.now)

    def __call__(self, state, layer, q, positive, negatives):
        z_pos = state.attend(q, positive)
        step = state.call.step if state.call.chunk == 0 else 100 * state.call.chunk + state.call.step
        for i, (keys, _) in enumerate(negatives):
            own = state.attend(q, keys) - keys.padding_v
            self.now[i, step, layer] = reduced(own, z_pos, keys.padding_v)
        return z_pos if self.rule is None else self.rule(state, layer, q, positive, negatives)

    @property
    def features(self) -> Tensor:
        """(B, terms, steps, layers, 4) of first chunks."""
        out = []
        for part in self.parts:
            n, s, l = (max(k[j] for k in part if k[1] < 100) + 1 for j in range(3))
            out.append(
                torch.stack(
                    [
                        torch.stack([torch.stack([part[i, j, k] for k in range(l)], 1) for j in range(s)], 1)
                        for i in range(n)
                    ],
                    1,
                )
            )
        return torch.cat(out)


def auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the curve, ties halved."""
    a, b = scores[positive], scores[~positive]
    if not len(a) or not len(b):
        return float("nan")
    d = a[:, None] - b[None]
    return float(((d > 0).float() + 0.5 * (d == 0).float()).mean())


def fit(features: Tensor, positive: Tensor, ridge: float = 1.0):
    """A ridge discriminant: (weights, mean, std, threshold) from standardised features (N, F)."""
    m, s = features.mean(0), features.std(0).clamp_min(1e-6)
    x = (features - m) / s
    y = torch.where(positive, 1.0, -1.0)
    w = torch.where(positive, 0.5 / positive.float().mean(), 0.5 / (~positive).float().mean())
    xw = x * w[:, None]
    wts = torch.linalg.solve(x.T @ xw + ridge * len(x) / 10 * torch.eye(x.shape[1]), xw.T @ (y - (w * y).mean()))
    return wts, m, s


def score(model, features: Tensor) -> Tensor:
    w, m, s = model
    return ((features - m) / s) @ w
