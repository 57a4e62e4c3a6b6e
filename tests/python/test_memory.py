"""Sizes that are asked of llama.cpp without allocating are those that it allocates."""

from __future__ import annotations

import re
from pathlib import Path

import farm
import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from turbokv import data
from turbokv.cache_type import CachePair, parse_pairs
from turbokv.engine import Context, Model
from turbokv.errors import TurbokvError
from turbokv.memory import Sizes
from turbokv.server import Server

# Sliding windows, heads or KV heads that differ by layer, recurrent states, hybrids, latent vectors, indexers.
ARCHITECTURES = (
    "deci deepseek2 falcon-h1 gemma2 gemma3 gpt-oss granitehybrid jamba laguna lfm2 llama4 mamba minicpm3 minimax-m3 "
    "mpt nemotron_h openelm phi3 plamo2 qwen3next"
)
MIB = 2**20


@pytest.mark.parametrize("path", [data.MINI, data.BIAS], ids=["mini", "bias"])
@pytest.mark.parametrize("n_ctx", [1, 256, 1000, 4096])
def test_kv_bytes_are_those_of_a_context(path: Path, n_ctx: int) -> None:
    with Sizes(path) as sizes, Model(path) as model:
        for pair in parse_pairs("f16,q8_0,turbo4,q8_0/turbo3,turbo2/turbo4,bf16/q4_0"):
            with Context(model, pair, n_ctx, 1) as context:
                assert sizes.usage(pair, n_ctx).kv == context.cache_bytes, pair


def test_kv_bytes_by_the_formula() -> None:
    """Padded tokens, layers, KV heads, values of a head, bytes of a block: mini has heads of 128, bias of 64."""
    with Sizes(data.MINI) as mini, Sizes(data.BIAS) as bias:
        assert mini.usage(CachePair("turbo3", "f16"), 1000).kv == 1024 * 8 * 2 * (50 + 2 * 128)
        assert bias.usage(CachePair("turbo3", "f16"), 1000).kv == 1024 * 8 * 2 * (26 + 2 * 64)


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    names = "|".join(ARCHITECTURES.split())
    return farm.write_models(tmp_path_factory.mktemp("farm") / "models", f"^({names})$")


def test_every_architecture_allocates_what_is_told(architectures: list[Path]) -> None:
    """usage() on a model that is really loaded allocates what it tells; KV to the byte, compute to what the log rounds
    to 0.01 MiB and the last alignments. What is refused is refused by both."""
    assert len(architectures) >= 20
    for path in architectures:
        with Sizes(path) as told, Sizes(path) as real:
            real.model.close()
            real.model = Model(path)
            for pair in parse_pairs("f16,q8_0/turbo3,turbo4"):
                for n_ctx, n_seq in ((256, 1), (4000, 1), (4000, 3)):
                    try:
                        expected = real.usage(pair, n_ctx, n_seq)
                    except TurbokvError:
                        with pytest.raises(TurbokvError):
                            told.usage(pair, n_ctx, n_seq)
                        continue
                    usage = told.usage(pair, n_ctx, n_seq)
                    where = f"{path.stem} {pair} {n_ctx} {n_seq}"
                    assert usage.kv == expected.kv, where
                    assert abs(usage.compute - expected.compute) <= 0.02 * MIB, where


@pytest.mark.parametrize("n_seq", [1, 3])
def test_llama_server_allocates_what_is_told(n_seq: int) -> None:
    arguments = ["-ctk", "q8_0", "-ctv", "turbo3", "-c", "3000", "-np", str(n_seq), "-lv", "4"]
    with Server(data.MINI, arguments) as server:
        log = server.log()
    with Sizes(data.MINI) as sizes:
        usage = sizes.usage(CachePair("q8_0", "turbo3"), 3000, n_seq)
    logged = {what: float(mib) for what, mib in re.findall(r"(KV|compute) buffer size = +([\d.]+) MiB", log)}
    assert logged["KV"] * MIB == pytest.approx(usage.kv, abs=0.01 * MIB)
    assert logged["compute"] * MIB == pytest.approx(usage.compute, abs=0.02 * MIB)


def test_weights_and_header(architectures: list[Path]) -> None:
    for path in (data.MINI, *architectures[:3]):
        reader = gguf.GGUFReader(path)
        with Sizes(path) as sizes:
            assert sizes.weights == sum(int(tensor.n_bytes) for tensor in reader.tensors)
            assert sizes.parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)
            assert sizes.architecture == reader.fields["general.architecture"].contents()


def test_refused_cache_says_why() -> None:
    with Sizes(data.BIAS) as sizes, pytest.raises(TurbokvError, match="tbq3 needs heads of a multiple of 128"):
        sizes.usage(CachePair("tbq3", "f16"), 256)


def test_what_is_no_whole_model_is_refused(tmp_path: Path) -> None:
    half = tmp_path / "half.gguf"
    half.write_bytes(data.MINI.read_bytes()[:1_000_000])
    with pytest.raises(TurbokvError, match="cannot be loaded"):
        Sizes(half)
    with pytest.raises(TurbokvError, match="no model at"):
        Sizes(tmp_path / "absent.gguf")


@given(memory=st.integers(17_000_000, 120_000_000), n_seq=st.sampled_from([1, 4]))
def test_longest_context_fits_and_the_next_does_not(memory: int, n_seq: int) -> None:
    pair = CachePair("q8_0", "turbo3")
    with Sizes(data.MINI) as sizes:
        longest = sizes.longest(pair, memory, 8192, n_seq)

        def total(n_ctx: int) -> int:
            return sizes.weights + sizes.usage(pair, n_ctx * n_seq, n_seq).total

        assert longest % 256 == 0
        assert longest == 0 or total(longest) <= memory
        # the buffers of the largest graph are not quite monotone: by less than a MiB here
        assert longest == 8192 or total(longest + 256) > memory - MIB
