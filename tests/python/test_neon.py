"""The NEON code of the CPU attention: its C test, cross-compiled for aarch64 and run by QEMU.

The test compares with the hashes that plain C gives, too. `pytest -m qemu`: a minute on two cores.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
EXT = REPO / "ggml-ext"
GGML = REPO / "build" / "llama.cpp" / "ggml"
VERSION_H = REPO / "build" / "llama.cpp-build" / "ggml" / "src" / "ggml-version.h"
CC, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"

BASE = [GGML / "src" / "ggml.c", GGML / "src" / "ggml-quants.c", EXT / "turbokv-quants.c"]
TEST = [REPO / "tests" / "c" / "test-turbokv-attention.c", EXT / "turbokv-attention.c", EXT / "turbokv-tile.c"]
INCLUDE = [EXT, EXT / "generated", GGML / "include", GGML / "src", GGML / "src" / "ggml-cpu", VERSION_H.parent]
# Sections, so that the linker drops what the test does not reach: it refers to parts of ggml that are left out.
OPTIONS = ["-std=gnu11", "-O2", "-ffp-contract=off", "-ffunction-sections", "-fdata-sections"]
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wcast-qual", "-Wno-unused-function", "-Werror"]
# Only one thread of the test uses ggml's lock, which is C++.
LOCK = """
void ggml_critical_section_start(void) {}
void ggml_critical_section_end(void) {}
"""

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(
        not (shutil.which(CC) and shutil.which(QEMU)),
        reason=f"{CC} or {QEMU} is missing: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user",
    ),
    pytest.mark.skipif(not VERSION_H.is_file(), reason="build/ is not configured"),
]


def run(*command: str | Path) -> str:
    process = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert process.returncode == 0, f"{command[0]}:\n{process.stdout}{process.stderr}"
    return process.stdout


def compile_objects(sources: list[Path], folder: Path, *options: str) -> list[Path]:
    include = [f"-I{path}" for path in INCLUDE]
    objects = [folder / f"{source.stem}.o" for source in sources]
    for source, compiled in zip(sources, objects, strict=True):
        run(CC, *OPTIONS, *options, *include, "-c", source, "-o", compiled)
    return objects


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What the test needs of ggml-base."""
    folder = tmp_path_factory.mktemp("base")
    lock = folder / "lock.c"
    lock.write_text(LOCK)
    return compile_objects([*BASE, lock], folder)


@pytest.mark.parametrize("march", ["armv8-a", "armv8.2-a+dotprod"])
def test_attention(march: str, base: list[Path], tmp_path: Path) -> None:
    objects = compile_objects(TEST, tmp_path, f"-march={march}", *WARNINGS)
    executable = tmp_path / "test-turbokv-attention"
    run(CC, "-static", "-Wl,--gc-sections", *objects, *base, "-o", executable, "-lm", "-lpthread")
    hashes = REPO / "tests" / "c" / "attention-hashes.txt"
    assert "of its bound" in run(QEMU, executable, "--every", "11", hashes)
