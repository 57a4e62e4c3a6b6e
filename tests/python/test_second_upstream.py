"""The overlay fits more than the pinned llama.cpp: the newer tree inside an xllamacpp release, built in build-second/.

Without ccache the build takes a quarter of an hour on two cores, so these tests run only when asked for:
`pytest -m upstream`, as scripts/update_upstream.py does.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import llama_perplexity
import pytest
from turbokv import data, native
from turbokv.spec import TYPES

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "scripts"))

import update_upstream  # noqa: E402
from apply_hooks import hooked_files, load_hooks  # noqa: E402

VERSION = "2026.10.11549"
SHA256 = "c17ee1163006f70726abb9f72137830818f3d8cb60bfc34cb232d08428eaa22b"
C_TESTS = ["turbokv-golden", "turbokv-traits", "turbokv-ops", "test-quantize-fns"]

pytestmark = [pytest.mark.slow, pytest.mark.upstream]


@pytest.fixture(scope="module")
def tree() -> Path:
    try:
        return update_upstream.second_tree(VERSION, SHA256)
    except update_upstream.FetchError as error:
        pytest.skip(f"xllamacpp {VERSION} is neither cached nor to be had: {error}")


@pytest.fixture(scope="module")
def build(tree: Path) -> Path:
    targets = [name if name.startswith("test-") else f"test-{name}" for name in C_TESTS]
    update_upstream.build_second(tree, "turbokv-tools", *targets)
    return update_upstream.SECOND_BUILD


@pytest.fixture
def second(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver finds the tools of this build."""
    monkeypatch.setattr(native, "native_dir", lambda: build / "bin")


def llama_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    common = ["-m", str(data.MINI), "-fa", "1", "-p", "4", "-n", "0", "-r", "1", "--no-warmup", "-o", "json"]
    command: list[str | Path] = [native.tool("llama-bench"), *common, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def test_it_is_another_llama_cpp(tree: Path) -> None:
    pin = update_upstream.read_pin(update_upstream.PIN_FILE.read_text())
    llama_h = (tree / "include" / "llama.h").read_bytes()
    assert hashlib.sha256(llama_h).hexdigest() != pin["TURBOKV_PIN_LLAMA_H"]


def test_every_hook_applies(tree: Path) -> None:
    hooks = load_hooks()
    assert set(hooked_files(tree, hooks)) == {hook.file for hook in hooks}


def test_c_tests_pass(build: Path) -> None:
    names = f"^({'|'.join(C_TESTS)})$"
    run = subprocess.run(
        ["ctest", "--test-dir", build, "-R", names, "--output-on-failure"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout
    assert f"out of {len(C_TESTS)}" in run.stdout


@pytest.mark.usefixtures("second")
def test_every_type_runs() -> None:
    every = [kv_type.name for kv_type in TYPES]
    bench = llama_bench("-ctk", ",".join(every))
    assert bench.returncode == 0, bench.stderr
    assert [row["type_k"] for row in json.loads(bench.stdout)] == every


@pytest.mark.usefixtures("second")
def test_unrotated_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    for option, side in (("-ctk", "K"), ("-ctv", "V")):
        refused = llama_bench(option, "turbo3")
        assert refused.returncode == 1, refused.stderr
        assert f"turbokv: {side} cache type turbo3 stores rotated values, but llama.cpp does not" in refused.stderr


@pytest.mark.usefixtures("second")
def test_perplexity_with_turbo3_is_near_f16() -> None:
    f16, turbo3 = (
        llama_perplexity.perplexity(data.MINI, data.SAMPLE, 256, 2, "-ctk", cache, "-ctv", cache)
        for cache in ("f16", "turbo3")
    )
    assert turbo3 == pytest.approx(f16, rel=0.1)
    assert turbo3 != f16
