"""Golden vectors: what every implementation of a codec (numpy, C, SIMD, CUDA) must reproduce bit for bit.

File `tests/golden/<type>.bin`, little-endian:
  magic "TKVG", then uint32 version, type_id, block, block_bytes, n_blocks
  per block: float32 input[block], uint8 encoded[block_bytes], float32 decoded[block]
Cases 0.. are named in `CASES`; the rest are Gaussian and heavy-tailed blocks. Decoded NaNs are compared as NaN.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from turbokv import codec
from turbokv.spec import KVType

MAGIC = b"TKVG"
VERSION = 1
N_BLOCKS = 64

CASES = (
    "zeros", "negative zeros", "one spike", "constant", "alternating", "threshold ties", "fp16-subnormal scale",
    "scale below fp16", "scale above fp16", "largest floats", "one NaN", "one +Inf", "one -Inf", "ramp",
)  # fmt: skip


def inputs(kv_type: KVType) -> NDArray[np.float32]:
    """The input blocks, float32 [N_BLOCKS, block]. Random values come from numpy's frozen generator and
    are rounded to multiples of 2^-12, so that they depend neither on the libm nor on the numpy version."""
    n = kv_type.block
    random = np.random.RandomState(kv_type.type_id)
    gaussian = np.round(random.standard_normal((N_BLOCKS, n)) * 4096) / 4096
    x = gaussian.astype(np.float32)
    x[40:] = np.sign(x[40:]) * x[40:] ** 2  # heavy tails
    x[52:] *= np.float32(0.03125)

    ties = np.zeros(n)
    ties[: len(kv_type.thresholds)] = kv_type.thresholds
    rest = n - np.sum(ties**2)  # fill up to unit RMS: then u is the threshold, exactly at 0 and nearly elsewhere
    ties[len(kv_type.thresholds) :] = np.sqrt(rest / (n - len(kv_type.thresholds)))
    if kv_type.rotation == "codec":
        ties = codec.srht_signs(codec.hadamard(ties)) / np.sqrt(n)

    x[0] = 0
    x[1] = -0.0
    x[2], x[2, n // 3] = 0, -5
    x[3] = 0.75
    x[4] = np.where(np.arange(n) % 2 == 0, 1.5, -1.5)
    x[5] = ties
    x[6] = gaussian[6] * 2.0**-18
    x[7] = gaussian[7] * 2.0**-40
    x[8] = gaussian[8] * 2.0**20
    x[9] = np.where(gaussian[9] < 0, -1, 1) * np.finfo(np.float32).max
    x[10, 3] = np.nan
    x[11, n - 1] = np.inf
    x[12, 0] = -np.inf
    x[13] = np.arange(n) - 20
    return x


def build(kv_type: KVType) -> bytes:
    """The content of the golden file of a type."""
    x = inputs(kv_type)
    encoded = codec.quantize(kv_type, x)
    decoded = codec.dequantize(kv_type, encoded)
    head = MAGIC + struct.pack("<5I", VERSION, kv_type.type_id, kv_type.block, kv_type.block_bytes, len(x))
    body = (a.tobytes() + b.tobytes() + c.tobytes() for a, b, c in zip(x, encoded, decoded, strict=True))
    return head + b"".join(body)
