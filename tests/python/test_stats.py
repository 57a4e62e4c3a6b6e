"""The block bootstrap on data whose true mean is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from turbokv.stats import bootstrap_ci95, trimmed_mean

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


def correlated_with_windows_that_differ(random: np.random.Generator) -> NDArray[np.float64]:
    """As above, and half of the variance of a window's mean is the window's own: texts are about different things."""
    alike = correlated(random)
    different: NDArray[np.float64] = alike + alike.mean(axis=1).std() * random.standard_normal((16, 1))
    return different


def differences(random: np.random.Generator) -> NDArray[np.float64]:
    """Paired: NLL of two caches that share the text's ups and downs, which are ten times what they differ by, with a
    few tokens far out; four windows of 511, true mean of the difference 0."""
    text = 10 * correlated(random)[:4, :511]
    other = text + random.standard_normal((4, 511)) * random.choice([1, 10], (4, 511), p=[0.95, 0.05])
    difference: NDArray[np.float64] = other - text
    return difference


def last_positions(random: np.random.Generator) -> NDArray[np.float64]:
    """The last 64 positions of eight windows, log-normal, true mean 0."""
    return np.exp(random.standard_normal((8, 64))) - math.exp(0.5)


def values(n_windows: int, n_tokens: int) -> list[NDArray[np.float64]]:
    return list(np.random.default_rng(5).standard_normal((n_windows, n_tokens)))


DRAWS = [
    independent,
    correlated,
    correlated_with_windows_that_differ,
    few_stretches,
    differences,
    last_positions,
]


@pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__name__)
def test_interval_covers_the_true_mean(draw: Callable[[np.random.Generator], NDArray[np.float64]]) -> None:
    random = np.random.default_rng(6)
    intervals = np.array([bootstrap_ci95(list(draw(random))) for _ in range(DATA_SETS)])
    covered = np.mean((intervals[:, 0] <= 0) & (intervals[:, 1] >= 0))
    assert 0.90 <= covered <= 0.98


def test_pairing_makes_the_interval_narrow() -> None:
    """The difference of two caches is known far better than the NLL of each."""
    random = np.random.default_rng(7)
    text = 10 * correlated(random)
    low, high = bootstrap_ci95(list(text))
    paired_low, paired_high = bootstrap_ci95(list(random.standard_normal(text.shape)))
    assert (high - low) > 20 * (paired_high - paired_low)


@pytest.mark.parametrize("n_windows", [1, 2, 4, 7, 8, 9, 40])
def test_stretches_lie_within_windows_and_are_whole_windows_from_eight_on(n_windows: int) -> None:
    """Windows that are each constant: the interval is that of the windows' means as soon as they are stretches."""
    means = np.random.default_rng(1).standard_normal(n_windows)
    interval = bootstrap_ci95([np.full(100, mean) for mean in means])
    of_means = bootstrap_ci95([np.full(16, mean) for mean in means]) if n_windows >= 8 else None
    if of_means:
        assert interval == pytest.approx(of_means, rel=1e-9)
    assert interval[0] <= means.mean() <= interval[1]


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
    assert bootstrap_ci95([np.full(256, 0.25)] * 3) == (0.25, 0.25)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0], [1], [16], [0, 16, 0]])
def test_single_stretch_gives_nan(sizes: list[int]) -> None:
    assert np.isnan(bootstrap_ci95([np.ones(size) for size in sizes])).all()


def test_a_short_stretch_weighs_by_its_tokens() -> None:
    """Nine tokens of 1 among 20 * 512 of 0 cannot lift the interval as a twenty-first of the data would."""
    low, high = bootstrap_ci95([*[np.zeros(512)] * 20, np.ones(9)])
    assert low <= 0
    assert 0 < high < 0.01


# --- trimmed mean


@pytest.mark.parametrize(("n", "cut"), [(1, 0), (99, 0), (100, 1), (250, 2), (1000, 10)])
def test_trimmed_mean_leaves_out_one_percent_at_both_ends(n: int, cut: int) -> None:
    values = np.random.default_rng(2).standard_normal(n) ** 3
    kept = sorted(values)[cut : n - cut]
    assert trimmed_mean(values) == pytest.approx(np.mean(kept), rel=1e-12)


def test_trimmed_mean_does_not_feel_outliers() -> None:
    values = np.append(np.ones(199), 1e9)
    assert trimmed_mean(values) == 1


def test_trimmed_mean_of_nothing_is_nan() -> None:
    assert math.isnan(trimmed_mean(np.empty(0)))
