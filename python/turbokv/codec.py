"""Reference codec in numpy: float32 rows <-> block bytes, bit-exact with ggml-ext/turbokv-quants.c.

Encode, for a block x of n values:
  u = x * sqrt(n) / ||x||         unit RMS, in float64; tbqN: u = H (s * x) / ||x||, H unnormalized
  i = #{thresholds < u}           nearest level; a tie goes to the lower one
  d = fp16(||x|| / ||c[i]||)      norm correction: the decoded block has the norm of x
Decode: y = fp32(d) * c[i], one float32 product; tbqN: y = s * (H c[i]) * (fp32(d) / sqrt(n)), in float32.

A block of zeros has d = 0. A block with a NaN or an infinity gets d = NaN and decodes to NaN: failures stay
visible and inside their block. d is clamped to the largest finite fp16. The sums of squares under the norms run
in float64 in the order that _norm and _level_norm write down, and Hadamard butterflies from the nearest pairs to
the farthest, so that every implementation can reproduce them to the bit.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from turbokv.spec import SRHT_SIGNS, SRHT_SIZE, KVType

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]
Real = TypeVar("Real", np.float32, np.float64)

FP16_MAX = np.float32(65504.0)
SUM_LANES = 16
SRHT_SCALE = np.float32(1 / np.sqrt(np.float64(SRHT_SIZE)))  # makes the Hadamard matrix orthonormal
_SIGN_BITS = np.array([SRHT_SIGNS[j // 32] >> (j % 32) & 1 for j in range(SRHT_SIZE)], bool)


def srht_signs(x: NDArray[Real]) -> NDArray[Real]:
    """s * x over the last axis of SRHT_SIZE values."""
    return np.where(_SIGN_BITS, -x, x)


def hadamard(x: NDArray[Real]) -> NDArray[Real]:
    """Unnormalized Walsh-Hadamard transform over the last axis (a power of two), natural order, in x's precision."""
    n = x.shape[-1]
    half = 1
    while half < n:
        pairs = x.reshape(*x.shape[:-1], n // (2 * half), 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack((low + high, low - high), axis=-2).reshape(x.shape)
        half *= 2
    return x


def _norm(x: F64) -> F64:
    """Euclidean norm of blocks [n, block]. Lane l sums the squares of values l, l + 16, .. in order (cumsum, unlike
    sum, is guaranteed to do that); then the upper half of the lanes is added to the lower one until one is left."""
    lanes = np.cumsum((x * x).reshape(len(x), -1, SUM_LANES), axis=1)[:, -1]
    while (half := lanes.shape[-1] // 2) > 0:
        lanes = lanes[:, :half] + lanes[:, half:]
    return np.sqrt(lanes[:, 0])


def _level_norm(levels: F64, index: U8) -> F64:
    """Euclidean norm of levels[index]: count times square, summed from the smallest magnitude to the greatest."""
    magnitudes = np.abs(levels[index])
    total = np.zeros(len(index))
    for level in levels[len(levels) // 2 :]:
        total += np.count_nonzero(magnitudes == level, axis=-1) * (level * level)
    return np.sqrt(total)


def _pack(kv_type: KVType, index: U8) -> U8:
    """Level indices [n, block] to index bytes [n, index_bytes]."""
    n, bits = len(index), kv_type.index_bits
    if kv_type.packing == "stream":
        each = np.unpackbits(index[..., None], axis=-1, count=bits, bitorder="little")
        return np.packbits(each.reshape(n, -1), axis=-1, bitorder="little")
    planes, shift = [], 0
    for plane in kv_type.planes:
        fields = ((index >> shift) & (2**plane.bits - 1)).reshape(n, 8 // plane.bits, -1)
        packed = np.zeros((n, fields.shape[-1]), np.uint8)
        for k in range(fields.shape[1]):
            packed |= fields[:, k] << (k * plane.bits)
        planes.append(packed)
        shift += plane.bits
    return np.concatenate(planes, axis=-1)


def _unpack(kv_type: KVType, packed: U8) -> U8:
    """The inverse of _pack."""
    n, bits = len(packed), kv_type.index_bits
    if kv_type.packing == "stream":
        each = np.unpackbits(packed, axis=-1, bitorder="little").reshape(n, kv_type.block, bits)
        return np.packbits(each, axis=-1, bitorder="little")[..., 0]
    index = np.zeros((n, kv_type.block), np.uint8)
    start, shift = 0, 0
    for plane in kv_type.planes:
        plane_bytes = kv_type.block * plane.bits // 8
        for k in range(8 // plane.bits):
            field = (packed[:, start : start + plane_bytes] >> (k * plane.bits)) & (2**plane.bits - 1)
            index[:, k * plane_bytes : (k + 1) * plane_bytes] |= field << shift
        start, shift = start + plane_bytes, shift + plane.bits
    return index


def quantize(kv_type: KVType, x: F32) -> U8:
    """Encodes float32 [..., k*block] to uint8 [..., k*block_bytes]. Raises ValueError for a ragged last axis."""
    if x.shape[-1] % kv_type.block:
        raise ValueError(f"{kv_type.name}: row length {x.shape[-1]} is not a multiple of {kv_type.block}")
    blocks = np.asarray(x, np.float32).reshape(x.size // kv_type.block, kv_type.block).astype(np.float64)
    levels = np.asarray(kv_type.codebook, np.float32).astype(np.float64)
    thresholds = np.asarray(kv_type.thresholds, np.float64)

    with np.errstate(all="ignore"):
        norm = _norm(blocks)
        usable = np.isfinite(norm) & (norm > 0)
        unit = np.where(usable[:, None], blocks, 0.0)
        gain = np.sqrt(np.float64(kv_type.block))
        if kv_type.rotation == "codec":
            unit, gain = hadamard(srht_signs(unit)), np.float64(1.0)
        unit = unit * (gain / np.where(usable, norm, 1.0))[:, None]
        index = np.searchsorted(thresholds, unit, side="left").astype(np.uint8)
        scale = (norm / _level_norm(levels, index)).astype(np.float32)
        d = np.where(usable, np.minimum(scale, FP16_MAX), np.where(norm == 0, 0.0, np.nan)).astype(np.float16)
    index[~usable] = 0

    out = np.concatenate((_pack(kv_type, index), d.view(np.uint8).reshape(-1, 2)), axis=-1)
    return out.reshape(*x.shape[:-1], x.shape[-1] // kv_type.block * kv_type.block_bytes)


def _blocks(kv_type: KVType, data: U8) -> U8:
    if data.shape[-1] % kv_type.block_bytes:
        raise ValueError(f"{kv_type.name}: {data.shape[-1]} bytes are not whole blocks of {kv_type.block_bytes}")
    return data.reshape(data.size // kv_type.block_bytes, kv_type.block_bytes)


def indices(kv_type: KVType, data: U8) -> U8:
    """Level indices of encoded rows: uint8 [..., k*block_bytes] to uint8 [..., k*block]."""
    index = _unpack(kv_type, _blocks(kv_type, data)[:, : kv_type.index_bytes])
    return index.reshape(*data.shape[:-1], data.shape[-1] // kv_type.block_bytes * kv_type.block)


def dequantize(kv_type: KVType, data: U8) -> F32:
    """Decodes uint8 [..., k*block_bytes] to float32 [..., k*block]. Raises ValueError for a ragged last axis."""
    index = indices(kv_type, data)
    blocks = _blocks(kv_type, data)
    d = np.ascontiguousarray(blocks[:, kv_type.index_bytes :]).view(np.float16).astype(np.float32)
    levels = np.asarray(kv_type.codebook, np.float32)[index].reshape(len(blocks), kv_type.block)
    rows: F32 = srht_signs(hadamard(levels)) * (d * SRHT_SCALE) if kv_type.rotation == "codec" else levels * d
    return rows.reshape(index.shape)
