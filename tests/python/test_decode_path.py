"""Decoding against prefill: the built-in models agree with themselves, and what is broken on purpose is noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from turbokv import data, decode_path, engine
from turbokv.cache_type import CachePair
from turbokv.decode_path import FIRST, Agreement, measure, measure_steps
from turbokv.doctor import HEAD_DIMS
from turbokv.engine import Context, Model, default_threads
from turbokv.spec import FAMILIES, TYPES

Tokens = NDArray[np.int32]
Way = Callable[[Model, CachePair, Tokens, int], Agreement]


@pytest.fixture(scope="module")
def mini() -> Iterator[Model]:
    with Model(data.MINI) as model:
        yield model


@pytest.fixture(scope="module")
def window(mini: Model) -> Tokens:
    return decode_path.sample_window(mini)


def both(name: str) -> CachePair:
    return CachePair(name, name)


# --- the built-in models


def test_turbo3_decodes_as_it_prefills(mini: Model, window: Tokens) -> None:
    found = measure(mini, both("turbo3"), window, default_threads())
    assert found.n_scored >= 400
    assert found.ok, found


def serves(head_dim: int, family: str) -> bool:
    return any(head_dim % kv_type.block == 0 for kv_type in TYPES if kv_type.family == family)


FITTING = [(path, family) for path, head_dim in HEAD_DIMS.items() for family in FAMILIES if serves(head_dim, family)]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "family"), FITTING, ids=[f"{path.stem}-{family}" for path, family in FITTING])
def test_every_type_decodes_as_it_prefills(path: Path, family: str) -> None:
    with Model(path) as model:
        found = measure(model, both(family), decode_path.sample_window(model), default_threads())
    assert found.ok, found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_type_behind_q8_0_keys_decodes_as_it_prefills(mini: Model, window: Tokens, family: str) -> None:
    found = measure(mini, CachePair("q8_0", family), window, default_threads())
    assert found.ok, found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_longer_contexts_decode_as_they_prefill(mini: Model, family: str) -> None:
    """Kernels may go another way for long caches, such as one part of the cache for each thread."""
    found = measure(mini, both(family), mini.tokenize(data.read_text(None))[:1100], default_threads())
    assert found.ok, found


# --- what is compared


class Watched(Context):
    """Notes how many tokens each pass of each context takes, as libllama has it, and how many it got."""

    limits: list[int]
    passes: list[list[int]]

    def __init__(self, model: Model, pair: CachePair, n_ctx: int, n_threads: int, *, n_batch: int | None) -> None:
        super().__init__(model, pair, n_ctx, n_threads, n_batch=n_batch)
        self.limits.append(self._lib.llama_n_ubatch(self.handle))
        self.passes.append([])

    def _decode(self, tokens: Tokens, start: int, first: int) -> NDArray[np.float32]:
        self.passes[-1].append(len(tokens))
        return super()._decode(tokens, start, first)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    Watched.limits, Watched.passes = [], []
    monkeypatch.setattr(decode_path, "Context", Watched)
    return Watched


def test_one_pass_is_compared_with_one_token_per_pass(
    mini: Model, window: Tokens, watched: type[Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MAX_UBATCH", 32)  # what Context takes by itself is less than the window
    found = measure(mini, both("turbo4"), window[:100], default_threads())
    assert watched.limits == [100, 1]
    assert watched.passes == [[100], [1] * 100]
    assert found.n_scored == 100 - FIRST - 1


def test_steps_repeat_every_scored_token_alone(mini: Model, window: Tokens, watched: type[Watched]) -> None:
    found = measure_steps(mini, both("turbo4"), window[:100], default_threads())
    assert watched.limits == [100]
    assert watched.passes == [[100] + [1] * (100 - FIRST)]
    assert found.ok
    assert found.n_scored == 100 - FIRST - 1


def test_repeating_takes_the_token_the_position_and_the_cache_before_it(mini: Model, window: Tokens) -> None:
    tokens = window[:40]
    with Context(mini, both("f16"), 40, 1, n_batch=1) as context:
        decoded = np.concatenate([logits.copy() for logits in context.logits(tokens, 0)])
        for position in (39, 20, 7):
            np.testing.assert_array_equal(context.repeat(tokens, position)[0], decoded[position])


# --- what is broken is noticed


class WrongToken(Context):
    """One token of the window arrives as another one."""

    def _decode(self, tokens: Tokens, start: int, first: int) -> NDArray[np.float32]:
        if len(tokens) == 1 and start == 100:
            tokens = tokens + 1
        return super()._decode(tokens, start, first)


class LostCell(Context):
    """From token 100 on, the cached token 80 is not seen."""

    def _decode(self, tokens: Tokens, start: int, first: int) -> NDArray[np.float32]:
        if len(tokens) == 1 and start >= 100:
            self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self.handle), 0, 80, 81)
        return super()._decode(tokens, start, first)


class NotANumber(Context):
    """One logit of one token is NaN."""

    def _decode(self, tokens: Tokens, start: int, first: int) -> NDArray[np.float32]:
        logits = super()._decode(tokens, start, first)
        if len(tokens) == 1 and start == 100:
            logits[0, 7] = np.nan
        return logits


class OnePercent(Context):
    """Logits that are too large by 1 %."""

    def _decode(self, tokens: Tokens, start: int, first: int) -> NDArray[np.float32]:
        logits = super()._decode(tokens, start, first)
        return logits * np.float32(1.01) if len(tokens) == 1 else logits


@pytest.mark.parametrize(
    ("fault", "way"),
    [
        *[(fault, measure) for fault in (Context, WrongToken, LostCell, NotANumber, OnePercent)],
        *[(fault, measure_steps) for fault in (WrongToken, NotANumber, OnePercent)],
    ],
)
def test_broken_decoding_is_noticed(
    mini: Model, window: Tokens, monkeypatch: pytest.MonkeyPatch, fault: type[Context], way: Way
) -> None:
    """The sound Context is among them: a measurement that always fails notices nothing."""
    monkeypatch.setattr(decode_path, "Context", fault)
    assert way(mini, both("turbo4"), window[:192], default_threads()).ok == (fault is Context)


@pytest.mark.parametrize(
    ("kld", "same_top", "ok"),
    [(0, 1, True), (9e-5, 0.996, True), (1e-4, 1, False), (0, 0.995, False), (float("nan"), 1, False)],
)
def test_bounds(kld: float, same_top: float, ok: bool) -> None:
    assert Agreement(kld, same_top, 447).ok == ok
