#!/usr/bin/env python3
"""Writes everything that follows from python/turbokv/spec.py, record.py and the committed results.

    scripts/generate.py            write the files
    scripts/generate.py --check    write nothing; exit 1 and name the files that differ

Written: ggml-ext/generated/* (C tables, structs, prototypes, trait rows, name lists), tests/golden/*.bin (inputs, bytes
and decoded values of every type), the type table in README.md and the hook table in docs/hooks.md; from record.py
results/schema.json; from results/runs.jsonl the tables of measurements in README.md and results/README.md; from
results/cuda-nvidia-h200/*.jsonl, which scripts/gpu.sh writes, those in docs/cuda-attention.md. Needs the package's
dependencies.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "python"), str(ROOT / "ggml-ext")]
sys.meta_path.insert(0, PathFinder)  # this tree's package, not that of an editable install of another tree

import apply_hooks  # noqa: E402
from turbokv import codec, golden, report, store  # noqa: E402
from turbokv.cache_type import parse_pairs  # noqa: E402
from turbokv.record import Record, requested  # noqa: E402
from turbokv.spec import (  # noqa: E402
    BY_NAME,
    FAMILIES,
    FIRST_TYPE_ID,
    SRHT_SIGNS,
    SRHT_SIZE,
    TYPE_COUNT,
    TYPES,
    KVType,
)

README_CACHES = ("f16", "q8_0", "q5_0", "q4_0", "turbo4", "turbo3", "turbo2", "tbq3", "q8_0/turbo4", "q8_0/turbo3")
MODELS = {
    "mini-q8_0.gguf": "16 M parameters, heads of 128",
    "bias-q8_0.gguf": "14 M parameters, heads of 64, Q and K with bias",
}
TITLES = {
    "kld": "Mean KL divergence from f16 in nats, 95 % interval, by tokens per window:",
    "ppl": "Perplexity:",
    "needle": "Needles: right answers, and the change of the margin against f16 in nats:",
    "speed_tg": "Generation in tokens/s behind so many tokens, and as a multiple of f16 in the same rounds:",
    "speed_pp": "Reading a prompt, likewise:",
    "memory": "Bytes of the cache:",
}

GPU_RESULTS = ROOT / "results" / "cuda-nvidia-h200"
GPU_TABLES = {  # of docs/cuda-attention.md: title of a column -> the run that scripts/gpu.sh calls so
    "one": {f"{q}, {d}": f"decode-{8 * q}-{d}" for q in (4, 8) for d in (32768, 131072)},
    "eight": {f"{q}, {d}": f"decode-{8 * q}-{d}-8seqs" for q in (4, 8) for d in (32768, 131072)},
    "tokens": {str(n): f"batch-{n}" for n in (2, 4, 8, 16)} | {"4096": "prefill"},
    "set_rows": {str(n): f"set-rows-{n}" for n in (1, 512, 4096)},
}

BANNER = "// Written by scripts/generate.py from python/turbokv/spec.py. Do not edit.\n"


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
    out = [
        BANNER,
        "\n#pragma once\n\n#include <stdint.h>\n",
        "\n#ifndef TURBOKV_TABLE\n",
        "#    define TURBOKV_TABLE static const  // cuda/codec.cuh puts the arrays into the device's memory\n",
        "#endif\n",
    ]
    for table in dict.fromkeys(t.table for t in TYPES):
        levels = ", ".join(f"{np.float32(level)!s}f" for level in table.levels)
        thresholds = ", ".join(repr(threshold) for threshold in map(float, table.thresholds))
        out.append(
            f"\n// Levels for N(0, 1) and the thresholds between them\n"
            f"TURBOKV_TABLE float  turbokv_{table.name}[{len(table.levels)}] = {{ {levels} }};\n"
            f"TURBOKV_TABLE double turbokv_{table.name}_thresholds[{len(table.thresholds)}] = {{ {thresholds} }};\n"
        )
        # Short tables repeat: any index of four bits gives a level.
        int8_levels = ", ".join(str(level) for level in table.int8_levels * (16 // len(table.levels)))
        out.append(f"TURBOKV_TABLE int8_t turbokv_{table.name}_int8[16] = {{ {int8_levels} }};\n")
    signs = ", ".join("-1" if SRHT_SIGNS[j // 32] >> (j % 32) & 1 else "1" for j in range(SRHT_SIZE))
    scale = f"{codec.SRHT_SCALE!s}f"
    out.append(
        f"\n// Of the rotation inside tbqN: what the values are multiplied with before the transform\n"
        f"#define TURBOKV_SRHT_SIZE  {SRHT_SIZE}\n"
        f"#define TURBOKV_SRHT_SCALE {scale} // 1 / sqrt({SRHT_SIZE})\n"
        f"TURBOKV_TABLE float turbokv_srht_signs[TURBOKV_SRHT_SIZE] = {{ {signs} }};\n"
    )
    return "".join(out)


def codec_prototypes(t: KVType) -> str:
    x, y = "const float * GGML_RESTRICT x", "float * GGML_RESTRICT y"
    block = f"block_{t.name} * GGML_RESTRICT"
    return (
        f"GGML_API void quantize_row_{t.name}_ref({x}, {block} y, int64_t k);\n"
        f"GGML_API void dequantize_row_{t.name}(const {block} x, {y}, int64_t k);\n"
    )


def int8_format(t: KVType) -> str:
    """Rows of turbokv_int8_format() in turbokv-tile.c."""
    stream = t.packing == "stream"
    packing = "STREAM3" if stream and t.index_bits == 3 else "PLANE" + "".join(str(p.bits) for p in t.planes)
    plane = t.block // 8 if packing == "STREAM3" else t.block * t.planes[0].bits // 8
    bytes_ = f"{t.block}, {t.block_bytes}, 0, {t.index_bytes}, {t.index_bytes}, {plane}"
    rotates = str(t.rotation == "codec").lower()
    return (
        f"case {enum_name(t)}: {{\n"
        f"    static const struct int8_format format = {{\n"
        f"        PACKING_{packing}, {bytes_}, {str(stream).lower()}, {rotates}, false,\n"
        f"        {np.float32(t.table.int8_step)!s}f, turbokv_{t.table.name}_int8,\n"
        f"    }};\n"
        f"    return &format;\n}}\n"
    )


def codec_list_row(t: KVType) -> str:
    rotates = str(t.rotation == "codec").lower()
    arguments = f"{t.index_bits}, {t.packing}, {rotates}, turbokv_{t.table.name}"
    return f"TURBOKV_CODEC({t.name}, QK_{t.name.upper()}, {arguments})\n"


def cpu_codec_prototypes(t: KVType) -> str:
    arguments = "int n, float * s, size_t bs, const void * vx, size_t bx, const void * vy, size_t by, int nrc"
    return (
        f"void quantize_row_{t.name}(const float * GGML_RESTRICT x, void * GGML_RESTRICT y, int64_t k);\n"
        f"void ggml_vec_dot_{t.name}_q8_0({arguments});\n"
    )


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
        f"    .from_float   = quantize_row_{t.name},\n"
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
    # Upstream's limits for its own types of as many bits, at 4 bits that of the one without an offset.
    limit = {2: "2BITS", 3: "3BITS", 4: "FP4"}[t.index_bits]
    return f"type == {enum_name(t)} ? MAX_QUANTIZATION_TOTAL_ERROR_{limit} :\n"


def test_dot_limit(t: KVType) -> str:
    limit = {2: "_TERNARY", 3: "_LOWBIT", 4: ""}[t.index_bits]
    return f": type == {enum_name(t)} ? MAX_DOT_PRODUCT_ERROR{limit}\n"


def families() -> str:
    """Rows of struct type_family in turbokv-llama.cpp; GGML_TYPE_COUNT where there is no 64-block."""
    out = [BANNER]
    for family in FAMILIES:
        small = BY_NAME.get(family + "_64")
        rotated = str(BY_NAME[family].rotation == "graph").lower()
        out.append(
            f"{{ {enum_name(BY_NAME[family])}, {enum_name(small) if small else 'GGML_TYPE_COUNT'}, {rotated} }},\n"
        )
    return "".join(out)


def type_table() -> str:
    lines = ["| type | bits per value | block | bytes | what |", "|---|---|---|---|---|"]
    lines += [f"| `{t.name}` | {t.bits_per_value:g} | {t.block} | {t.block_bytes} | {t.about} |" for t in TYPES]
    return "\n".join(lines) + "\n"


def hook_table() -> str:
    hooks = apply_hooks.load_hooks()
    files = {hook.file for hook in hooks}
    out = [f"{len(hooks)} hooks, {sum(hook.n_lines for hook in hooks)} lines in {len(files)} files.\n\n"]
    out.append("| hook | file | line | why | lost, this fails |\n|---|---|---|---|---|\n")
    for hook in hooks:
        lines = "<br>".join(f"`` {line.strip()} ``" for line in (hook.before, hook.after) if line)
        out.append(
            f"| {hook.name} | `{hook.file}` | {lines.replace('|', chr(92) + '|')} | {hook.why} | {hook.test} |\n"
        )
    return "".join(out)


def measured(model: str, caches: tuple[str, ...] = ()) -> dict[str, str]:
    """Tables of the committed results on one model, with all caches or with those; see report.markdown_tables."""
    records = [r for r in store.latest(store.read(ROOT / "results")) if r.model.name == model]
    wanted = {str(pair) for pair in parse_pairs(",".join(caches))} if caches else None
    return report.markdown_tables([r for r in records if not wanted or requested(r.result) in wanted])


def all_measured() -> str:
    """Every table of every model, for results/README.md."""
    out = []
    for model, about in MODELS.items():
        out.append(f"\n## {model}, {about}\n")
        out += [f"\n{TITLES[name]}\n\n{table}" for name, table in measured(model).items() if name in TITLES]
    return "".join(out)


def gpu_lines(step: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (GPU_RESULTS / f"{step}.jsonl").read_text().splitlines()]


def table(head: list[str], lines: list[list[str]]) -> str:
    rule = "|---" + "|---:" * (len(head) - 1) + "|\n"
    first, *rest = (f"| {' | '.join(cells)} |\n" for cells in (head, *lines))
    return "".join((first, rule, *rest))


def gpu_times(columns: dict[str, str]) -> str:
    """Microseconds, and that over f16's in the same rounds; a row per cache."""
    runs = {line["name"]: line["result"][0]["caches"] for line in gpu_lines("time")}

    def cell(cache: dict[str, Any]) -> str:
        ratio = "" if cache["cache"] == "f16" else f" ({cache['ratio_to_f16']:.2f})"
        return f"{cache['us']:.1f}{ratio}"

    caches = [[cache["cache"] for cache in runs[name]] for name in columns.values()]
    lines = [[name, *(cell(runs[run][i]) for run in columns.values())] for i, name in enumerate(caches[0])]
    assert all(names == caches[0] for names in caches)
    return table(["cache", *columns], lines)


