"""Cache types by name, and the K/V pairs that users write."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from turbokv import native
from turbokv.errors import TurbokvError
from turbokv.spec import TYPE_COUNT, TYPES

# What --cache-type-k/-v of llama.cpp accepts beside our own.
UPSTREAM_NAMES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
NAMES = (*UPSTREAM_NAMES, *(kv_type.name for kv_type in TYPES))
DEFAULT_CACHES = "f16,q8_0,q4_0,turbo4,turbo3"  # of the commands that compare


@dataclass(frozen=True)
class CachePair:
    """Types of the K and the V cache, by name."""

    k: str
    v: str

    def __str__(self) -> str:
        return f"{self.k}/{self.v}"


F16 = CachePair("f16", "f16")  # the reference of every comparison


def parse_pairs(text: str) -> list[CachePair]:
    """Parses `f16,q8_0/turbo3`: pairs are K/V, one name alone means both. Raises TurbokvError for unknown names."""
    pairs = []
    for item in text.split(","):
        names = [name.strip() for name in item.split("/")]
        if len(names) > 2 or not all(names):
            raise TurbokvError(f"'{item}' is not a cache: write K/V such as q8_0/turbo3, or one type for both")
        for name in names:
            if name not in NAMES:
                raise TurbokvError(f"unknown cache type '{name}'. Known types: {', '.join(NAMES)}")
        pairs.append(CachePair(names[0], names[-1]))
    return pairs


@cache
def type_ids() -> dict[str, int]:
    """Name -> ggml type id, asked of the built library."""
    lib = native.llama()._lib
    found = {}
    for type_id in range(TYPE_COUNT):
        name = lib.ggml_type_name(type_id)
        if name and name.decode() in NAMES:
            found[name.decode()] = type_id
    return found


def bits_per_value(name: str) -> float:
    """Bits per cached value, scales included, asked of the built library."""
    lib, type_id = native.llama()._lib, type_ids()[name]
    return float(8 * lib.ggml_type_size(type_id) / lib.ggml_blck_size(type_id))
