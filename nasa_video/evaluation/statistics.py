"""Intervals of shares, means and paired differences."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
Z_95 = 1.959963984540054
# Resamples drawn at once: 30,000 prompts take 60 MB.
_AT_ONCE = 250


def wilson(successes: int, n: int, z: float = Z_95) -> Interval:
    """Wilson score interval of a share (E. B. Wilson, JASA 22, 1927); 95 % by default, (0, 1) when n is 0."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be from 0 to n = {n}, got {successes}")
    if n == 0:
        return 0.0, 1.0
    share, spread = successes / n, z * z / n
    middle = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    low = 0.0 if successes == 0 else (middle - half) / (1 + spread)
    high = 1.0 if successes == n else (middle + half) / (1 + spread)
    return low, high


def bootstrap_mean(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """Percentile bootstrap interval of a mean (B. Efron and R. Tibshirani, 1993, chapter 13).

    Args:
        clusters: what each value belongs to, such as its prompt. Whole clusters are drawn, because the values of one
            prompt under several seeds are alike: drawn one by one they would give an interval that is too narrow.
        seed: of the resampling, so that a table is the same every time.

    Returns:
        None where there are fewer than two clusters: then nothing can be said.
    """
    if clusters is not None and len(clusters) != len(values):
        raise ValueError(f"{len(values)} values need as many clusters, got {len(clusters)}")
    sums, counts = _by_cluster(values, clusters)
    if len(sums) < 2:
        return None
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, draws, _AT_ONCE):
        drawn = rng.integers(0, len(sums), size=(min(_AT_ONCE, draws - start), len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
    return float(low), float(high)


def paired_shares(first: Sequence[bool], second: Sequence[bool], z: float = Z_95) -> Interval:
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
    neither = n - ones - twos + both
    p, q = ones / n, twos / n
    (p_low, p_high), (q_low, q_high) = wilson(ones, n, z), wilson(twos, n, z)
    phi = _phi(both, neither, ones, twos, n)
    down = _spread(p - p_low, q_high - q, phi)
    up = _spread(p_high - p, q - q_low, phi)
    return p - q - down, p - q + up


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


def _by_cluster(
    values: Sequence[float], clusters: Sequence[Hashable] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum and number of the values of each cluster."""
    numbers = np.asarray(values, dtype=np.float64)
    if clusters is None:
        return numbers, np.ones_like(numbers)
    order = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    index = np.array([order[name] for name in clusters], dtype=np.int64)
    ones = np.ones_like(numbers)
    return _sums(index, numbers, len(order)), _sums(index, ones, len(order))


def _sums(index: NDArray[np.int64], values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    sums = np.zeros(count)
    np.add.at(sums, index, values)
    return sums
