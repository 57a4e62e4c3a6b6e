"""Summary statistics of per-token measurements."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = 256  # tokens: neighbours in a window are correlated, so the bootstrap draws whole stretches of them
RESAMPLES = 2000
SEED = 20261122


def bootstrap_ci95(windows: list[NDArray[np.float64]]) -> tuple[float, float]:
    """95 % percentile interval of the mean, by a block bootstrap over stretches of up to 256 tokens of each window.

    `windows` holds one array of per-token values per window. Fixed seed: the same values give the same interval.
    With a single stretch there is nothing to draw from, and both ends are NaN.
    """
    blocks = [window[i : i + BLOCK] for window in windows for i in range(0, len(window), BLOCK)]
    blocks = [block for block in blocks if len(block)]
    if len(blocks) < 2:
        return float("nan"), float("nan")
    sums = np.array([block.sum() for block in blocks])
    sizes = np.array([len(block) for block in blocks])
    draws = np.random.Generator(np.random.PCG64(SEED)).integers(0, len(blocks), (RESAMPLES, len(blocks)))
    means = sums[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
