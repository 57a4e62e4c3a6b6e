"""The configure step: what it says when it cannot go on, and that it changes nothing when there is nothing to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "scripts"))

from update_upstream import PIN_FILE, read_pin  # noqa: E402

pytestmark = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on PATH")


def configure(build: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", "-S", str(REPO), "-B", str(build), "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}"]
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


@pytest.fixture
def upstream() -> Path:
    """The unmodified llama.cpp that the build has unpacked."""
    trees = list((REPO / "build" / "upstream").glob("*/vendor/llama.cpp"))
    if not trees:
        pytest.skip("build/upstream is not there: this build uses TURBOKV_LLAMA_SOURCE")
    return trees[0]


def hooked_files_of(source: Path, dest: Path) -> None:
    """A copy of just the files that hooks touch: enough for the hooks to be applied."""
    hooks = tomllib.loads((REPO / "ggml-ext" / "hooks.toml").read_text())["hook"]
    for name in {hook["file"] for hook in hooks}:
        (dest / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, dest / name)


def test_configuring_again_writes_nothing() -> None:
    if not (REPO / "build" / "CMakeCache.txt").is_file():
        pytest.skip("build/ is not configured")
    run = configure(REPO / "build")
    assert run.returncode == 0, run.stderr
    assert "; 0 files written" in run.stdout


def test_a_lost_anchor_stops_with_hook_file_and_anchor(tmp_path: Path, upstream: Path) -> None:
    source = tmp_path / "llama.cpp"
    hooked_files_of(upstream, source)
    changed = source / "common" / "arg.cpp"
    changed.write_text(changed.read_text().replace("const std::vector<ggml_type> kv_cache_types = {", "auto types = {"))
    run = configure(tmp_path / "build", f"-DTURBOKV_LLAMA_SOURCE={source}")
    assert run.returncode != 0
    for part in ("cache-type-names", "common/arg.cpp", "kv_cache_types = {", "hooks.toml"):
        assert part in run.stderr
    assert not (tmp_path / "build" / "llama.cpp").exists()


def test_a_tree_that_is_not_llama_cpp_is_named(tmp_path: Path) -> None:
    run = configure(tmp_path / "build", f"-DTURBOKV_LLAMA_SOURCE={tmp_path}")
    assert run.returncode != 0
    assert f"{tmp_path} is not a llama.cpp source tree" in run.stderr


def test_without_network_it_says_what_to_do_and_keeps_nothing(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    run = configure(tmp_path / "build", f"-DTURBOKV_CACHE_DIR={cache}", PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert run.returncode != 0
    assert "-DTURBOKV_LLAMA_SOURCE=" in run.stderr
    assert "No matching distribution" in run.stderr  # pip's own reason is shown too
    assert not any(path.suffix == ".gz" for path in cache.rglob("*"))


def test_a_damaged_cached_release_is_not_used(tmp_path: Path) -> None:
    version = read_pin(PIN_FILE.read_text())["TURBOKV_PIN_VERSION"]
    archive = tmp_path / "cache" / f"llama_cpp_python-{version}.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(b"half a download")
    run = configure(tmp_path / "build", f"-DTURBOKV_CACHE_DIR={archive.parent}", PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert run.returncode != 0
    assert "is damaged or not the pinned release" in run.stdout
    assert not archive.exists()


def test_cuda_without_its_toolkit_is_refused(tmp_path: Path, upstream: Path) -> None:
    options = ("-DTURBOKV_CUDA=ON", "-DCMAKE_DISABLE_FIND_PACKAGE_CUDAToolkit=ON")
    run = configure(tmp_path / "build", f"-DTURBOKV_LLAMA_SOURCE={upstream}", *options)
    assert run.returncode != 0
    assert "needs the CUDA toolkit 12.4 or newer" in run.stderr


def test_every_cpu_variant_has_our_sources_and_is_installed(tmp_path: Path, upstream: Path) -> None:
    build = tmp_path / "build"
    variants = ("-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON", "-DGGML_NATIVE=OFF", "-DTURBOKV_TESTS=OFF")
    run = configure(build, f"-DTURBOKV_LLAMA_SOURCE={upstream}", *variants)
    assert run.returncode == 0, run.stderr

    compdb = subprocess.run(["ninja", "-C", build, "-t", "compdb"], capture_output=True, text=True, check=True)
    sources: dict[str, set[str]] = {}
    for command in json.loads(compdb.stdout):
        target = re.search(r"/(ggml-cpu[^/]*)\.dir/", command["output"])
        if target and not target[1].endswith("-feats"):
            source = Path(command["file"]).name
            sources.setdefault(target[1], set()).add(source)
            assert not source.startswith("turbokv") or "-ffp-contract=off" in command["command"]
    assert len(sources) > 2
    for library, names in sources.items():
        assert {"turbokv-cpu.c", "turbokv-attention.c", "turbokv-tile.c"} <= names, library
        assert library in (build / "cmake_install.cmake").read_text()
