"""Scores against brute force, windows by hand, and whole runs against llama-perplexity."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import llama_perplexity
import numpy as np
import pytest
from numpy.typing import NDArray
from turbokv import cache_type, data, engine, perplexity
from turbokv.cache_type import CachePair
from turbokv.errors import TurbokvError
from turbokv.perplexity import CacheRun, Measurement, Scores, score

CTX, WINDOWS = 512, 2
F16 = CachePair("f16", "f16")

# --- score


def random_logits(seed: int, n: int = 150, n_vocab: int = 11) -> NDArray[np.float32]:
    """More rows than perplexity.ROWS, so that the seams are covered."""
    return 3 * np.random.default_rng(seed).standard_normal((n, n_vocab), np.float32)


def targets_of(logits: NDArray[np.float32]) -> NDArray[np.int32]:
    return np.random.default_rng(9).integers(0, logits.shape[1], len(logits), np.int32)


def softmax(row: NDArray[np.float32]) -> NDArray[np.float64]:
    exponential = np.exp(row.astype(np.float64))
    p: NDArray[np.float64] = exponential / exponential.sum()
    return p


def test_scores_are_those_of_brute_force() -> None:
    own, reference = random_logits(1), random_logits(2)
    targets = targets_of(own)
    scores = score(own, reference, targets)
    for i, target in enumerate(targets):
        p, q = softmax(reference[i]), softmax(own[i])
        assert scores.nll[i] == pytest.approx(-np.log(q[target]), rel=1e-12, abs=1e-12)
        assert scores.kld[i] == pytest.approx(np.sum(p * np.log(p / q)), rel=1e-9)
        assert scores.same_top[i] == (p.argmax() == q.argmax())


def test_equal_logits_diverge_by_exactly_zero() -> None:
    own = random_logits(3)
    for reference in (own.copy(), None):
        scores = score(own, reference, targets_of(own))
        assert not scores.kld.any()
        assert scores.same_top.all()


def test_constant_added_to_a_row_changes_nothing() -> None:
    own, reference = ((random_logits(seed) * 8).round() / np.float32(8) for seed in (1, 2))  # + 4096 is exact
    plain, shifted = (score(own + c, reference - c, targets_of(own)) for c in (np.float32(0), np.float32(4096)))
    np.testing.assert_allclose(shifted.nll, plain.nll, rtol=1e-9)
    np.testing.assert_allclose(shifted.kld, plain.kld, rtol=1e-9)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("where", ["own", "reference", "both", "own, no reference"])
def test_row_with_a_non_finite_logit_is_not_finite_and_touches_no_other(poison: float, where: str) -> None:
    own, reference = random_logits(1), random_logits(2)
    targets = targets_of(own)
    with_reference = where != "own, no reference"
    clean = score(own, reference if with_reference else None, targets)
    row, column = 70, (targets[70] + 1) % own.shape[1]
    for name, logits in (("own", own), ("reference", reference)):
        if name in where or where == "both":
            logits[row, column] = poison
    scores = score(own, reference if with_reference else None, targets)
    assert np.flatnonzero(~scores.finite).tolist() == [row]
    others = np.arange(len(own)) != row
    np.testing.assert_array_equal(scores.nll[others], clean.nll[others])
    np.testing.assert_array_equal(scores.kld[others], clean.kld[others])


# --- records


def as_json(measurement: Measurement) -> list[dict[str, Any]]:
    return [record.model_dump(mode="json") for record in perplexity.records(measurement)]


def record_of(window: Scores, reference_nll: NDArray[np.float64]) -> dict[str, Any]:
    run = CacheRun(F16, F16, windows=[window])
    return as_json(Measurement("model", 16, True, [run], [reference_nll]))[0]


def test_non_finite_tokens_are_counted_and_in_no_other_number() -> None:
    random = np.random.default_rng(4)
    nll, kld = random.random(500), random.random(500)
    same_top = random.random(500) < 0.7
    clean = record_of(Scores(nll[3:], kld[3:], same_top[3:]), nll[3:])
    nll[0], kld[1], nll[2] = np.nan, np.nan, np.inf
    record = record_of(Scores(nll, kld, same_top), nll)
    assert clean.pop("non_finite") == 0
    assert record.pop("non_finite") == 3
    for counted in (record, clean):
        for estimate in ("kld", "delta_nll"):
            counted[estimate].pop("ci95")  # its stretches start three tokens later
    assert record == clean


def test_all_tokens_non_finite_gives_null_and_no_crash() -> None:
    bad = np.full(20, np.nan)
    record = record_of(Scores(bad, bad, np.zeros(20, bool)), np.ones(20))
    assert record["non_finite"] == 20
    assert {record["ppl"], record["same_top"], record["delta_nll"]["mean"], *record["kld"].values()} == {None}


def test_every_estimate_is_taken_from_its_tokens() -> None:
    """Three windows of 100 tokens; in the second the last token is not finite, and so only 63 of its last 64 count."""
    random = np.random.default_rng(4)
    reference = list(random.random((3, 100)))
    scores = [
        Scores(nll + random.normal(0, 0.1, 100), random.random(100) ** 4, np.ones(100, bool)) for nll in reference
    ]
    scores[1].nll[-1] = np.nan
    run = CacheRun(F16, F16, windows=scores)
    record = as_json(Measurement("model", 200, True, [run], reference, noise=scores))[0]
    finite = [window.finite for window in scores]
    kld = np.concatenate([window.kld[mask] for window, mask in zip(scores, finite, strict=True)])
    delta = np.concatenate([(w.nll - r)[mask] for w, r, mask in zip(scores, reference, finite, strict=True)])
    last = np.concatenate([window.kld[36:][mask[36:]] for window, mask in zip(scores, finite, strict=True)])
    assert (len(kld), len(last)) == (299, 191)
    assert record["delta_nll"]["mean"] == pytest.approx(delta.mean(), rel=1e-12)
    assert record["delta_nll"]["ci95"][0] < delta.mean() < record["delta_nll"]["ci95"][1]
    for name, values in (("kld", kld), ("last64", last)):
        found = record[name]
        cut = len(values) // 100
        assert found["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert found["trimmed_mean"] == pytest.approx(np.sort(values)[cut : len(values) - cut].mean(), rel=1e-12)
        assert [found[key] for key in ("median", "p99", "p999")] == list(np.percentile(values, (50, 99, 99.9)))
        assert found["max"] == values.max()
        assert found["ci95"][0] < found["mean"] < found["ci95"][1]
    assert record["noise_floor"] == {"n_ubatch": 32, "mean_kld": kld.mean(), "same_top": 1}


def test_few_tokens_have_a_mean_without_an_interval() -> None:
    few = Scores(np.ones(8), np.ones(8), np.ones(8, bool))
    record = record_of(few, np.ones(8))
    assert record["kld"]["mean"] == 1
    assert record["kld"]["ci95"] is record["delta_nll"]["ci95"] is None


# --- windows


def with_bos(bos: int | None) -> engine.Model:
    return cast(engine.Model, SimpleNamespace(bos=bos))


@pytest.mark.parametrize(("wanted", "n"), [(1, 1), (3, 3), (9, 3), (-1, 3)])
def test_windows_follow_each_other_and_start_with_bos(wanted: int, n: int) -> None:
    tokens = np.arange(100, 170, dtype=np.int32)  # three windows of 20 and a rest
    expected = tokens[: 20 * n].reshape(n, 20).copy()
    np.testing.assert_array_equal(perplexity.windows(with_bos(None), tokens, 20, wanted), expected)
    expected[:, 0] = 7
    np.testing.assert_array_equal(perplexity.windows(with_bos(7), tokens, 20, wanted), expected)
    assert tokens[0] == 100


def test_text_of_exactly_one_context_is_enough() -> None:
    assert perplexity.windows(with_bos(None), np.zeros(32, np.int32), 32, 4).shape == (1, 32)


def test_text_below_one_context_is_refused_with_both_lengths() -> None:
    with pytest.raises(TurbokvError, match="31 tokens, less than one context of 32"):
        perplexity.windows(with_bos(None), np.zeros(31, np.int32), 32, 4)


@pytest.mark.parametrize("n_ctx", [-1, 0, 15])
def test_context_too_short_to_score_is_refused(n_ctx: int) -> None:
    with pytest.raises(TurbokvError, match=f"context of {n_ctx} tokens"):
        perplexity.windows(with_bos(None), np.zeros(100, np.int32), n_ctx, 1)


# --- whole runs on both built-in models


def measured(model_path: Path, caches: str, **changes: Any) -> Measurement:
    with engine.Model(model_path) as model:
        tokens = model.tokenize(data.read_text(None))
        arguments = {"n_ctx": CTX, "n_windows": WINDOWS, "n_threads": engine.default_threads(), "with_kld": True}
        return perplexity.measure(model, tokens, cache_type.parse_pairs(caches), **(arguments | changes))


@pytest.fixture(scope="module", params=[data.MINI, data.BIAS], ids=["mini", "bias"])
def model_path(request: pytest.FixtureRequest) -> Path:
    return cast(Path, request.param)


@pytest.fixture(scope="module")
def ours(model_path: Path) -> list[dict[str, Any]]:
    return as_json(measured(model_path, "f16,q4_0"))


def test_f16_diverges_from_f16_by_exactly_zero(ours: list[dict[str, Any]]) -> None:
    f16 = ours[0]
    assert f16["kld"]["mean"] == f16["kld"]["max"] == 0.0
    assert f16["same_top"] == 1.0
    assert f16["ppl"] == f16["ppl_f16"]


def test_llama_perplexity_gives_the_same_numbers(model_path: Path, ours: list[dict[str, Any]], tmp_path: Path) -> None:
    f16, q4_0 = ours
    base = tmp_path / "base.kld"
    plain = llama_perplexity.perplexity(model_path, data.SAMPLE, CTX, WINDOWS, "--save-all-logits", base)
    assert f16["ppl"] == pytest.approx(plain, rel=5e-4)
    ppl, kld, compared = llama_perplexity.divergence(
        model_path, data.SAMPLE, CTX, WINDOWS, base, "-ctk", "q4_0", "-ctv", "q4_0"
    )
    assert q4_0["ppl"] == pytest.approx(ppl, rel=5e-4)
    assert q4_0["kld"]["mean"] == pytest.approx(kld, rel=0.01)
    assert q4_0["kld"]["median"] == pytest.approx(llama_perplexity.number(r"Median\s+KLD:", compared), rel=0.01)
    # its base has 16-bit log probabilities, in which a few near ties fall together
    assert 100 * q4_0["same_top"] == pytest.approx(llama_perplexity.number("Same top p:", compared), abs=1)


def test_several_batches_give_nearly_the_same_perplexity(
    model_path: Path, ours: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 does not divide the window: a short last batch, and one that crosses the first scored position.
    Other matrix shapes round differently, which moved the PPL by 1.3e-4 at most."""
    monkeypatch.setattr(engine, "MAX_BATCH", 100)
    f16, q4_0 = as_json(measured(model_path, "f16,q4_0"))
    assert f16["kld"]["max"] == 0.0
    assert f16["ppl"] == pytest.approx(ours[0]["ppl"], rel=5e-4)
    assert q4_0["ppl"] == pytest.approx(ours[1]["ppl"], rel=5e-4)
    assert q4_0["kld"]["mean"] == pytest.approx(ours[1]["kld"]["mean"], rel=0.02)


