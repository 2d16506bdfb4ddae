"""Intervals of shares, means and paired differences; all 95 %."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]


def wilson(successes: int, n: int) -> Interval:
    """Wilson score interval of a share (E. B. Wilson, JASA 22, 1927); (0, 1) when n is 0."""
    from scipy.stats import binomtest

    if not 0 <= successes <= n:
        raise ValueError(f"successes must be from 0 to n = {n}, got {successes}")
    if n == 0:
        return 0.0, 1.0
    found = binomtest(successes, n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def bootstrap_mean(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, *, draws: int = 2000, seed: int = 0
) -> Interval | None:
    """Percentile bootstrap interval of a mean (B. Efron and R. Tibshirani, 1993, chapter 13).

    Args:
        clusters: what each value belongs to, such as its prompt. Whole clusters are drawn, because the values of one
            prompt under several seeds are alike: drawn one by one they would give an interval that is too narrow.
        seed: of the resampling, so that a table is the same every time.

    Returns:
        None where there are fewer than two clusters: then nothing can be said.
    """
    from scipy.stats import bootstrap

    if clusters is not None and len(clusters) != len(values):
        raise ValueError(f"{len(values)} values need as many clusters, got {len(clusters)}")
    order: dict[Hashable, int] = {}
    index = [order.setdefault(name, len(order)) for name in (range(len(values)) if clusters is None else clusters)]
    if len(order) < 2:
        return None
    found = bootstrap(
        (np.bincount(index, values), np.bincount(index)),  # sum and number of the values of each cluster
        _mean_of_clusters,
        paired=True,
        n_resamples=draws,
        batch=250,  # 30,000 prompts take 60 MB
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _mean_of_clusters(sums: NDArray[Any], counts: NDArray[Any], axis: int = -1) -> NDArray[Any]:
    mean: NDArray[Any] = sums.sum(axis) / counts.sum(axis)
    return mean


def paired_shares(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """Interval of share(second) - share(first) over the same samples.

    Method 10 of R. G. Newcombe, Statistics in Medicine 17 (1998), 2635: the paired form of Wilson's interval.

    Raises:
        ValueError: no samples, or not the same number of both.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"paired samples must be as many of both, at least one; got {len(first)} and {len(second)}")
    n = len(first)
    both = sum(a and b for a, b in zip(first, second, strict=True))
    ones, twos = sum(map(bool, second)), sum(map(bool, first))
    p, q = ones / n, twos / n
    (p_low, p_high), (q_low, q_high) = wilson(ones, n), wilson(twos, n)
    phi = _phi(both, n - ones - twos + both, ones, twos, n)
    return p - q - _spread(p - p_low, q_high - q, phi), p - q + _spread(p_high - p, q - q_low, phi)


def _spread(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))


def _phi(both: int, neither: int, ones: int, twos: int, n: int) -> float:
    """Correlation of the two answers, with Newcombe's continuity correction."""
    margins = ones * (n - ones) * twos * (n - twos)
    if margins == 0:
        return 0.0
    product = float(both * neither - (ones - both) * (twos - both))
    if product > 0:
        product = max(product - n / 2, 0.0)
    return product / math.sqrt(margins)
