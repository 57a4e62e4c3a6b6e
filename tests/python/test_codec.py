"""Properties of the numpy reference codec."""

from __future__ import annotations

import math
import struct
from functools import cache
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from turbokv import codec
from turbokv.spec import BY_NAME, SRHT_SIGNS, SRHT_SIZE, TYPES, KVType

LARGEST_BLOCK = 128

# Magnitudes whose scale stays a normal fp16 number, also after a factor of 2^-5 .. 2^9.
nonzero = st.floats(0.125, 8, width=32) | st.floats(-8, -0.125, width=32)


def gaussian_block(seed: int) -> codec.F32:
    return np.random.default_rng(seed).standard_normal(LARGEST_BLOCK).astype(np.float32)


gaussian = st.integers(0, 2**32).map(gaussian_block)
dense = arrays(np.float32, LARGEST_BLOCK, elements=nonzero) | gaussian.map(lambda x: np.copysign(np.abs(x) + 0.125, x))
moderate = dense | arrays(np.float32, LARGEST_BLOCK, elements=st.just(0.0) | nonzero).filter(np.any)
seeds = st.integers(0, 2**32)


def fp16_scale(kv_type: KVType, data: codec.U8) -> NDArray[np.float16]:
    blocks = data.reshape(-1, kv_type.block_bytes)
    return np.ascontiguousarray(blocks[:, kv_type.index_bytes :]).view(np.float16)[:, 0]


def unit_rms(kv_type: KVType, x: codec.F32) -> NDArray[np.float64]:
    """What is held against the thresholds: x, rotated where the codec does that, with RMS 1."""
    wide = x.astype(np.float64)
    if kv_type.rotation == "codec":
        wide = rotation_matrix() @ wide
    unit: NDArray[np.float64] = wide / np.sqrt(np.mean(wide * wide))
    return unit