# --- interruption

SHORT: dict[str, Any] = {"n_ctx": 64, "n_windows": 3}


def interrupt_after(passes: int) -> Any:
    done = iter(range(1, 100))

    def advance(_: str) -> None:
        if next(done) == passes:
            raise KeyboardInterrupt

    return advance


@pytest.fixture(scope="module")
def whole() -> Measurement:
    return measured(data.MINI, "f16,q8_0", **SHORT)


@pytest.mark.parametrize(("passes", "finished"), [(3, 1), (4, 1), (6, 2), (9, 3)])
def test_interrupted_run_has_the_windows_that_all_caches_finished(
    whole: Measurement, passes: int, finished: int
) -> None:
    """Three passes a window: the reference, f16, q8_0."""
    cut = measured(data.MINI, "f16,q8_0", **SHORT, advance=interrupt_after(passes))
    assert cut.n_windows == finished
    for record, run in zip(as_json(cut), whole.runs, strict=True):
        nll = np.concatenate([window.nll for window in run.windows[:finished]])
        assert record["ppl"] == np.exp(nll.mean())
        assert record["chunks"] == finished


@pytest.mark.parametrize("passes", [1, 2])
def test_interruption_before_the_first_window_ends_the_run(passes: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        measured(data.MINI, "f16,q8_0", **SHORT, advance=interrupt_after(passes))
