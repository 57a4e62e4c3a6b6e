#!/usr/bin/env python3
"""Writes everything that follows from python/turbokv/spec.py.

    scripts/generate.py            write the files
    scripts/generate.py --check    write nothing; exit 1 and name the files that differ

Written: ggml-ext/generated/* (C tables, structs, trait rows, name lists), tests/golden/*.bin (inputs, bytes
and decoded values of every type) and the type table in README.md. Needs numpy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))
sys.meta_path.insert(0, PathFinder)  # this tree's package, not that of an editable install of another tree

from turbokv import golden  # noqa: E402
from turbokv.spec import BY_NAME, FAMILIES, FIRST_TYPE_ID, TYPE_COUNT, TYPES, KVType  # noqa: E402

BANNER = "// Written by scripts/generate.py from python/turbokv/spec.py. Do not edit.\n"
TABLE_BEGIN = "<!-- types: written by scripts/generate.py -->\n"
TABLE_END = "<!-- /types -->"


def codebook_name(kv_type: KVType) -> str:
    return f"turbokv_lm{len(kv_type.codebook)}"


def enum_name(kv_type: KVType) -> str:
    return f"GGML_TYPE_{kv_type.name.upper()}"


def rows(text: Callable[[KVType], str]) -> str:
    return BANNER + "".join(text(kv_type) for kv_type in TYPES)


def type_enum() -> str:
    return (
        f"{BANNER}GGML_TYPE_TURBOKV_FIRST = {FIRST_TYPE_ID}, // every id from here on is ours\n"
        + "".join(f"{enum_name(t)} = {t.type_id}, // {t.layout_string}\n" for t in TYPES)
        + f"GGML_TYPE_COUNT = {TYPE_COUNT},\n"
        "// The next line of ggml.h still says GGML_TYPE_COUNT: let it name upstream's own count instead.\n"
        "#define GGML_TYPE_COUNT GGML_TYPE_COUNT_UPSTREAM\n"
    )


def structs() -> str:
    out = [
        BANNER,
        "// Needs ggml_half: include after ggml-common.h.\n\n#pragma once\n",
        "\n#include <assert.h>\n#include <stdint.h>\n",
    ]
    for t in TYPES:
        qk = f"QK_{t.name.upper()}"
        fields = "".join(f"    uint8_t {p.name}[{qk} * {p.bits} / 8];\n" for p in t.planes)
        out.append(
            f"\n// {t.layout_string}: {t.bits_per_value:g} bits per value\n"
            f"#define {qk} {t.block}\n\n"
            f"typedef struct {{\n{fields}    ggml_half d;\n}} block_{t.name};\n\n"
            f'static_assert(sizeof(block_{t.name}) == {t.block_bytes}, "wrong {t.name} block size/padding");\n'
        )
    return "".join(out)


def tables() -> str:
    out = [BANNER, "\n#pragma once\n"]
    for name, t in {codebook_name(t): t for t in TYPES}.items():
        levels = ", ".join(f"{np.float32(level)!s}f" for level in t.codebook)
        thresholds = ", ".join(repr(threshold) for threshold in map(float, t.thresholds))
        out.append(
            f"\n// Lloyd-Max levels of N(0, 1) and the midpoints between them\n"
            f"static const float  {name}[{len(t.codebook)}] = {{ {levels} }};\n"
            f"static const double {name}_thresholds[{len(t.thresholds)}] = {{ {thresholds} }};\n"
        )
    return "".join(out)


def traits(t: KVType) -> str:
    return (
        f"[{enum_name(t)}] = {{\n"
        f'    .type_name      = "{t.name}",\n'
        f"    .blck_size      = QK_{t.name.upper()},\n"
        f"    .type_size      = sizeof(block_{t.name}),\n"
        f"    .is_quantized   = true,\n"
        f"    .to_float       = (ggml_to_float_t) dequantize_row_{t.name},\n"
        f"    .from_float_ref = (ggml_from_float_t) quantize_row_{t.name}_ref,\n}},\n"
    )


def traits_cpu(t: KVType) -> str:
    return (
        f"[{enum_name(t)}] = {{\n"
        f"    .from_float   = (ggml_from_float_t) quantize_row_{t.name}_ref,\n"
        f"    .vec_dot      = ggml_vec_dot_{t.name}_q8_0,\n"
        f"    .vec_dot_type = GGML_TYPE_Q8_0,\n"
        f"    .nrows        = 1,\n}},\n"
    )


def quantize_cases() -> str:
    call = (
        "result = turbokv_quantize(type, src + start, (char *) dst + start_row * row_size, nrows, n_per_row); break;\n"
    )
    return rows(lambda t: f"case {enum_name(t)}:\n") + f"    {call}"


def test_limit(t: KVType) -> str:
    # Upstream's limits for its own 3-bit types, and for the 4-bit one without an offset.
    limit = {3: "MAX_QUANTIZATION_TOTAL_ERROR_3BITS", 4: "MAX_QUANTIZATION_TOTAL_ERROR_FP4"}[t.index_bits]
    return f"type == {enum_name(t)} ? {limit} :\n"


def families() -> str:
    out = [BANNER]
    for family in FAMILIES:
        small = enum_name(BY_NAME[family + "_64"])
        out.append(f"{{ {enum_name(BY_NAME[family])}, {small} }},\n")
    return "".join(out)


def readme_table() -> str:
    lines = ["| type | bits per value | block | bytes | what |", "|---|---|---|---|---|"]
    lines += [f"| `{t.name}` | {t.bits_per_value:g} | {t.block} | {t.block_bytes} | {t.about} |" for t in TYPES]
    return "\n".join(lines) + "\n"


def readme() -> str:
    text = (ROOT / "README.md").read_text()
    head, begin, rest = text.partition(TABLE_BEGIN)
    _, end, tail = rest.partition(TABLE_END)
    if not begin or not end:
        raise SystemExit(f"README.md lacks the markers of the type table: {TABLE_BEGIN.strip()} ... {TABLE_END}")
    return head + begin + readme_table() + end + tail


def wanted() -> dict[str, bytes]:
    """Every written file: path from the project's root -> content."""
    text = {
        "turbokv-types.h": structs(),
        "turbokv-tables.h": tables(),
        "turbokv-type-enum.inc": type_enum(),
        "turbokv-traits.inc": rows(traits),
        "turbokv-traits-cpu.inc": rows(traits_cpu),
        "turbokv-quantize-chunk.inc": quantize_cases(),
        "turbokv-cache-types.inc": rows(lambda t: f"{enum_name(t)},\n"),
        "turbokv-type-from-name.inc": rows(lambda t: f'if (s == "{t.name}") {{ return {enum_name(t)}; }}\n'),
        "turbokv-test-limits.inc": rows(test_limit),
        "turbokv-families.inc": families(),
    }
    files = {f"ggml-ext/generated/{name}": content.encode() for name, content in text.items()}
    files |= {f"tests/golden/{t.name}.bin": golden.build(t) for t in TYPES}
    files["README.md"] = readme().encode()
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 when a file differs")
    check = parser.parse_args().check

    files = wanted()
    known = {ROOT / path for path in files}
    stale = [p for d in ("ggml-ext/generated", "tests/golden") for p in (ROOT / d).glob("*") if p not in known]
    differ = [
        path for path, content in files.items() if not (ROOT / path).is_file() or (ROOT / path).read_bytes() != content
    ]
    if check:
        for path in differ + [str(p.relative_to(ROOT)) for p in stale]:
            print(f"generate.py: {path} is not what spec.py says; run scripts/generate.py and commit the result")
        return 1 if differ or stale else 0

    for path in differ:
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_bytes(files[path])
        print(f"generate.py: wrote {path}")
    for p in stale:
        p.unlink()
        print(f"generate.py: removed {p.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
