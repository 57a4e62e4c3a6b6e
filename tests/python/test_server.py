"""llama-server with our cache types: it answers, its answers come out of the cache, and it says what it allocated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from turbokv import data, native, perplexity
from turbokv.cache_type import CachePair
from turbokv.engine import Context, Model
from turbokv.server import Server

SHOW_LIBRARY_LOG = ["-lv", "4"]  # llama-server hides the info lines of libllama, the KV sizes among them, below 4

SENTENCES = (
    "The old bridge carries the morning traffic over the river to the market and the harbour.",
    "The captain wrote in his diary that the storm had broken two masts and washed away the boats.",
    "The theatre company performed the play in a barn and the audience sat on bales of straw.",
    "The school stands on a hill above the village and its bell can be heard from the lake.",
)


def opening(sentence: str) -> str:
    return " ".join(sentence.split()[:4])


# Three times a sentence, then its first words: what follows can be copied from the cache, and from nowhere else.
COPY_PROMPTS = [f"{sentence} " * 3 + opening(sentence) for sentence in SENTENCES]


def start(model: Path, k: str, v: str, *arguments: str) -> Server:
    return Server(model, ["--cache-type-k", k, "--cache-type-v", v, *SHOW_LIBRARY_LOG, *arguments])


def complete(server: Server, prompt: str, n_predict: int, **settings: Any) -> dict[str, Any]:
    request = {"prompt": prompt, "n_predict": n_predict, "temperature": 0, "seed": 1, "return_tokens": True}
    return server.post("/completion", {**request, "cache_prompt": False, "ignore_eos": True, **settings})


def common_start(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.fixture(scope="module", params=["turbo3/turbo3", "q8_0/turbo4"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with start(data.MINI, *request.param.split("/"), "--ctx-size", "2048", "--parallel", "4") as started:
        yield started


# --- answers


def test_completion_is_answered(server: Server) -> None:
    assert complete(server, "The history of the city", 8)["content"].strip()


def test_chat_completion_is_answered(server: Server) -> None:
    request = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
    reply = server.post("/v1/chat/completions", {**request, "ignore_eos": True})
    assert reply["choices"][0]["message"]["content"].strip()
    assert reply["usage"]["completion_tokens"] == 8


def test_parallel_requests_start_like_the_same_ones_alone(server: Server) -> None:
    """Each of four slots reads its own cache. Four tokens, as batches of another size round differently."""
    alone = [complete(server, prompt, 4)["tokens"] for prompt in COPY_PROMPTS]
    with ThreadPoolExecutor(len(COPY_PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: complete(server, prompt, 24), COPY_PROMPTS))
    assert [reply["tokens"][:4] for reply in together] == alone
    assert len({reply["id_slot"] for reply in together}) == 4


def test_greedy_text_with_turbo4_starts_like_f16() -> None:
    """turbo4 and f16 agree on all of 24 tokens here, and 12 leave room for other CPUs. Without the sentences in its
    cache f16 itself starts with one of the tokens at most, so that 12 cannot come from the weights alone."""
    replies = {}
    for name in ("f16", "turbo4"):
        with start(data.MINI, name, name, "--ctx-size", "512", "--parallel", "1") as running:
            replies[name] = [complete(running, prompt, 12)["tokens"] for prompt in COPY_PROMPTS]
            if name == "f16":
                empty = [complete(running, opening(sentence), 12)["tokens"] for sentence in SENTENCES]
    assert replies["turbo4"] == replies["f16"]
    assert max(map(common_start, empty, replies["f16"])) <= 3


# --- what the log says


def kv_sizes(log: str) -> tuple[str, float, str, float]:
    """Type and MiB of K, then of V."""
    found = re.findall(r"K \((\w+)\): +([\d.]+) MiB, V \((\w+)\): +([\d.]+) MiB", log)
    assert len(found) == 1, log
    k, k_mib, v, v_mib = found[0]
    return k, float(k_mib), v, float(v_mib)


@pytest.mark.parametrize(
    ("model", "k", "v", "logged", "resolved"),
    [
        # 2048 cells of 8 layers with 2 KV heads of 128 values: 4 Mi values each in K and V
        (data.MINI, "turbo3", "f16", ("turbo3", 1.56, "f16", 8.0), []),
        (data.MINI, "q8_0", "turbo4", ("q8_0", 4.25, "turbo4", 2.06), []),
        # heads of 64: 2 Mi values each
        (data.BIAS, "turbo3", "turbo4_64", ("turbo3_64", 0.81, "turbo4_64", 1.06), ["K turbo3 -> turbo3_64"]),
        (data.BIAS, "turbo4", "turbo3", ("turbo4_64", 1.06, "turbo3_64", 0.81),
         ["K turbo4 -> turbo4_64", "V turbo3 -> turbo3_64"]),
    ],
    ids=["mini-turbo3-f16", "mini-q8_0-turbo4", "bias-turbo3-turbo4_64", "bias-turbo4-turbo3"],
)  # fmt: skip
def test_log_names_effective_types_and_mib(
    model: Path, k: str, v: str, logged: tuple[str, float, str, float], resolved: list[str]
) -> None:
    with start(model, k, v, "--ctx-size", "2048", "--parallel", "4") as running:
        log = running.log()
    assert kv_sizes(log) == logged
    assert re.findall(r"turbokv: ([KV] \w+ -> \w+) \(head_dim 64\)", log) == resolved


def test_log_names_effective_types_and_bytes_without_being_asked() -> None:
    with Server(data.BIAS, ["--cache-type-k", "turbo3", "--ctx-size", "256"]) as running:
        log = running.log()
    assert "turbokv: K turbo3 -> turbo3_64 (head_dim 64)" in log
    # 256 cells of 8 layers with 2 heads of 64 values: 26 bytes a head in turbo3_64, 128 in f16
    assert f"turbokv: cache K turbo3_64 {256 * 8 * 2 * 26} bytes, V f16 {256 * 8 * 2 * 128} bytes" in log


@pytest.mark.parametrize(("name", "eighths_of_a_bit"), [("turbo3", 25), ("turbo4", 33), ("q8_0", 68)])
def test_cache_bytes_are_bits_over_16_of_f16(name: str, eighths_of_a_bit: int) -> None:
    with (
        Model(data.MINI) as model,
        Context(model, CachePair("f16", "f16"), 512, 1) as f16,
        Context(model, CachePair(name, name), 512, 1) as ours,
    ):
        assert f16.cache_bytes == 2 * 2 * 512 * 8 * 2 * 128  # K and V, bytes, cells, layers, heads, values
        assert ours.cache_bytes * 16 * 8 == f16.cache_bytes * eighths_of_a_bit


# --- context shift and slot files


def test_server_generates_past_its_context_by_shifting_it() -> None:
    with start(data.MINI, "turbo3", "turbo3", "--ctx-size", "256", "--parallel", "1", "--context-shift") as running:
        reply = complete(running, COPY_PROMPTS[0], 300)
        log = running.log()
    assert reply["tokens_predicted"] == 300
    assert "slot context shift" in log


def shifted_logits(model: Model, name: str, tokens: NDArray[np.int32], shift: int) -> NDArray[np.float32]:
    """Logits of the last 64 tokens after `shift` tokens behind BOS were dropped and the rest moved down."""
    lib, n = native.llama(), 64
    n_old = len(tokens) - n
    with Context(model, CachePair(name, name), 512, 1) as context:
        for _ in context.logits(tokens[:n_old], n_old - 1):
            pass
        memory = lib.llama_get_memory(context.handle)
        assert lib.llama_memory_seq_rm(memory, 0, 1, 1 + shift)
        lib.llama_memory_seq_add(memory, 0, 1 + shift, n_old, -shift)
        batch = lib.llama_batch_init(n, 0, 1)
        for i, token in enumerate(tokens[n_old:].tolist()):
            batch.token[i], batch.pos[i] = token, n_old - shift + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, True
        batch.n_tokens = n
        status = lib.llama_decode(context.handle, batch)
        lib.llama_batch_free(batch)
        assert status == 0
        logits: NDArray[np.float32] = np.ctypeslib.as_array(
            lib.llama_get_logits(context.handle), (n, model.n_vocab)
        ).copy()
        return logits


@pytest.mark.parametrize("name", ["turbo3", "turbo4"])
def test_shifted_cache_is_as_good_as_a_fresh_one(name: str) -> None:
    """A shift decodes K, un-rotates it, turns it by RoPE, rotates and encodes it again: the second encoding may
    double K's error, no more (measured: 1.1 to 1.4 times the KLD). Nothing is dropped in the fresh cache."""
    with Model(data.MINI) as model:
        tokens = model.tokenize(data.SAMPLE.read_text()[:4000])[:320]
        kld = {}
        for shift in (0, 128):
            reference, ours = (shifted_logits(model, cache, tokens, shift) for cache in ("f16", name))
            kld[shift] = perplexity.score(ours, reference, tokens[-64:]).kld.mean()
    assert kld[128] < 2 * kld[0]


def test_restored_slot_continues_like_the_saved_one(tmp_path: Path) -> None:
    arguments = ("--ctx-size", "512", "--parallel", "1", "--slot-save-path", str(tmp_path))
    with start(data.MINI, "turbo3", "turbo3", *arguments) as first:
        n_prompt = complete(first, COPY_PROMPTS[1], 0, cache_prompt=True)["tokens_evaluated"]
        saved = first.post("/slots/0?action=save", {"filename": "slot.bin"})
        expected = complete(first, COPY_PROMPTS[1], 16, cache_prompt=True)
    # per token and layer 2 heads of 50 bytes, in K and in V; the tokens and a header come on top
    assert 0 <= saved["n_written"] - saved["n_saved"] * 8 * 2 * 2 * 50 < 4096

    with start(data.MINI, "turbo3", "turbo3", *arguments) as second:
        assert second.post("/slots/0?action=restore", {"filename": "slot.bin"})["n_restored"] == saved["n_saved"]
        restored = complete(second, COPY_PROMPTS[1], 16, cache_prompt=True)
    assert restored["timings"]["cache_n"] == n_prompt - 1  # only the last token was computed again
    assert restored["tokens"] == expected["tokens"]
