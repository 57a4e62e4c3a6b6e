"""The one description of every KV-cache type.

Ids, block sizes, byte layouts and codebooks are written here and nowhere else. `scripts/generate.py` turns
this file into the C tables, structs, prototypes and trait rows, README's type table and the golden vectors;
`tests/python/test_codebook.py` recomputes the codebooks with the Lloyd-Max iteration.

Byte layout: a block is its level indices, then the fp16 scale `d`. The indices are packed in one of two ways.
- Planes (turboN), low bits first: a plane of `bits` bits over a block of n values has n*bits/8 bytes; field k of
  byte j (bits k*bits and up) belongs to value j + k*plane_bytes. Neighbouring bytes hold neighbouring values, so
  that a SIMD register or a GPU word is decoded with one shift and one mask per field.
- A stream (tbqN), the published layout of tbq3: the index of value j is bits j*bits .. j*bits + bits - 1 of the
  index bytes read as one little-endian number.

Rotation has one owner per type. turboN stores what llama.cpp's graph has rotated; the codec only maps floats to
bytes. tbqN rotates by itself: y = H (s * x), with the signs s of SRHT_SIGNS and the Hadamard matrix H of
SRHT_SIZE points in natural order, one block at a time; the graph must not rotate.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

FIRST_TYPE_ID = 224  # below are upstream's own types
TYPE_COUNT = 256  # what GGML_TYPE_COUNT becomes: every id fits in a byte

# tbq's random signs: value j of a block is negated when bit j % 32 of word j // 32 is set.
SRHT_SIZE = 128
SRHT_SIGNS = (0xA3B1C6D9, 0x7E4F2A85, 0xD1936CF0, 0x5B8E47A2)


@dataclass(frozen=True)
class Codebook:
    """A scalar quantizer that is symmetric about zero. Decoding uses the float32 nearest to each level."""

    name: str
    half_levels: tuple[float, ...]  # the positive ones, ascending, in units of the block's RMS
    half_thresholds: tuple[float, ...] = ()  # the positive ones, where they are not the midpoints
    # level ~ int8_step * int8_level: what the CPU attention multiplies. Least squares over N(0, 1); adds less than
    # 0.11 % to the quantization error (tests/python/test_codebook.py recomputes it).
    half_int8_levels: tuple[int, ...] = ()
    int8_step: float = 0.0

    @property
    def int8_levels(self) -> tuple[int, ...]:
        """All int8 levels, ascending."""
        return tuple(-level for level in reversed(self.half_int8_levels)) + self.half_int8_levels

    @property
    def levels(self) -> tuple[float, ...]:
        """All levels, ascending."""
        return tuple(-level for level in reversed(self.half_levels)) + self.half_levels

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Decision thresholds between neighbouring levels, ascending, float64."""
        if self.half_thresholds:
            return (*(-edge for edge in reversed(self.half_thresholds)), 0.0, *self.half_thresholds)
        return tuple((low + high) / 2 for low, high in pairwise(self.levels))


# Lloyd-Max quantizers of N(0, 1).
LM4 = Codebook("lm4", (0.45278004, 1.5104176), half_int8_levels=(9, 30), int8_step=0.0503412422)
LM8 = Codebook(
    "lm8",
    (0.24509418, 0.7560053, 1.3439093, 2.1519456),
    half_int8_levels=(10, 31, 55, 88),
    int8_step=0.0244347836,
)
LM16 = Codebook(
    "lm16",
    (0.12839504, 0.3880483, 0.65675914, 0.94234043, 1.2562312, 1.6180464, 2.0690172, 2.7325895),
    half_int8_levels=(5, 15, 25, 36, 48, 62, 79, 104),
    int8_step=0.0261686063,
)
# LM8 as the published tbq3 rounds it: its bytes depend on these digits.
TBQ3 = Codebook("tbq3", (0.24509, 0.75601, 1.34391, 2.15195), (0.5006, 1.0500, 1.7479), (10, 31, 55, 88), 0.0244348282)


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
    planes: tuple[Plane, ...]  # a stream has one
    table: Codebook
    relative_mse: float  # ||x - decoded||^2 / ||x||^2 on N(0, 1)
    about: str
    packing: Literal["planes", "stream"] = "planes"
    rotation: Literal["graph", "codec"] = "graph"  # who rotates

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
        return self.table.levels

    @property
    def thresholds(self) -> tuple[float, ...]:
        return self.table.thresholds

    @property
    def layout_string(self) -> str:
        """Canonical one-line layout, e.g. `turbo3/1 b128 u2:ql u1:qh f16:d cb=lm8`; `s` marks a stream."""
        mark = {"planes": "u", "stream": "s"}[self.packing]
        fields = " ".join(f"{mark}{plane.bits}:{plane.name}" for plane in self.planes)
        rotation = " rot=srht" if self.rotation == "codec" else ""
        return f"{self.name}/{self.layout} b{self.block} {fields} f16:d cb={self.table.name}{rotation}"


def _turbo(bits: int, block: int, type_id: int, planes: tuple[Plane, ...], table: Codebook, mse: float) -> KVType:
    family = f"turbo{bits}"
    if block == 128:
        return KVType(family, type_id, 1, block, planes, table, mse, f"{bits}-bit Lloyd-Max")
    about = f"{family} for heads that 128 does not divide"
    return KVType(f"{family}_{block}", type_id, 1, block, planes, table, mse, about)


def _tbq(bits: int, type_id: int, table: Codebook, mse: float) -> KVType:
    about = f"{bits}-bit, rotates by itself: works where llama.cpp does not rotate"
    return KVType(f"tbq{bits}", type_id, 1, SRHT_SIZE, (Plane("qs", bits),), table, mse, about, "stream", "codec")


_TURBO2_PLANES = (Plane("qs", 2),)
_TURBO3_PLANES = (Plane("ql", 2), Plane("qh", 1))
_TURBO4_PLANES = (Plane("qs", 4),)

# 233-238 are kept for trellis2-4.
TYPES: tuple[KVType, ...] = (
    _turbo(2, 128, 224, _TURBO2_PLANES, LM4, 0.1190),
    _turbo(2, 64, 225, _TURBO2_PLANES, LM4, 0.1170),
    _turbo(3, 128, 226, _TURBO3_PLANES, LM8, 0.0339),
    _turbo(3, 64, 227, _TURBO3_PLANES, LM8, 0.0328),
    _turbo(4, 128, 228, _TURBO4_PLANES, LM16, 0.0092),
    _turbo(4, 64, 229, _TURBO4_PLANES, LM16, 0.0089),
    _tbq(2, 230, LM4, 0.1190),
    _tbq(3, 231, TBQ3, 0.0339),
    _tbq(4, 232, LM16, 0.0092),
)

BY_NAME = {kv_type.name: kv_type for kv_type in TYPES}
FAMILIES = tuple(dict.fromkeys(kv_type.family for kv_type in TYPES))
