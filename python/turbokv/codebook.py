"""Lloyd-Max quantizers of the standard normal distribution.

Source: S. Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28 (1982); J. Max, IRE 1960.
"""

from __future__ import annotations

import math
from itertools import pairwise


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _tail(x: float) -> float:
    return math.erfc(x / math.sqrt(2)) / 2


def lloyd_max_normal(levels: int, tolerance: float = 1e-13) -> list[float]:
    """Positive half of the `levels`-point minimum-MSE quantizer of N(0, 1), ascending.

    Alternates the two optimality conditions (thresholds at midpoints, levels at the mean of their cell)
    until no level moves by more than `tolerance`. `levels` must be even: the optimum is symmetric, and only
    the positive half is iterated.
    """
    if levels < 2 or levels % 2:
        raise ValueError(f"levels must be even and positive, got {levels}")
    half = levels // 2
    centroids = [3 * (i + 0.5) / half for i in range(half)]
    while True:
        inner = [(low + high) / 2 for low, high in pairwise(centroids)]
        edges = [0.0, *inner, math.inf]
        moved = [(_density(low) - _density(high)) / (_tail(low) - _tail(high)) for low, high in pairwise(edges)]
        shift = max(abs(new - old) for new, old in zip(moved, centroids, strict=True))
        centroids = moved
        if shift < tolerance:
            return centroids
