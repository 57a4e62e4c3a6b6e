"""The bundled llama.cpp tools know our cache types."""

from __future__ import annotations

import json
import re
import subprocess

import llama_perplexity
import pytest
from turbokv import data, native
from turbokv.cache_type import NAMES
from turbokv.spec import TYPES

TOOLS = native.build_info()["tools"]
OPTIONS = ("--cache-type-k", "--cache-type-v", "--cache-type-k-draft", "--cache-type-v-draft")


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([native.tool(tool), *arguments], capture_output=True, text=True, timeout=120, check=False)


def listed_types(text: str, option: str) -> set[str]:
    """The allowed values that a help text gives for one option."""
    found = re.search(rf"{option} TYPE\s.*?allowed values:(.*?)\(default", text, re.DOTALL)
    assert found, f"no values for {option}"
    return set(re.findall(r"\w+", found[1]))


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_starts(tool: str) -> None:
    started = run(tool, "--help")
    assert started.returncode in (0, 1)  # llama-quantize calls --help an error
    assert re.search("usage|--help", started.stdout + started.stderr)


@pytest.mark.parametrize("tool", ["llama-server", "llama-cli", "llama-perplexity"])
def test_cache_type_names(tool: str) -> None:
    usage = run(tool, "--help").stdout
    for option in OPTIONS:
        assert listed_types(usage, option) == set(NAMES), option


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("tool", ["llama-server", "llama-cli", "llama-perplexity"])
def test_unknown_type_is_refused_with_the_list_of_types(tool: str, option: str) -> None:
    refused = run(tool, "--model", str(data.MINI), option, "turbo9")
    assert refused.returncode == 1
    assert "Unsupported cache type: turbo9" in refused.stderr
    assert listed_types(refused.stdout + refused.stderr, option) == set(NAMES)


def test_llama_bench() -> None:
    arguments = ["-ctk", "turbo3", "-ctv", "turbo4", "-fa", "1", "-p", "16", "-n", "4", "-r", "1", "-o", "json"]
    bench = run("llama-bench", "--model", str(data.MINI), *arguments)
    assert bench.returncode == 0, bench.stderr
    rows = json.loads(bench.stdout)
    assert [(row["n_prompt"], row["n_gen"]) for row in rows] == [(16, 0), (0, 4)]
    for row in rows:
        assert (row["type_k"], row["type_v"]) == ("turbo3", "turbo4")
        assert row["avg_ts"] > 0


def test_llama_bench_knows_every_type_of_the_spec() -> None:
    every = ",".join(kv_type.name for kv_type in TYPES)
    arguments = ["-ctk", every, "-fa", "1", "-p", "4", "-n", "0", "-r", "1", "--no-warmup", "-o", "json"]
    bench = run("llama-bench", "--model", str(data.MINI), *arguments)
    assert bench.returncode == 0, bench.stderr
    assert [row["type_k"] for row in json.loads(bench.stdout)] == [kv_type.name for kv_type in TYPES]


@pytest.mark.parametrize("option", ["-ctk", "-ctv"])
def test_llama_bench_refuses_an_unknown_type(option: str) -> None:
    refused = run("llama-bench", "--model", str(data.MINI), option, "turbo9")
    assert refused.returncode == 1
    assert f"invalid parameter for argument: {option}" in refused.stderr


@pytest.fixture(scope="module")
def f16_perplexity() -> float:
    return llama_perplexity.perplexity(data.MINI, data.SAMPLE, 256, 2)


@pytest.mark.parametrize(
    "cache",
    [
        "-ctk turbo3 -ctv turbo3",
        "-ctk turbo3 -fa off",  # K through MUL_MAT instead of FLASH_ATTN_EXT
    ],
)
def test_llama_perplexity_with_turbo3_is_near_f16(cache: str, f16_perplexity: float) -> None:
    measured = llama_perplexity.perplexity(data.MINI, data.SAMPLE, 256, 2, *cache.split())
    assert measured == pytest.approx(f16_perplexity, rel=0.1)
