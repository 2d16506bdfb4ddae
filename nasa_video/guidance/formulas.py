"""The formulas of negative guidance: pure functions of attention outputs."""

# B batch, Q query tokens, H heads, D head dim

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nasa_video.guidance.attention import Attend, WeightedKeys

_RIDGE = 0.01


def nasa(z_pos: Tensor, z_neg: Tensor, *, scale: float) -> Tensor:
    """Negative-Away Steer Attention: eq. 9 of arXiv 2412.02687."""
    return z_pos - scale * z_neg


def nag(z_pos: Tensor, z_neg: Tensor, *, scale: float, tau: float, alpha: float) -> Tensor:
    """Normalized Attention Guidance: eqs. 7 to 10 of arXiv 2505.21179, with its public code's scale (phi + 1).

    The norms are L1 over all channels of a token, heads merged: the last two axes of (B, Q, H, D).
    """
    extrapolated = scale * z_pos - (scale - 1) * z_neg
    norm_pos, norm = (x.abs().sum(dim=(-2, -1), keepdim=True) for x in (z_pos, extrapolated))
    limit = tau * norm_pos
    shrink = limit / norm.clamp_min(torch.finfo(norm.dtype).tiny)
    clipped = torch.where(norm > limit, extrapolated * shrink, extrapolated)
    return alpha * clipped + (1 - alpha) * z_pos


def vsf(z_pos: Tensor, z_neg: Tensor, lse_pos: Tensor, lse_neg: Tensor, *, scale: float, bias: float = 0.0) -> Tensor:
    """Value Sign Flip (arXiv 2508.10931) as a gate: ``w z+ - scale (1 - w) z-`` with w = sigmoid(lse+ - lse- - bias).

    Equal to one softmax over the keys of both prompts with the negative's values flipped; lse are (B, Q, H, 1).
    """
    w = torch.sigmoid(lse_pos - lse_neg - bias).to(z_pos.dtype)
    return w * z_pos - scale * (1 - w) * z_neg


def cfg(v_pos: Tensor, v_neg: Tensor, *, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) of the denoiser's output; scale 1 is unguided."""
    return v_neg + scale * (v_pos - v_neg)


def projection_coefficient(prompt: Tensor, negative: Tensor) -> Tensor:
    """How much of a negative a prompt contains, token by token and head by head: c in prompt = c negative + rest.

    Both (B, Q, H, D), without what the padding contributes; the result (B, Q, H, 1) is 0 where they point apart. A
    small ridge makes it 0, too, where the negative finds next to nothing and its direction means nothing.
    """
    prompt, negative = prompt.float(), negative.float()
    along, own, whole = map(torch.linalg.vecdot, (prompt, negative, prompt), (negative, negative, prompt))
    contained: Tensor = along.clamp_min(0) / (own + _RIDGE * whole).clamp_min(torch.finfo(torch.float32).tiny)
    return contained[..., None]


def norm_clip(step: Tensor, z_pos: Tensor, *, limit: float) -> Tensor:
    """The share of a step, at most 1, of which no token is longer than ``limit`` of that token's Z+.

    Both (B, Q, H, D); the result (B, Q, 1, 1), since lengths are L2 over all channels of a token, heads merged.
    """
    longest, length = (torch.linalg.vector_norm(x.float(), dim=(-2, -1), keepdim=True) for x in (z_pos, step))
    share: Tensor = limit * longest / length.clamp_min(torch.finfo(torch.float32).tiny)
    return share.clamp_max(1.0)


def shares(negatives: Sequence[WeightedKeys]) -> list[float]:
    """Weights of the negatives, scaled down together where they sum to more than one.

    Each branch subtracts the part that all prompts have in common, so n full branches would subtract it n times.
    One negative of weight 0.4 stays 0.4 of the scale; two of weight 1 have half of it each.
    """
    total = max(1.0, sum(weight for _, weight in negatives))
    return [weight / total for _, weight in negatives]


def sum_branches(q: Tensor, negatives: Sequence[WeightedKeys], attend: Attend) -> Tensor:
    """The weighted sum of the negatives' attention outputs, (B, Q, H, D); weights as :func:`shares` has them."""
    terms = [share * attend(q, keys) for (keys, _), share in zip(negatives, shares(negatives), strict=True)]
    return torch.stack(terms).sum(dim=0) if len(terms) > 1 else terms[0]


def mean_norm(x: Tensor) -> Tensor:
    """Mean over tokens of norms over all channels, heads merged; a scalar."""
    norms: Tensor = x.float().flatten(-2).norm(dim=-1)
    return norms.mean()


def norm_share(z_pos: Tensor, subtracted: Tensor) -> Tensor:
    """|subtracted| / (|Z+| + |subtracted|), in :func:`mean_norm`; a scalar."""
    negative = mean_norm(subtracted)
    return negative / (negative + mean_norm(z_pos)).clamp_min(1e-12)
