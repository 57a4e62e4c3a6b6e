"""Summary statistics of per-token measurements."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

MIN_BLOCKS = 8
MIN_BLOCK = 16
RESAMPLES = 2000
SEED = 20261122


def bootstrap_ci95(windows: list[NDArray[np.float64]]) -> tuple[float, float]:
    """95 % interval of the mean by a block bootstrap: stretches of neighbours are drawn with replacement.

    `windows` holds one array of per-token values per window; for a paired comparison, their differences. Tokens of a
    window are alike, so stretches are as long as leaves MIN_BLOCKS of them, and from 8 windows on they are the windows
    themselves. With fewer windows the interval does not know how windows differ from each other, and covers less
    than 95 % if they do: 80 to 90 % where that makes half of the variance of their means. Stretches are the clusters
    of cluster_bootstrap_ci95. Both ends are NaN when there are less than two stretches of 16 tokens.
    """
    total = sum(map(len, windows))
    length = max(MIN_BLOCK, total // MIN_BLOCKS)
    blocks = [window[i : i + length] for window in windows for i in range(0, len(window), length)]
    return cluster_bootstrap_ci95(blocks)


def cluster_bootstrap_ci95(clusters: list[NDArray[np.float64]]) -> tuple[float, float]:
    """95 % interval of the mean of all values: whole clusters are drawn with replacement, because the values of one
    depend on each other and only clusters are independent. Empty ones do not count.

    The percentile interval is widened about the mean by Student's t for the number n of clusters,
    t(n-1) / 1.96 * sqrt(n / (n-1)): without that it covers far less than 95 % when n is small. Fixed seed: the same
    values give the same interval. Both ends are NaN when there are less than two clusters.
    """
    clusters = [cluster for cluster in clusters if len(cluster)]
    n = len(clusters)
    if n < 2:
        return math.nan, math.nan
    sums = np.array([cluster.sum() for cluster in clusters])
    sizes = np.array([len(cluster) for cluster in clusters])
    draws = np.random.Generator(np.random.PCG64(SEED)).integers(0, n, (RESAMPLES, n))
    means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    mean = sums.sum() / sizes.sum()
    widening = stdtrit(n - 1, 0.975) / 1.96 * math.sqrt(n / (n - 1))
    low, high = mean + widening * (np.percentile(means, (2.5, 97.5)) - mean)
    return float(low), float(high)


def trimmed_mean(values: NDArray[np.float64], share: float = 0.01) -> float:
    """Mean without the largest and the smallest `share` of the values (0 to 0.5, rounded down to whole values); NaN
    of none."""
    cut = int(share * len(values))
    kept = np.sort(values)[cut : len(values) - cut]
    return float(kept.mean()) if len(kept) else math.nan
