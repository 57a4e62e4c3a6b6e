"""The golden files: what stands in them, and that every named block does what its name says."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from turbokv import codec, golden
from turbokv.spec import KVType

HEADER = "<4s5I"
FP16_MAX = 65504.0
SMALLEST_NORMAL_FP16 = 2.0**-14

Floats = NDArray[np.float32]
Record = NDArray[Any]  # a structured array with the fields input, encoded, decoded


def read(kv_type: KVType, content: bytes) -> Record:
    """Reads the blocks as golden.py's docstring describes them."""
    fields: list[tuple[str, str, int]] = [
        ("input", "<f4", kv_type.block),
        ("encoded", "u1", kv_type.block_bytes),
        ("decoded", "<f4", kv_type.block),
    ]
    return np.frombuffer(content, np.dtype(fields), offset=struct.calcsize(HEADER))


@pytest.fixture
def committed(repo: Path, kv_type: KVType) -> bytes:
    return (repo / "tests" / "golden" / f"{kv_type.name}.bin").read_bytes()


def scale(kv_type: KVType, encoded: NDArray[np.uint8]) -> float:
    return float(encoded[kv_type.index_bytes :].view("<f2")[0])


def wanted_scale(kv_type: KVType, x: Floats, y: Floats, d: float) -> float:
    """The scale before it is rounded and clamped: norm of the input over norm of the chosen levels."""
    return float(np.linalg.norm(x.astype(np.float64)) / (np.linalg.norm(y.astype(np.float64)) / d))


def rotates(t: KVType) -> bool:
    """Then the shape of a block does not survive coding, only its size does."""
    return t.rotation == "codec"


def zeros(t: KVType, x: Floats, encoded: NDArray[np.uint8], y: Floats) -> bool:
    return not x.any() and not np.signbit(x).any() and not encoded.any() and not y.any()


def negative_zeros(t: KVType, x: Floats, encoded: NDArray[np.uint8], y: Floats) -> bool:
    return not x.any() and bool(np.signbit(x).all()) and not encoded.any() and not y.any()


def one_spike(t: KVType, x: Floats, encoded: NDArray[np.uint8], y: Floats) -> bool:
    return np.count_nonzero(x) == 1 and bool(np.abs(x).argmax() == np.abs(y).argmax())


def constant(t: KVType, x: Floats, encoded: NDArray[np.uint8], y: Floats) -> bool:
    return x[0] != 0 and bool(np.all(x == x[0]) and (rotates(t) or np.all(y == y[0])))


def alternating(t: KVType, x: Floats, encoded: NDArray[np.uint8], y: Floats) -> bool:
    return x[0] != 0 and bool(np.all(x[1:] == -x[:-1]) and (rotates(t) or np.all(y[1:] == -y[:-1])))


def threshold_ties(t: KVType, x: Floats, encoded: NDArray[np.uint8], y: Floats) -> bool:
    wide = x.astype(np.float64)
    wide = codec.hadamard(codec.srht_signs(wide)) if rotates(t) else wide
    u = wide / np.sqrt(np.mean(wide * wide))
    return all(np.min(np.abs(u - threshold)) < 1e-6 for threshold in t.thresholds)


def fp16_subnormal_scale(t: KVType, x: Floats, encoded: NDArray[np.uint8], y: Floats) -> bool:
    return 0 < scale(t, encoded) < SMALLEST_NORMAL_FP16


def scale_below_fp16(t: KVType, x: Floats, encoded: NDArray[np.uint8], y: Floats) -> bool:
    return bool(x.all()) and scale(t, encoded) == 0 and not y.any()


def scale_above_fp16(t: KVType, x: Floats, encoded: NDArray[np.uint8], y: Floats) -> bool:
    return scale(t, encoded) == FP16_MAX and wanted_scale(t, x, y, FP16_MAX) > FP16_MAX + 16


def largest_floats(t: KVType, x: Floats, encoded: NDArray[np.uint8], y: Floats) -> bool:
    return bool(np.all(np.abs(x) == np.finfo(np.float32).max)) and bool(np.isfinite(y).all()) and len(np.unique(x)) == 2


def one_non_finite(is_it: Callable[[Floats], NDArray[np.bool_]]) -> Callable[..., bool]:
    def check(t: KVType, x: Floats, encoded: NDArray[np.uint8], y: Floats) -> bool:
        only_one = np.count_nonzero(is_it(x)) == 1 and np.count_nonzero(~np.isfinite(x)) == 1
        return only_one and bool(np.isnan(y).all())

    return check


def ramp(t: KVType, x: Floats, encoded: NDArray[np.uint8], y: Floats) -> bool:
    ascends = rotates(t) or bool(np.all(np.diff(y) >= 0))
    return bool(np.all(np.diff(x) == x[1] - x[0])) and x[1] > x[0] and ascends


CHECKS: dict[str, Callable[..., bool]] = {
    "zeros": zeros,
    "negative zeros": negative_zeros,
    "one spike": one_spike,
    "constant": constant,
    "alternating": alternating,
    "threshold ties": threshold_ties,
    "fp16-subnormal scale": fp16_subnormal_scale,
    "scale below fp16": scale_below_fp16,
    "scale above fp16": scale_above_fp16,
    "largest floats": largest_floats,
    "one NaN": one_non_finite(np.isnan),
    "one +Inf": one_non_finite(np.isposinf),
    "one -Inf": one_non_finite(np.isneginf),
    "ramp": ramp,
}


def test_committed_file_is_what_the_codec_builds(kv_type: KVType, committed: bytes) -> None:
    same = committed == golden.build(kv_type)  # outside the assert: pytest would print both files
    assert same


def test_header_describes_the_type(kv_type: KVType, committed: bytes) -> None:
    expected = (b"TKVG", 1, kv_type.type_id, kv_type.block, kv_type.block_bytes, golden.N_BLOCKS)
    assert struct.unpack_from(HEADER, committed) == expected
    assert len(read(kv_type, committed)) == golden.N_BLOCKS


@pytest.mark.parametrize("case", golden.CASES)
def test_named_block_is_what_its_name_says(kv_type: KVType, committed: bytes, case: str) -> None:
    record = read(kv_type, committed)[golden.CASES.index(case)]
    assert CHECKS[case](kv_type, record["input"], record["encoded"], record["decoded"])


def test_only_the_non_finite_blocks_decode_to_nan(kv_type: KVType, committed: bytes) -> None:
    finite = np.isfinite(read(kv_type, committed)["decoded"]).all(axis=-1)
    assert [golden.CASES[i] for i in np.flatnonzero(~finite)] == ["one NaN", "one +Inf", "one -Inf"]


def test_gaussian_blocks_are_multiples_of_a_power_of_two(kv_type: KVType, committed: bytes) -> None:
    plain = read(kv_type, committed)["input"][len(golden.CASES) : 40]
    assert plain.any()
    np.testing.assert_array_equal(plain * 4096, np.round(plain * 4096))
