"""The Lloyd-Max tables of spec.py against their definition."""

from __future__ import annotations

import numpy as np
import pytest
from turbokv.codebook import int8_codebook, lloyd_max_normal
from turbokv.spec import LM8, KVType

# MSE of the optimal quantizers of N(0, 1) as J. Max printed it in "Quantizing for minimum distortion" (1960); the exact
# optima, 0.034548 and 0.009501, are within 5e-4 of it.
KNOWN_MSE = {4: 0.1175, 8: 0.03454, 16: 0.009497}


def test_iteration_reproduces_the_table(kv_type: KVType) -> None:
    iterated = np.array(lloyd_max_normal(len(kv_type.codebook)), np.float32)
    table = np.array(kv_type.table.half_levels, np.float32)
    if kv_type.name == "tbq3":  # published with five digits, and thresholds with four
        np.testing.assert_allclose(table, iterated, atol=5e-6)
        np.testing.assert_allclose(kv_type.thresholds, LM8.thresholds, atol=5.1e-5)
    else:
        np.testing.assert_array_equal(table, iterated)


def test_table_has_the_known_distortion(kv_type: KVType) -> None:
    x = np.linspace(-12, 12, 1_000_001)
    density = np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    nearest = np.array(kv_type.codebook)[np.searchsorted(kv_type.thresholds, x)]
    mse = np.trapezoid(density * (x - nearest) ** 2, x)
    assert mse == pytest.approx(KNOWN_MSE[len(kv_type.codebook)], rel=5e-4)


def test_int8_codebook_is_the_best_and_good_enough(kv_type: KVType) -> None:
    levels, step = int8_codebook(kv_type.codebook, kv_type.thresholds)
    assert kv_type.table.int8_levels == tuple(levels)
    assert kv_type.table.int8_step == pytest.approx(step, rel=1e-8)

    x = np.linspace(-12, 12, 1_000_001)
    density = np.exp(-x * x / 2) / np.sqrt(2 * np.pi)
    index = np.searchsorted(kv_type.thresholds, x)
    added = (np.array(kv_type.codebook) - step * np.array(levels)) ** 2
    assert np.trapezoid(density * added[index], x) < 0.0011 * KNOWN_MSE[len(levels)]


def test_codebook_is_symmetric(kv_type: KVType) -> None:
    assert [-level for level in reversed(kv_type.codebook)] == list(kv_type.codebook)
    assert [-edge for edge in reversed(kv_type.thresholds)] == list(kv_type.thresholds)


def test_levels_ascend_with_one_threshold_between_neighbours(kv_type: KVType) -> None:
    levels, edges = kv_type.codebook, kv_type.thresholds
    assert len(levels) == 2**kv_type.index_bits
    assert len(edges) == len(levels) - 1
    assert all(low < edge < high for low, edge, high in zip(levels, edges, levels[1:], strict=False))


def test_two_levels_are_the_mean_of_the_half_normal() -> None:
    assert lloyd_max_normal(2) == pytest.approx([np.sqrt(2 / np.pi)], rel=1e-12)


@pytest.mark.parametrize("levels", [-2, 0, 1, 3, 7])
def test_odd_or_non_positive_levels_are_refused(levels: int) -> None:
    with pytest.raises(ValueError, match=str(levels)):
        lloyd_max_normal(levels)
