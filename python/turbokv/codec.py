"""Reference codec in numpy: float32 rows <-> block bytes, bit-exact with ggml-ext/turbokv-quants.c.

Encode, for a block x of n values:
  u = x * sqrt(n) / ||x||         unit RMS, in float64
  i = #{thresholds < u}           nearest level; a tie goes to the lower one
  d = fp16(||x|| / ||c[i]||)      norm correction: the decoded block has the norm of x
Decode: y = fp32(d) * c[i], one float32 product.
A block of zeros has d = 0. A block with a NaN or an infinity gets d = NaN and decodes to NaN: failures stay
visible and inside their block. d is clamped to the largest finite fp16. Sums run in float64 from the first
value to the last, so that every implementation can reproduce them to the bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from turbokv.spec import KVType

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

FP16_MAX = np.float32(65504.0)


def _norm(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean norm over the last axis; cumsum, unlike sum, is guaranteed to add in order."""
    return np.sqrt(np.cumsum(x * x, axis=-1)[..., -1])


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
        gain = np.where(usable, np.sqrt(np.float64(kv_type.block)) / np.where(usable, norm, 1.0), 0.0)
        unit = np.where(usable[:, None], blocks, 0.0) * gain[:, None]
        index = np.searchsorted(thresholds, unit, side="left").astype(np.uint8)
        scale = (norm / _norm(levels[index])).astype(np.float32)
        d = np.where(usable, np.minimum(scale, FP16_MAX), np.where(norm == 0, 0.0, np.nan)).astype(np.float16)
    index[~usable] = 0

    out = np.empty((len(blocks), kv_type.block_bytes), np.uint8)
    start, shift = 0, 0
    for plane in kv_type.planes:
        plane_bytes = kv_type.block * plane.bits // 8
        fields = ((index >> shift) & (2**plane.bits - 1)).reshape(len(blocks), 8 // plane.bits, plane_bytes)
        packed = np.zeros((len(blocks), plane_bytes), np.uint8)
        for k in range(fields.shape[1]):
            packed |= fields[:, k] << (k * plane.bits)
        out[:, start : start + plane_bytes] = packed
        start, shift = start + plane_bytes, shift + plane.bits
    out[:, start:] = d.view(np.uint8).reshape(-1, 2)
    return out.reshape(*x.shape[:-1], x.shape[-1] // kv_type.block * kv_type.block_bytes)


def indices(kv_type: KVType, data: U8) -> U8:
    """Level indices of encoded rows: uint8 [..., k*block_bytes] to uint8 [..., k*block]."""
    if data.shape[-1] % kv_type.block_bytes:
        raise ValueError(f"{kv_type.name}: {data.shape[-1]} bytes are not whole blocks of {kv_type.block_bytes}")
    blocks = data.reshape(data.size // kv_type.block_bytes, kv_type.block_bytes)
    index = np.zeros((len(blocks), kv_type.block), np.uint8)
    start, shift = 0, 0
    for plane in kv_type.planes:
        plane_bytes = kv_type.block * plane.bits // 8
        packed = blocks[:, start : start + plane_bytes]
        for k in range(8 // plane.bits):
            field = (packed >> (k * plane.bits)) & (2**plane.bits - 1)
            index[:, k * plane_bytes : (k + 1) * plane_bytes] |= field << shift
        start, shift = start + plane_bytes, shift + plane.bits
    return index.reshape(*data.shape[:-1], data.shape[-1] // kv_type.block_bytes * kv_type.block)


def dequantize(kv_type: KVType, data: U8) -> F32:
    """Decodes uint8 [..., k*block_bytes] to float32 [..., k*block]. Raises ValueError for a ragged last axis."""
    index = indices(kv_type, data)
    blocks = data.reshape(data.size // kv_type.block_bytes, kv_type.block_bytes)
    d = np.ascontiguousarray(blocks[:, kv_type.index_bytes :]).view(np.float16).astype(np.float32)
    levels = np.asarray(kv_type.codebook, np.float32)
    rows: F32 = levels[index.reshape(len(blocks), kv_type.block)] * d
    return rows.reshape(index.shape)
