"""The one description of every KV-cache type.

Ids, block sizes, byte layouts and codebooks are written here and nowhere else. `scripts/generate.py` turns
this file into the C tables, structs and trait rows, README's type table and the golden vectors;
`tests/python/test_codebook.py` recomputes the codebooks with the Lloyd-Max iteration.

Byte layout, one rule for all types: a block is its index planes, low bits first, then the fp16 scale `d`.
A plane of `bits` bits over a block of n values has n*bits/8 bytes; field k of byte j (bits k*bits and up)
belongs to value j + k*plane_bytes. Neighbouring bytes hold neighbouring values, so that a SIMD register or a
GPU word is decoded with one shift and one mask per field.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

# Positive halves of the Lloyd-Max quantizers of N(0, 1), ascending; decoding uses the float32 nearest to each.
LLOYD_MAX_3BIT = (0.24509418, 0.7560053, 1.3439093, 2.1519456)
LLOYD_MAX_4BIT = (0.12839504, 0.3880483, 0.65675914, 0.94234043, 1.2562312, 1.6180464, 2.0690172, 2.7325895)

FIRST_TYPE_ID = 224  # below are upstream's own types
TYPE_COUNT = 256  # what GGML_TYPE_COUNT becomes: every id fits in a byte


@dataclass(frozen=True)
class Plane:
    """One bit plane of the indices. The planes of a type are listed from the low index bits up."""

    name: str
    bits: int


@dataclass(frozen=True)
class KVType:
    """A KV-cache type. `layout` counts up when the meaning of the bytes changes; so does the id."""

    name: str
    type_id: int  # GGML type id; stands in slot files and RPC messages, so it is never reused
    layout: int
    block: int  # values per block
    planes: tuple[Plane, ...]
    half_codebook: tuple[float, ...]  # positive half, float32, in units of the block's RMS
    relative_mse: float  # ||x - decoded||^2 / ||x||^2 on N(0, 1)
    about: str

    @property
    def family(self) -> str:
        """The short name that users type; the context picks the block size."""
        return self.name.removesuffix("_64")

    @property
    def index_bits(self) -> int:
        return sum(plane.bits for plane in self.planes)

    @property
    def index_bytes(self) -> int:
        return self.block * self.index_bits // 8

    @property
    def block_bytes(self) -> int:
        return self.index_bytes + 2

    @property
    def bits_per_value(self) -> float:
        return 8 * self.block_bytes / self.block

    @property
    def codebook(self) -> tuple[float, ...]:
        """All levels, ascending: the half codebook mirrored at zero."""
        return tuple(-level for level in reversed(self.half_codebook)) + self.half_codebook

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Decision thresholds: midpoints of neighbouring levels as written above, float64."""
        levels = self.codebook
        return tuple((low + high) / 2 for low, high in pairwise(levels))

    @property
    def layout_string(self) -> str:
        """Canonical one-line layout, e.g. `turbo3/1 b128 u2:ql u1:qh f16:d cb=lm8n`."""
        fields = " ".join(f"u{plane.bits}:{plane.name}" for plane in self.planes)
        return f"{self.name}/{self.layout} b{self.block} {fields} f16:d cb=lm{len(self.codebook)}n"


_TURBO3_PLANES = (Plane("ql", 2), Plane("qh", 1))
_TURBO4_PLANES = (Plane("qs", 4),)

# 224/225 are kept for turbo2, 230-232 for tbq2-4, 233-238 for trellis2-4.
TYPES: tuple[KVType, ...] = (
    KVType("turbo3", 226, 1, 128, _TURBO3_PLANES, LLOYD_MAX_3BIT, 0.0339, "3-bit Lloyd-Max"),
    KVType(
        "turbo3_64", 227, 1, 64, _TURBO3_PLANES, LLOYD_MAX_3BIT, 0.0328, "turbo3 for heads that 128 does not divide"
    ),
    KVType("turbo4", 228, 1, 128, _TURBO4_PLANES, LLOYD_MAX_4BIT, 0.0092, "4-bit Lloyd-Max"),
    KVType(
        "turbo4_64", 229, 1, 64, _TURBO4_PLANES, LLOYD_MAX_4BIT, 0.0089, "turbo4 for heads that 128 does not divide"
    ),
)

BY_NAME = {kv_type.name: kv_type for kv_type in TYPES}
FAMILIES = tuple(dict.fromkeys(kv_type.family for kv_type in TYPES))
