"""Lloyd-Max quantizers of the standard normal distribution.

Source: S. Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28 (1982); J. Max, IRE 1960.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def int8_codebook(levels: Sequence[float], thresholds: Sequence[float]) -> tuple[list[int], float]:
    """The int8 levels and the step that fit `levels` best: level ~ step * int8_level, |int8_level| <= 127.

    Least squares, each level weighted with its probability under N(0, 1): between the `thresholds` around it. The
    range of the levels is left free, since some ranges fit far better than the full one.
    """
    edges = [-math.inf, *thresholds, math.inf]
    probability = [_tail(low) - _tail(high) for low, high in pairwise(edges)]

    def fit(levels_per_unit: float) -> tuple[float, list[int], float]:
        rounded = [round(levels_per_unit * level) for level in levels]
        weighted = list(zip(probability, levels, rounded, strict=True))
        step = sum(p * level * r for p, level, r in weighted) / sum(p * r * r for p, _, r in weighted)
        error = sum(p * (level - step * r) ** 2 for p, level, r in weighted)
        return round(error, 15), rounded, step  # rounded: multiples of one fit are equal, and the smallest is taken

    finest = 127.49 / max(levels)
    fits = (fit(20 + (finest - 20) * i / 20_000) for i in range(20_001))
    _, int8_levels, step = min(fits, key=lambda found: found[0])
    return int8_levels, step