@cache
def rotation_matrix() -> NDArray[np.float64]:
    """tbq's rotation by its definition, orthonormal: H[i, j] = (-1)^popcount(i & j), columns negated by the signs."""
    n = np.arange(SRHT_SIZE)
    hadamard = 1 - 2.0 * (np.bitwise_count(n[:, None] & n) % 2)
    signs = [-1 if SRHT_SIGNS[j // 32] >> (j % 32) & 1 else 1 for j in range(SRHT_SIZE)]
    matrix: NDArray[np.float64] = hadamard * signs / np.sqrt(SRHT_SIZE)
    return matrix


def distance_to_threshold(kv_type: KVType, u: NDArray[np.float64]) -> NDArray[np.float64]:
    distances: NDArray[np.float64] = np.abs(u[:, None] - np.array(kv_type.thresholds)).min(axis=1)
    return distances


def nearest_level(kv_type: KVType, u: NDArray[np.float64]) -> NDArray[np.intp]:
    nearest: NDArray[np.intp] = np.abs(u[:, None] - np.array(kv_type.codebook)).argmin(axis=1)
    return nearest


def pack(kv_type: KVType, index: list[int], scale: float) -> bytes:
    """The layout rules of spec.py, one value at a time."""
    if kv_type.packing == "stream":
        stream = sum(i << (j * kv_type.index_bits) for j, i in enumerate(index))
        return stream.to_bytes(kv_type.index_bytes, "little") + np.array(scale, "<f2").tobytes()
    out = bytearray()
    shift = 0
    for plane in kv_type.planes:
        plane_bytes = kv_type.block * plane.bits // 8
        for j in range(plane_bytes):
            byte = 0
            for k in range(8 // plane.bits):
                byte |= (index[j + k * plane_bytes] >> shift & (1 << plane.bits) - 1) << k * plane.bits
            out.append(byte)
        shift += plane.bits
    return bytes(out) + np.array(scale, "<f2").tobytes()


# --- layout


def test_layout_of_one_turbo3_block_by_hand() -> None:
    block = np.zeros(50, np.uint8)
    block[0] |= 0b01  # value 0, index 0b101: low bits in ql byte 0, field 0
    block[32] |= 0b1  # and its high bit in qh byte 0, field 0
    block[1] |= 0b10 << 2  # value 33 = 1 + 1 * 32, index 0b110: ql byte 1, field 1
    block[33] |= 0b1 << 2  # 33 = 1 + 2 * 16: qh byte 1, field 2
    block[31] |= 0b11 << 6  # value 127, index 0b011: last ql byte, field 3; high bit clear
    block[48:] = 0x00, 0x40  # fp16 2.0, little-endian
    levels = np.array(BY_NAME["turbo3"].codebook, np.float32)
    expected = np.full(128, 2 * levels[0])
    expected[[0, 33, 127]] = 2 * levels[[0b101, 0b110, 0b011]]
    np.testing.assert_array_equal(codec.dequantize(BY_NAME["turbo3"], block), expected)


@given(seed=seeds)
def test_decode_follows_the_layout_rule(kv_type: KVType, seed: int) -> None:
    index = np.random.default_rng(seed).integers(0, len(kv_type.codebook), kv_type.block)
    data = np.frombuffer(pack(kv_type, index.tolist(), 0.5), np.uint8)
    np.testing.assert_array_equal(codec.indices(kv_type, data), index)
    levels = np.array(kv_type.codebook, np.float32)[index]
    if kv_type.rotation == "codec":
        np.testing.assert_allclose(codec.dequantize(kv_type, data), 0.5 * rotation_matrix().T @ levels, atol=2e-6)
    else:
        np.testing.assert_array_equal(codec.dequantize(kv_type, data), levels * np.float32(0.5))


@given(x=dense)
def test_encode_packs_the_nearest_levels(kv_type: KVType, x: codec.F32) -> None:
    x = x[: kv_type.block]
    u = unit_rms(kv_type, x)
    # tbq3's published thresholds are rounded: up to 5e-5 beside the midpoints of the levels
    assume(distance_to_threshold(kv_type, u).min() > (1e-4 if kv_type.name == "tbq3" else 1e-7))
    data = codec.quantize(kv_type, x)
    scale = float(fp16_scale(kv_type, data)[0])
    assert data.tobytes() == pack(kv_type, nearest_level(kv_type, u).tolist(), scale)


def test_rows_of_any_shape_are_blocks_side_by_side(kv_type: KVType) -> None:
    x = np.random.default_rng(1).standard_normal((2, 3, 2 * kv_type.block)).astype(np.float32)
    data = codec.quantize(kv_type, x)
    assert data.shape == (2, 3, 2 * kv_type.block_bytes)
    by_block = [codec.quantize(kv_type, block) for block in x.reshape(-1, kv_type.block)]
    np.testing.assert_array_equal(data.reshape(-1, kv_type.block_bytes), by_block)
    np.testing.assert_array_equal(
        codec.dequantize(kv_type, data).reshape(-1, kv_type.block), [codec.dequantize(kv_type, b) for b in by_block]
    )


def test_strided_rows_encode_and_decode_like_their_copies(kv_type: KVType) -> None:
    x = np.random.default_rng(2).standard_normal((4, 2 * kv_type.block)).astype(np.float32)[::2, ::2]
    data = codec.quantize(kv_type, x)
    np.testing.assert_array_equal(data, codec.quantize(kv_type, x.copy()))
    spread = np.repeat(data, 2, axis=-1)[:, ::2]
    np.testing.assert_array_equal(codec.dequantize(kv_type, spread), codec.dequantize(kv_type, data))


@pytest.mark.parametrize("excess", [-1, 1])
def test_ragged_rows_are_refused(kv_type: KVType, excess: int) -> None:
    with pytest.raises(ValueError, match=f"{kv_type.name}: row length {kv_type.block + excess} "):
        codec.quantize(kv_type, np.ones((2, kv_type.block + excess), np.float32))
    data = np.zeros((2, kv_type.block_bytes + excess), np.uint8)
    for read in (codec.indices, codec.dequantize):
        with pytest.raises(ValueError, match=f"{kv_type.name}: {kv_type.block_bytes + excess} bytes"):
            read(kv_type, data)


# --- scale


@given(x=moderate)
def test_norm_is_preserved_to_fp16(kv_type: KVType, x: codec.F32) -> None:
    x = x[: kv_type.block]
    assume(np.any(x))
    y = codec.dequantize(kv_type, codec.quantize(kv_type, x)).astype(np.float64)
    half_ulp = 2.0**-11 + 2.0**-23  # of the scale, then of the float32 product
    assert np.linalg.norm(y) == pytest.approx(np.linalg.norm(x.astype(np.float64)), rel=half_ulp)


@given(x=moderate, exponent=st.integers(-5, 9))
def test_power_of_two_multiplies_the_scale_and_nothing_else(kv_type: KVType, x: codec.F32, exponent: int) -> None:
    x = x[: kv_type.block]
    assume(np.any(x))
    once = codec.quantize(kv_type, x)
    scaled = codec.quantize(kv_type, np.ldexp(x, exponent))
    np.testing.assert_array_equal(scaled[: kv_type.index_bytes], once[: kv_type.index_bytes])
    assert fp16_scale(kv_type, scaled) == np.ldexp(fp16_scale(kv_type, once), exponent)


@given(x=dense)
def test_negation_mirrors_the_indices_away_from_ties(kv_type: KVType, x: codec.F32) -> None:
    x = x[: kv_type.block]
    assume(distance_to_threshold(kv_type, unit_rms(kv_type, x)).min() > 1e-12)
    plus, minus = codec.quantize(kv_type, x), codec.quantize(kv_type, -x)
    top = len(kv_type.codebook) - 1
    np.testing.assert_array_equal(codec.indices(kv_type, minus), top - codec.indices(kv_type, plus))
    assert fp16_scale(kv_type, minus) == fp16_scale(kv_type, plus)


def test_a_tie_goes_to_the_lower_level(kv_type: KVType) -> None:
    x = np.ones(kv_type.block, np.float32)
    x[7] = 0  # the only threshold that a float32 input meets exactly
    if kv_type.rotation == "codec":
        x = codec.srht_signs(codec.hadamard(x))  # of integers: exact, and so is the way back
    assert codec.indices(kv_type, codec.quantize(kv_type, x))[7] == len(kv_type.codebook) // 2 - 1


@given(x=dense, seed=seeds)
def test_permuted_values_get_permuted_indices(kv_type: KVType, x: codec.F32, seed: int) -> None:
    if kv_type.rotation == "codec":
        pytest.skip("a rotation mixes the values")
    x = x[: kv_type.block]
    assume(distance_to_threshold(kv_type, unit_rms(kv_type, x)).min() > 1e-12)  # room for another order of summation
    order = np.random.default_rng(seed).permutation(kv_type.block)
    data, permuted = codec.quantize(kv_type, x), codec.quantize(kv_type, x[order])
    np.testing.assert_array_equal(codec.indices(kv_type, permuted), codec.indices(kv_type, data)[order])
    d, d_permuted = fp16_scale(kv_type, data), fp16_scale(kv_type, permuted)
    assert abs(float(d[0]) - float(d_permuted[0])) <= float(np.spacing(d[0]))


@given(x=moderate)
def test_decoded_block_encodes_to_its_own_bytes_iff_its_levels_survive_unit_rms(kv_type: KVType, x: codec.F32) -> None:
    """Encoding is not idempotent in general: the chosen levels have an RMS below or above 1, and dividing by it may
    move one over a threshold (a spike does that). Where none moves, even the fp16 scale comes back."""
    x = x[: kv_type.block]
    assume(np.any(x))
    data = codec.quantize(kv_type, x)
    index = codec.indices(kv_type, data)
    levels = np.array(kv_type.codebook, np.float64)[index]
    u = levels / np.sqrt(np.mean(levels * levels))
    assume(distance_to_threshold(kv_type, u).min() > 1e-6)  # decoded values are rounded to float32
    survives = np.array_equal(nearest_level(kv_type, u), index)
    again = codec.quantize(kv_type, codec.dequantize(kv_type, data))
    assert np.array_equal(again, data) == survives


def test_decoded_gaussian_blocks_encode_to_their_own_bytes(kv_type: KVType) -> None:
    x = np.random.default_rng(3).standard_normal((2000, kv_type.block)).astype(np.float32)
    data = codec.quantize(kv_type, x)
    again = codec.quantize(kv_type, codec.dequantize(kv_type, data))
    assert np.mean(np.all(again == data, axis=-1)) >= 0.999


# --- edges


def test_zero_bytes_decode_to_zeros_and_zeros_encode_to_zero_bytes(kv_type: KVType) -> None:
    zero_bytes = np.zeros(kv_type.block_bytes, np.uint8)
    np.testing.assert_array_equal(codec.dequantize(kv_type, zero_bytes), np.zeros(kv_type.block))
    for zero in (0.0, -0.0):
        np.testing.assert_array_equal(codec.quantize(kv_type, np.full(kv_type.block, zero, np.float32)), zero_bytes)


@given(poison=st.sampled_from([np.nan, np.inf, -np.inf]), block=st.integers(0, 2), seed=seeds)
def test_non_finite_value_turns_its_block_to_nan_and_no_other(
    kv_type: KVType, poison: float, block: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    x = random.standard_normal(3 * kv_type.block).astype(np.float32)
    clean = codec.quantize(kv_type, x).reshape(3, -1)
    x[block * kv_type.block + random.integers(kv_type.block)] = poison
    data = codec.quantize(kv_type, x).reshape(3, -1)
    others = [i for i in range(3) if i != block]
    np.testing.assert_array_equal(data[others], clean[others])
    assert np.isnan(codec.dequantize(kv_type, data[block])).all()


@given(x=arrays(np.uint16, LARGEST_BLOCK, elements=st.integers(0, 0xFFFF)))
def test_finite_bf16_input_decodes_to_finite_values(kv_type: KVType, x: NDArray[np.uint16]) -> None:
    values = (x[: kv_type.block].astype(np.uint32) << 16).view(np.float32)
    values = np.where(np.isfinite(values), values, np.float32(3.3895314e38))  # the largest bf16
    assert np.isfinite(codec.dequantize(kv_type, codec.quantize(kv_type, values))).all()


@given(x=gaussian, exponent=st.integers(17, 100))
def test_scale_above_fp16_is_clamped(kv_type: KVType, x: codec.F32, exponent: int) -> None:
    data = codec.quantize(kv_type, np.ldexp(x[: kv_type.block], exponent))
    assert fp16_scale(kv_type, data) == 65504


# --- distortion and entropy on N(0, 1)


@pytest.fixture(scope="module")
def normal() -> codec.F32:
    return np.random.default_rng(2024).standard_normal((20_000, LARGEST_BLOCK)).astype(np.float32)


def gaussian_mse(kv_type: KVType, normal: codec.F32) -> float:
    x = normal.reshape(-1, kv_type.block)
    error = (x - codec.dequantize(kv_type, codec.quantize(kv_type, x))).astype(np.float64)
    return float(np.mean(np.sum(error**2, axis=-1) / np.sum(x.astype(np.float64) ** 2, axis=-1)))


def test_gaussian_distortion_is_what_the_spec_says(kv_type: KVType, normal: codec.F32) -> None:
    assert gaussian_mse(kv_type, normal) == pytest.approx(kv_type.relative_mse, rel=0.01)


@pytest.mark.parametrize("family", [t.family for t in TYPES if t.name.endswith("_64")])
def test_the_64_block_distorts_like_the_128_block(family: str, normal: codec.F32) -> None:
    large, small = (gaussian_mse(BY_NAME[name], normal) for name in (family, family + "_64"))
    assert small == pytest.approx(large, rel=0.04)


def test_index_entropy_is_that_of_the_lloyd_max_cells(kv_type: KVType, normal: codec.F32) -> None:
    cells = np.diff([0.0, *map(NormalDist().cdf, kv_type.thresholds), 1.0])
    expected = -np.sum(cells * np.log2(cells))
    assert expected == pytest.approx({4: 1.911, 8: 2.825, 16: 3.765}[len(cells)], abs=0.0005)
    # unit RMS per block flattens by 1/n
    assert index_entropy(kv_type, normal) == pytest.approx(expected, abs=0.004)


def index_entropy(kv_type: KVType, x: codec.F32) -> float:
    """Of the index distribution, in bits."""
    used = np.bincount(codec.indices(kv_type, codec.quantize(kv_type, x)).ravel()) / x.size
    used = used[used > 0]
    return float(-np.sum(used * np.log2(used)))


# --- tbq: the rotation, and the published layout of tbq3


@given(x=gaussian, y=gaussian)
def test_rotation_keeps_inner_products_and_undoes_itself(x: codec.F32, y: codec.F32) -> None:
    wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
    rotated_x, rotated_y = (codec.hadamard(codec.srht_signs(v)) / np.sqrt(SRHT_SIZE) for v in (wide_x, wide_y))
    np.testing.assert_allclose(rotated_x, rotation_matrix() @ wide_x, atol=1e-12)
    assert rotated_x @ rotated_y == pytest.approx(wide_x @ wide_y, abs=1e-11)
    back = codec.srht_signs(codec.hadamard(rotated_x)) / np.sqrt(SRHT_SIZE)
    np.testing.assert_allclose(back, wide_x, atol=1e-12)


@given(seed=seeds, factor=st.floats(1e-3, 1e3))
def test_tbq3_block_is_the_published_one(seed: int, factor: float) -> None:
    """The published format written out by its description, sharing no code with the codec."""
    x = [float(v) for v in (gaussian_block(seed) * np.float32(factor)).astype(np.float32)]
    words = (0xA3B1C6D9, 0x7E4F2A85, 0xD1936CF0, 0x5B8E47A2)
    signs = [-1 if words[j // 32] >> j % 32 & 1 else 1 for j in range(128)]
    norm = math.sqrt(sum(v * v for v in x))
    u = [
        sum((-1) ** (i & j).bit_count() * s * v for j, (s, v) in enumerate(zip(signs, x, strict=True))) / norm
        for i in range(128)
    ]
    edges = (-1.7479, -1.0500, -0.5006, 0, 0.5006, 1.0500, 1.7479)
    assume(min(abs(v - edge) for v in u for edge in edges) > 1e-9)
    index = [sum(edge < v for edge in edges) for v in u]
    levels = (0.24509, 0.75601, 1.34391, 2.15195)
    chosen = [math.copysign(levels[i - 4 if i >= 4 else 3 - i], i - 3.5) for i in index]
    stream = 0
    for j, i in enumerate(index):
        stream |= i << 3 * j
    scale = struct.pack("<e", norm / math.sqrt(sum(c * c for c in chosen)))

    data = codec.quantize(BY_NAME["tbq3"], np.array(x, np.float32))
    assert data.tobytes() == stream.to_bytes(48, "little") + scale

    d = struct.unpack("<e", scale)[0]
    y = [
        d * signs[j] * sum((-1) ** (i & j).bit_count() * c for i, c in enumerate(chosen)) / math.sqrt(128)
        for j in range(128)
    ]
    decoded = codec.dequantize(BY_NAME["tbq3"], data)
    np.testing.assert_allclose(decoded, y, rtol=1e-5, atol=1e-6 * d)
    assert np.linalg.norm(decoded) / norm == pytest.approx(1, abs=2**-11 + 1e-6)


@pytest.mark.parametrize("name", ["tbq2", "tbq3", "tbq4"])
def test_channels_of_different_energy_do_not_cost_entropy(name: str, normal: codec.F32) -> None:
    """A Hadamard matrix that is normalized once too often puts every index into the two middle cells: 1 bit."""
    kv_type = BY_NAME[name]
    factors = np.exp(1.5 * np.random.default_rng(7).standard_normal(LARGEST_BLOCK)).astype(np.float32)
    assert index_entropy(kv_type, normal * factors) > index_entropy(kv_type, normal) - 0.1