def gpu_model() -> str:
    """Tokens/s of llama-bench."""
    runs = {
        (run["type_k"], run["n_gen"] > 0, run["n_depth"]): f"{run['avg_ts']:.1f}"
        for line in gpu_lines("model")
        for run in line["result"]
    }
    columns = {
        "generation at 32768": (True, 32768),
        "generation at 131072": (True, 131072),
        "512-token prompts at 32768": (False, 32768),
    }
    caches = dict.fromkeys(cache for cache, *_ in runs)
    lines = [[cache, *(runs.get((cache, *test), "not measured") for test in columns.values())] for cache in caches]
    return table(["cache", *columns], lines)


def with_tables(path: str, tables: dict[str, str]) -> bytes:
    """The file with each table between its markers."""
    text = (ROOT / path).read_text()
    for name, table in tables.items():
        begin, end = f"<!-- {name}: written by scripts/generate.py -->\n", f"<!-- /{name} -->"
        head, found_begin, rest = text.partition(begin)
        _, found_end, tail = rest.partition(end)
        if not found_begin or not found_end:
            raise SystemExit(f"{path} lacks the markers of its table: {begin.strip()} ... {end}")
        text = head + begin + table + end + tail
    return text.encode()


def wanted() -> dict[str, bytes]:
    """Every written file: path from the project's root -> content."""
    text = {
        "turbokv-types.h": structs(),
        "turbokv-tables.h": tables(),
        "turbokv-codecs.inc": rows(codec_prototypes),
        "turbokv-codec-list.inc": rows(codec_list_row),
        "turbokv-type-list.inc": rows(lambda t: f"TURBOKV_TYPE({enum_name(t)}, {t.name})\n"),
        "turbokv-cpu-codecs.inc": rows(cpu_codec_prototypes),
        "turbokv-int8-formats.inc": rows(int8_format),
        "turbokv-type-enum.inc": type_enum(),
        "turbokv-traits.inc": rows(traits),
        "turbokv-traits-cpu.inc": rows(traits_cpu),
        "turbokv-quantize-chunk.inc": quantize_cases(),
        "turbokv-cache-types.inc": rows(lambda t: f"{enum_name(t)},\n"),
        "turbokv-type-from-name.inc": rows(lambda t: f'if (s == "{t.name}") {{ return {enum_name(t)}; }}\n'),
        "turbokv-test-limits.inc": rows(test_limit),
        "turbokv-test-dot-limits.inc": rows(test_dot_limit),
        "turbokv-families.inc": families(),
    }
    files = {f"ggml-ext/generated/{name}": content.encode() for name, content in text.items()}
    files |= {f"tests/golden/{t.name}.bin": golden.build(t) for t in TYPES}
    files["results/schema.json"] = (json.dumps(Record.model_json_schema(), indent=1) + "\n").encode()
    mini = measured("mini-q8_0.gguf", README_CACHES)
    readme = {name: mini[name] for name in ("kld", "needle", "speed_tg", "speed_pp")} | {"types": type_table()}
    files["README.md"] = with_tables("README.md", readme)
    files["results/README.md"] = with_tables("results/README.md", {"results": all_measured()})
    gpu = {f"gpu_{name}": gpu_times(columns) for name, columns in GPU_TABLES.items()} | {"gpu_model": gpu_model()}
    files["docs/cuda-attention.md"] = with_tables("docs/cuda-attention.md", gpu)
    files["docs/hooks.md"] = with_tables("docs/hooks.md", {"hooks": hook_table()})
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
            print(f"generate.py: {path} is not what its source says; run scripts/generate.py and commit the result")
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
