"""Which type a head size gets, and what is said where none of ours can work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import write_llama
from turbokv import data, native, perplexity
from turbokv.cache_type import CachePair, parse_pairs
from turbokv.engine import Context, Model
from turbokv.errors import CacheRefused, TurbokvError
from turbokv.server import Server

TinyModel = Callable[[int], Path]

REFUSAL = "turbo3 needs heads of a multiple of 64 values, because llama.cpp rotates no others; "
WORKING = {
    80: "this model has head_dim 80. Types that work here: f16, bf16\n",
    96: "this model has head_dim 96. Types that work here: q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl, f16, bf16\n",
}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Path of a random model with the given head size, written at its first use."""
    folder = tmp_path_factory.mktemp("tiny")
    return cache(lambda head_dim: write_llama(folder / f"head_dim_{head_dim}.gguf", head_dim))


def run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def kld(model: Path, k: str, v: str) -> list[str | Path]:
    return [
        *(sys.executable, "-m", "turbokv", "kld", "--no-reference-cache", "-m", model),
        *("-c", "64", "--chunks", "1", "--cache", f"{k}/{v}"),
    ]


def llama_bench(model: Path, k: str, v: str) -> list[str | Path]:
    return [native.tool("llama-bench"), "-m", model, *f"-ctk {k} -ctv {v} -fa 1 -p 4 -n 0 -r 1 -v".split()]


# Not llama-perplexity: it exits without flushing its log, and loses the message now and then.
commands = pytest.mark.parametrize("command", [kld, llama_bench])
Command = Callable[[Path, str, str], list[str | Path]]
EXIT_CODE: dict[Command, int] = {kld: 3, llama_bench: 1}


# --- heads that llama.cpp does not rotate


@commands
@pytest.mark.parametrize(("k", "v", "side"), [("turbo3", "f16", "K"), ("f16", "turbo3", "V")])
@pytest.mark.parametrize("head_dim", WORKING)
def test_heads_that_are_not_rotated_are_refused_with_the_types_that_work(
    command: Command, k: str, v: str, side: str, head_dim: int, tiny_model: TinyModel
) -> None:
    refused = run(command(tiny_model(head_dim), k, v))
    assert refused.returncode == EXIT_CODE[command], refused.stderr  # an error exit, not a signal
    assert f"turbokv: {side} cache type {REFUSAL}{WORKING[head_dim]}" in refused.stderr


def test_upstream_type_whose_block_does_not_fit_is_refused_too(tiny_model: TinyModel) -> None:
    refused = run(kld(tiny_model(80), "q4_0", "f16"))
    assert refused.returncode == 3
    assert "q4_0 with block size 32 does not divide" in refused.stderr


@commands
def test_same_model_works_with_f16(command: Command, tiny_model: TinyModel) -> None:
    worked = run(command(tiny_model(80), "f16", "f16"))
    assert worked.returncode == 0, worked.stderr


@pytest.mark.parametrize("head_dim", WORKING)
def test_every_type_that_the_refusal_names_works(head_dim: int, tiny_model: TinyModel) -> None:
    with Model(tiny_model(head_dim)) as model:
        for name in WORKING[head_dim].removesuffix("\n").split("work here: ")[1].split(", "):
            with Context(model, CachePair(name, name), 64, 1) as context:
                for logits in context.logits(np.arange(1, 33, dtype=np.int32), first=0):
                    assert np.isfinite(logits).all(), name


def test_server_refuses_what_it_cannot_rotate_and_serves_f16(tiny_model: TinyModel) -> None:
    model = tiny_model(80)
    with pytest.raises(TurbokvError, match="ended with status 1 ") as refusal:
        Server(model, ["--cache-type-k", "turbo3", "--ctx-size", "128"])
    assert f"turbokv: K cache type {REFUSAL}{WORKING[80]}" in str(refusal.value)
    with Server(model, ["--cache-type-k", "f16", "--ctx-size", "128"]) as server:
        assert server.post("/completion", {"prompt": "a", "n_predict": 2, "ignore_eos": True})["tokens_predicted"] == 2


def test_refused_measurement_leaves_no_file(tiny_model: TinyModel, tmp_path: Path) -> None:
    refused = run([*kld(tiny_model(80), "turbo3", "turbo3"), "--json", tmp_path / "kld.json"])
    assert refused.returncode == 3
    assert list(tmp_path.iterdir()) == []


def test_llama_bench_says_why_without_being_asked(tiny_model: TinyModel) -> None:
    command = llama_bench(tiny_model(80), "turbo3", "f16")
    command.remove("-v")
    assert "head_dim 80" in run(command).stderr


# --- rotation switched off


