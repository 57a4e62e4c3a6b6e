"""What the cache types cost on every kind of attention, on random models whose output hangs on the cache."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from paths import Sequences, TokenPath, mean_kld, rotation_off
from peaked_models import MODELS, granularity
from turbokv import native, perplexity
from turbokv.cache_type import CachePair, parse_pairs
from turbokv.engine import Context, Model
from turbokv.errors import TurbokvError
from turbokv.record import KldResult
from turbokv.spec import BY_NAME, FAMILIES

CTX = 256
F16 = CachePair("f16", "f16")

# KLD in units of q4_0's on the same model, by index bits: its range over the models, measured 1.03..1.36, 2.9..4.2 and
# 4.7..9.2, and its geometric mean, measured 1.17..1.20, 3.41..3.44 and 7.2..7.6 over the types.
RATIO = {4: (0.85, 1.65), 3: (2.4, 5.0), 2: (4.0, 11.0)}
MEAN_RATIO = {4: 1.19, 3: 3.42, 2: 7.4}

Klds = dict[str, float]  # mean KLD from f16, by the cache's short name
GetModel = Callable[[str], Model]
GetKlds = Callable[[str], Klds]

TAKEN = [(name, family) for name, model in MODELS.items() for family in model.families]
REFUSED = [(name, family) for name in MODELS for family in FAMILIES if (name, family) not in TAKEN]
ROTATED = list(dict(TAKEN))


@pytest.fixture(scope="module")
def tokens() -> NDArray[np.int32]:
    """One text: BOS, then random tokens."""
    return np.append(0, np.random.default_rng(0).integers(1, 512, CTX - 1)).astype(np.int32)


@pytest.fixture(scope="module")
def get_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GetModel]:
    folder = tmp_path_factory.mktemp("peaked")
    with ExitStack() as opened:
        yield cache(lambda name: opened.enter_context(Model(MODELS[name].write(folder / f"{name}.gguf"))))


@pytest.fixture(scope="module")
def get_klds(get_model: GetModel, tokens: NDArray[np.int32]) -> GetKlds:
    return cache(lambda name: klds(get_model(name), ["f16", "q8_0", "q4_0", *MODELS[name].families], tokens))


def klds(model: Model, names: list[str], tokens: NDArray[np.int32]) -> Klds:
    """Of the second half of the tokens."""
    measurement = perplexity.measure(
        model, tokens, parse_pairs(",".join(names)), n_ctx=CTX, n_windows=1, n_threads=1, with_kld=True
    )
    records = perplexity.records(measurement)
    assert not any(record.non_finite for record in records)
    return {name: mean_kld_of(record) for name, record in zip(names, records, strict=True)}


def mean_kld_of(record: KldResult) -> float:
    assert record.kld
    assert record.kld.mean is not None
    return record.kld.mean


# --- the models are what they should be


def attention_peaks(model: Model, tokens: NDArray[np.int32]) -> list[float]:
    """Layer by layer, how much of its attention a token of the second half gives to one token: mean over tokens and
    heads. It is read out of llama.cpp's graph, in which the softmax is a tensor when flash attention is off."""
    lib, ggml = native.llama(), native.llama()._lib
    ggml.ggml_get_name.argtypes, ggml.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    ggml.ggml_nelements.argtypes, ggml.ggml_nelements.restype = [ctypes.c_void_p], ctypes.c_int64
    ggml.ggml_get_data_f32.argtypes = [ctypes.c_void_p]
    ggml.ggml_get_data_f32.restype = ctypes.POINTER(ctypes.c_float)
    n_head, n = lib.llama_model_n_head(model.handle), len(tokens)
    peaks: list[float] = []

    def on_tensor(tensor: int, ask: bool, _user_data: object) -> bool:
        wanted = bool(ggml.ggml_get_name(tensor).startswith(b"kq_soft_max"))
        if wanted and not ask:
            softmax = np.ctypeslib.as_array(ggml.ggml_get_data_f32(tensor), (ggml.ggml_nelements(tensor),))
            peaks.append(float(softmax.reshape(n_head, n, -1)[:, n // 2 :].max(axis=-1).mean()))
        return wanted or not ask

    callback = lib.ggml_backend_sched_eval_callback(on_tensor)
    flash_attention_off = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    with Sequences(model, F16, n, flash_attn_type=flash_attention_off, cb_eval=callback) as context:
        context.decode(tokens[None], 0, n)
    return peaks


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_peaked(name: str, get_model: GetModel, tokens: NDArray[np.int32]) -> None:
    """Measured: .41 to .53. Over 256 tokens flat attention would give .02 or less."""
    peaks = attention_peaks(get_model(name), tokens)
    assert len(peaks) == len(MODELS[name].head_dims)
    assert all(0.35 < peak < 0.7 for peak in peaks), peaks


# --- what the types cost


@pytest.mark.parametrize("name", MODELS)
def test_f16_costs_nothing_and_q8_0_little(name: str, get_klds: GetKlds) -> None:
    """Measured: q4_0 costs 111 to 181 times as much as q8_0. So the models do not amplify small errors."""
    measured = get_klds(name)
    assert measured["f16"] == 0
    assert 0 < 60 * measured["q8_0"] < measured["q4_0"]


@pytest.mark.parametrize(("name", "family"), TAKEN)
def test_kld_follows_the_bits(name: str, family: str, get_klds: GetKlds) -> None:
    measured = get_klds(name)
    low, high = RATIO[BY_NAME[family].index_bits]
    assert low * measured["q4_0"] < measured[family] < high * measured["q4_0"]


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_ratio_stays_where_it_was_measured(family: str, get_klds: GetKlds) -> None:
    measured = [get_klds(name) for name, taken in TAKEN if taken == family]
    ratio = np.exp(np.mean([np.log(kld[family] / kld["q4_0"]) for kld in measured]))
    assert ratio == pytest.approx(MEAN_RATIO[BY_NAME[family].index_bits], rel=0.1)


@pytest.mark.parametrize(("name", "family"), TAKEN)
def test_block_fits_the_heads(name: str, family: str, get_model: GetModel) -> None:
    effective = family if MODELS[name].common_head_dim % 128 == 0 else f"{family}_64"
    assert get_model(name).effective(CachePair(family, "f16")) == CachePair(effective, "f16")


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_others_are_refused_with_the_reason(name: str, family: str, get_model: GetModel) -> None:
    """test_f16_costs_nothing_and_q8_0_little shows that q8_0 works on all of them."""
    reason = f"{family} needs heads of a multiple of {granularity(family)} .* head_dim {MODELS[name].common_head_dim}"
    if MODELS[name].architecture == "deepseek2":
        reason = "latent vector"
    for pair in (CachePair(family, family), CachePair(family, "q8_0"), CachePair("q8_0", family)):
        with pytest.raises(TurbokvError, match=reason):
            Context(get_model(name), pair, CTX, 1)


# --- and what a fault would cost

MOSTLY_PROMPT = TokenPath(n_prompt=CTX - 32, batch=32, n_ubatch=CTX)


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("pair", [CachePair("q8_0", "f16"), CachePair("f16", "q8_0")], ids=["K", "V"])
def test_lost_rotation_costs_more_than_any_type(
    pair: CachePair, name: str, get_model: GetModel, get_klds: GetKlds, tokens: NDArray[np.int32]
) -> None:
    """Measured: 1.45 to 2.02 nats; 1.35 times turbo2 with the K bias, 1.8 times or more elsewhere."""
    reference = MOSTLY_PROMPT.logits(get_model(name), F16, tokens[None])
    lost = MOSTLY_PROMPT.logits(get_model(name), pair, tokens[None], unrotated=True)
    assert mean_kld(lost, reference) > 1.2 * max(get_klds(name).values())


def test_without_rotation_outliers_spoil_their_block(
    get_model: GetModel, get_klds: GetKlds, tokens: NDArray[np.int32]
) -> None:
    """The K bias is what the rotation is there for. Measured: 3.4 times the KLD of q8_0, 1.0 times without a bias."""
    with rotation_off():
        unrotated = {name: klds(get_model(name), ["q8_0"], tokens)["q8_0"] for name in ("K bias", "heads of 64")}
    assert unrotated["K bias"] > 2 * get_klds("K bias")["q8_0"]
    assert unrotated["heads of 64"] == pytest.approx(get_klds("heads of 64")["q8_0"], rel=0.3)
