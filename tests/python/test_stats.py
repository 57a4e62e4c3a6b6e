"""The block bootstrap on data whose true mean is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from turbokv.stats import BLOCK, bootstrap_ci95

DATA_SETS = 400  # a coverage of 95 % is then known to +-1.1 %


def independent(random: np.random.Generator) -> NDArray[np.float64]:
    """Log-normal like KLD values, 8 windows of 1023, true mean 0."""
    return np.exp(random.standard_normal((8, 1023))) - math.exp(0.5)


def correlated(random: np.random.Generator) -> NDArray[np.float64]:
    """Moving sums over 32 neighbours of a window, 16 windows of 1023, true mean 0."""
    sums = np.cumsum(random.standard_normal((16, 1023 + 32)), axis=1)
    moving: NDArray[np.float64] = sums[:, 32:] - sums[:, :-32]
    return moving


def few_stretches(random: np.random.Generator) -> NDArray[np.float64]:
    """A short run: one window of 512 with 255 scored tokens."""
    return np.exp(random.standard_normal((1, 255))) - math.exp(0.5)


def values(n_windows: int, n_tokens: int) -> list[NDArray[np.float64]]:
    return list(np.random.default_rng(5).standard_normal((n_windows, n_tokens)))


@pytest.mark.parametrize("draw", [independent, correlated, few_stretches], ids=lambda draw: draw.__name__)
def test_interval_covers_the_true_mean(draw: Callable[[np.random.Generator], NDArray[np.float64]]) -> None:
    random = np.random.default_rng(6)
    intervals = np.array([bootstrap_ci95(list(draw(random))) for _ in range(DATA_SETS)])
    covered = np.mean((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0))
    assert 0.90 <= covered <= 0.98


def test_interval_shrinks_with_the_square_root_of_the_data() -> None:
    low, high = bootstrap_ci95(values(8, 1024))
    low4, high4 = bootstrap_ci95(values(32, 1024))
    assert (high - low) / (high4 - low4) == pytest.approx(2, rel=0.25)


def test_same_values_give_the_same_interval() -> None:
    assert bootstrap_ci95(values(4, 1023)) == bootstrap_ci95(values(4, 1023))


def test_interval_scales_and_shifts_with_the_values() -> None:
    low, high = bootstrap_ci95(values(4, 1023))
    scaled = bootstrap_ci95([3 * window + 5 for window in values(4, 1023)])
    assert scaled == pytest.approx((3 * low + 5, 3 * high + 5), rel=1e-12)


def test_constant_values_give_an_interval_of_no_width() -> None:
    assert bootstrap_ci95([np.full(BLOCK, 0.25)] * 3) == (0.25, 0.25)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0], [1], [16], [0, 16, 0]])
def test_single_stretch_gives_nan(sizes: list[int]) -> None:
    assert np.isnan(bootstrap_ci95([np.ones(size) for size in sizes])).all()


def test_a_short_stretch_weighs_by_its_tokens() -> None:
    """Nine tokens of 1 among 20 * BLOCK of 0 cannot lift the interval as a twenty-first of the data would."""
    low, high = bootstrap_ci95([*[np.zeros(2 * BLOCK)] * 20, np.ones(9)])
    assert low <= 0
    assert 0 < high < 0.01