@pytest.mark.parametrize(("k", "v", "side"), [("turbo3", "f16", "K"), ("f16", "turbo3", "V")])
def test_unrotated_is_refused(k: str, v: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    message = f"turbokv: {side} cache type turbo3 stores rotated values, but llama.cpp does not rotate {side} here"
    with pytest.raises(TurbokvError, match=message):
        Server(data.MINI, ["--cache-type-k", k, "--cache-type-v", v, "--ctx-size", "128"])
    for command in (kld, llama_bench):
        refused = run(command(data.MINI, k, v))
        assert refused.returncode == EXIT_CODE[command], refused.stderr
        assert message in refused.stderr


def test_unrotated_q8_0_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    worked = run(llama_bench(data.MINI, "q8_0", "q8_0"))
    assert worked.returncode == 0, worked.stderr
    assert "attention rotation force disabled" in worked.stderr


# --- types that rotate by themselves


def logits_of(path: Path, cache: CachePair) -> NDArray[np.float32]:
    tokens = np.arange(1, 65, dtype=np.int32)
    with Model(path) as model, Context(model, cache, 64, 1) as context:
        return np.concatenate([logits.copy() for logits in context.logits(tokens, first=0)])


@pytest.mark.parametrize("cache", ["tbq3/f16", "f16/tbq3", "tbq4/tbq2"])
def test_graph_does_not_rotate_for_types_that_do_it_themselves(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotating in the graph too would give other codes; where it is forced off the same must come out."""
    (pair,) = parse_pairs(cache)
    ours = logits_of(data.MINI, pair)
    monkeypatch.setenv("LLAMA_ATTN_ROT_DISABLE", "1")
    np.testing.assert_array_equal(logits_of(data.MINI, pair), ours)


def test_graph_may_rotate_one_side_only() -> None:
    assert np.isfinite(logits_of(data.MINI, CachePair("tbq3", "turbo3"))).all()


@commands
@pytest.mark.parametrize("head_dim", [64, 80, 192])
def test_tbq_is_refused_where_its_block_does_not_fit(command: Command, head_dim: int, tiny_model: TinyModel) -> None:
    rotated = "turbo4, turbo3, turbo2, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl, "
    message = (
        f"turbokv: V cache type tbq3 needs heads of a multiple of 128 values, its block; this model has head_dim "
        f"{head_dim}. Types that work here: {rotated if head_dim % 64 == 0 else ''}f16, bf16\n"
    )
    refused = run(command(tiny_model(head_dim), "f16", "tbq3"))
    assert refused.returncode == EXIT_CODE[command], refused.stderr
    assert message in refused.stderr


# --- architectures that need a word of their own; upstream's own test writes random models of all of them


@pytest.fixture(scope="session")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("architectures")
    run([native.tool("test-llama-archs"), "-o", folder]).check_returncode()
    return folder


def finite_logits(path: Path, name: str) -> bool:
    with Model(path) as model, Context(model, CachePair(name, name), 64, 1) as context:
        return all(np.isfinite(logits).all() for logits in context.logits(np.arange(1, 33, dtype=np.int32), first=0))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseek2-moe", "latent vector"),  # MLA: upstream stores K unrotated although its flag says otherwise
        ("deepseek4-moe", "latent vector"),
        ("minimax-m3-moe", "keys of an indexer"),  # upstream stores them as they are, in the type of K
        ("qwen4exp-moe", "keys of an indexer"),
    ],
)
def test_architectures_without_rotation_are_refused(name: str, reason: str, architectures: Path) -> None:
    path = architectures / f"{name}.gguf"
    assert finite_logits(path, "q8_0")
    with pytest.raises(CacheRefused, match=reason):
        finite_logits(path, "turbo3")


def test_indexer_keys_may_be_in_a_type_that_rotates_by_itself(architectures: Path) -> None:
    for name in ("minimax-m3-moe", "qwen4exp-moe"):
        assert finite_logits(architectures / f"{name}.gguf", "tbq3")


@pytest.mark.parametrize(
    "name",
    ["mamba-dense", "gemma3-dense", "gpt-oss-moe", "falcon-h1-dense", "qwen3next-moe", "lfm2-dense"],
)
def test_recurrent_sliding_window_and_hybrid_models_work(name: str, architectures: Path) -> None:
    assert finite_logits(architectures / f"{name}.gguf", "turbo3")


# --- the block that fits the heads


@pytest.mark.parametrize(
    ("head_dim", "effective"),
    [
        (64, "turbo3_64/turbo4_64"),
        (128, "turbo3/turbo4"),
        (192, "turbo3_64/turbo4_64"),
        (256, "turbo3/turbo4"),
        (320, "turbo3_64/turbo4_64"),
    ],
)
def test_short_names_get_the_block_that_divides_the_heads(head_dim: int, effective: str, tiny_model: TinyModel) -> None:
    with Model(tiny_model(head_dim)) as model:
        assert str(model.effective(CachePair("turbo3", "turbo4"))) == effective
        with Context(model, CachePair("turbo3", "turbo4"), 256, 1) as short:
            pair = CachePair(*effective.split("/"))
            with Context(model, pair, 256, 1) as explicit:
                assert short.cache_bytes == explicit.cache_bytes


def test_built_in_models_have_heads_of_128_and_64() -> None:
    for path, effective in ((data.MINI, "turbo3/f16"), (data.BIAS, "turbo3_64/f16")):
        with Model(path) as model:
            assert str(model.effective(CachePair("turbo3", "f16"))) == effective


def test_64_block_asked_for_by_name_stays() -> None:
    with Model(data.MINI) as model:
        assert str(model.effective(CachePair("turbo3_64", "turbo4"))) == "turbo3_64/turbo4"


@pytest.mark.parametrize(
    ("head_dim", "name"), [(64, "turbo4"), (192, "turbo4"), (256, "turbo4"), (320, "turbo4"), (256, "tbq4")]
)
def test_every_head_size_decodes_what_it_encoded(head_dim: int, name: str, tiny_model: TinyModel) -> None:
    """A 4-bit type costs what q4_0, the upstream type of about its size, costs on the same heads."""
    tokens = np.random.default_rng(0).integers(1, 512, 256, dtype=np.int32)
    with Model(tiny_model(head_dim)) as model:
        measured = perplexity.measure(
            model, tokens, parse_pairs(f"q4_0,{name}"), n_ctx=256, n_windows=1, n_threads=1, with_kld=True
        )
    q4_0, ours = (record.model_dump()["kld"]["mean"] for record in perplexity.records(measured))
    assert 0 < ours < 2 * q4_0
