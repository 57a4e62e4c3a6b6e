"""`turbokv recommend`: what fits, in which order, and what it says about where its numbers come from."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_records import kld_result, record
from test_cli import check_refused, strict_json, turbokv
from turbokv import data, memory, recommend, store
from turbokv.cache_type import CachePair
from turbokv.doctor import cpu_name
from turbokv.errors import TurbokvError
from turbokv.fingerprint import model_fingerprint, text_fingerprint
from turbokv.record import Candidate, Divergence, Estimate, Recommendation, Record, Speed, SpeedResult, Text
from turbokv.server import Server
from turbokv.spec import BY_NAME

MIB = 2**20


@pytest.mark.parametrize(
    ("text", "count"),
    [("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("800MiB", 800 * MIB), ("1.5 gib", 3 * 2**29), ("100b", 100)],
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert recommend.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "24", "GiB", "24G", "-1GiB", "0MiB", "1e3MiB", "24 GiBs"])
def test_what_is_no_amount_is_named(text: str) -> None:
    with pytest.raises(TurbokvError, match=f"'{text}' is no amount of memory: write 24GiB"):
        recommend.parse_bytes(text)


# --- ranking


def candidate(
    name: str, kv: int = 100, kld: float | None = None, half: float = 0.0, tg: float | None = None
) -> Candidate:
    estimate = None if kld is None else Estimate(mean=kld, ci95=(kld - half, kld + half))
    return Candidate(requested=name, cache=name, refused=None, kv_bytes=kv, fits=True, kld=estimate, tg_ratio_f16=tg)


def order(*candidates: Candidate) -> list[str]:
    return [c.requested for c in recommend.ranked(list(candidates))]


def test_smallest_kld_first_and_what_is_not_measured_last_by_bytes() -> None:
    found = order(
        candidate("small", 10),
        candidate("bad", 20, 0.1, tg=9.0),
        candidate("good", 50, 0.01, tg=1.0),
        candidate("large", 90),
    )
    assert found == ["good", "bad", "large", "small"]


def test_klds_that_cannot_be_told_apart_go_by_speed_then_bytes() -> None:
    a, b = candidate("a", kld=0.010, half=0.002, tg=1.0), candidate("b", kld=0.012, half=0.002, tg=2.0)
    assert order(a, b) == ["b", "a"]
    assert order(a, b.model_copy(update={"kld": Estimate(mean=0.02, ci95=(0.018, 0.022))})) == ["a", "b"]
    assert order(candidate("a", 90, 0.01), candidate("b", 50, 0.01)) == ["b", "a"]


def test_klds_below_rounding_are_equal() -> None:
    assert order(candidate("f16", kld=0.0, tg=1.0), candidate("q8_0", kld=0.00025, tg=1.1)) == ["q8_0", "f16"]
    assert order(candidate("f16", kld=0.0, tg=1.0), candidate("q8_0", kld=0.00035, tg=1.1)) == ["f16", "q8_0"]


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 0.1), st.none() | st.floats(0.1, 9)), max_size=8))
def test_nothing_is_ranked_before_what_is_surely_better(values: list[tuple[float, float, float | None]]) -> None:
    made = [candidate(str(i), kld=kld, half=half, tg=tg) for i, (kld, half, tg) in enumerate(values)]
    found = recommend.ranked(made)
    assert sorted(c.requested for c in found) == sorted(c.requested for c in made)
    if found:
        best = min(made, key=recommend._mean)
        assert recommend._low(found[0]) <= max(recommend._high(best), recommend.ROUNDING)


# --- which records count


FINGERPRINT = model_fingerprint(data.MINI)


def layouts(cache: str) -> dict[str, str]:
    k, v = (BY_NAME[name].layout_string if name in BY_NAME else "" for name in cache.split("/"))
    return {"layout_k": k, "layout_v": v}


def of_mini(**changes: Any) -> Any:
    return record().model.model_copy(update={"fingerprint": FINGERPRINT, **changes})


def kld(cache: str, mean: float, **changes: Any) -> Record:
    divergence = Divergence(
        mean=mean, ci95=(0.9 * mean, 1.1 * mean), median=mean, trimmed_mean=mean, p99=1.0, p999=2.0, max=3.0
    )
    return record(model=of_mini(), result=kld_result(cache, kld=divergence, **changes), **layouts(cache))


def speed(cache: str, ratio: float, depth: int = 2048, cpu: str | None = None) -> Record:
    tg = Speed(mean=50 * ratio, ci95=None, ratio_f16=ratio, ratio_ci95=(0.9 * ratio, 1.1 * ratio))
    result = SpeedResult(
        cache=cache, depth=depth, tg=tg, pp=None, n_gen=32, n_prompt=512, threads=2, rounds=5, samples=[],
        error=None, model="mini-q8_0.gguf", cpu=cpu or cpu_name(), OMP_WAIT_POLICY="", upstream_commit="c" * 40,
        build="b" * 12, seed=0,
    )  # fmt: skip
    return record(model=of_mini(), result=result, **layouts(cache))


def measured(*records: Record, ctx: int = 2048) -> recommend.Measured:
    wanted = {"q8_0/q8_0", "turbo4/turbo4", "turbo3/turbo3"}
    return recommend.measured(records, FINGERPRINT, lambda cache: cache, wanted, ctx)


def means(known: recommend.Measured) -> dict[str, float | None]:
    return {cache: estimate.mean for cache, estimate in known.kld.items()}


def test_other_models_and_layouts_are_not_used_but_counted() -> None:
    other = kld("q8_0/q8_0", 0.5).model_copy(update={"model": of_mini(fingerprint="0" * 16)})
    old = kld("turbo3/turbo3", 0.6).model_copy(update={"layout_v": "turbo3/0 of old"})
    known = measured(other, old, kld("turbo4/turbo4", 0.01))
    assert (means(known), known.others) == ({"turbo4/turbo4": 0.01}, 2)


def test_set_with_the_most_caches_then_the_nearest_context() -> None:
    near, far = {"ctx": 2048}, {"ctx": 512}
    whole = [kld("q8_0/q8_0", 0.001, **far), kld("turbo3/turbo3", 0.02, **far)]
    known = measured(kld("q8_0/q8_0", 0.003, **near), *whole)
    assert means(known) == {"q8_0/q8_0": 0.001, "turbo3/turbo3": 0.02}
    assert known.kld_source and known.kld_source.ctx == 512
    known = measured(*whole, kld("q8_0/q8_0", 0.003, **near), kld("turbo3/turbo3", 0.04, **near))
    assert means(known) == {"q8_0/q8_0": 0.003, "turbo3/turbo3": 0.04}


def test_klds_of_two_texts_are_never_mixed() -> None:
    book = Text(name="book.txt", sha256="1" * 16)
    known = measured(kld("q8_0/q8_0", 0.001), kld("turbo3/turbo3", 0.02), kld("turbo4/turbo4", 0.001, text=book))
    assert means(known) == {"q8_0/q8_0": 0.001, "turbo3/turbo3": 0.02}


def test_last_record_of_a_cache_counts() -> None:
    assert means(measured(kld("q8_0/q8_0", 0.1), kld("q8_0/q8_0", 0.001))) == {"q8_0/q8_0": 0.001}


def test_speed_of_this_machine_goes_before_that_of_another() -> None:
    known = measured(speed("turbo3/turbo3", 9.0, 2048, "other CPU"), speed("turbo3/turbo3", 2.0, 0))
    assert known.speed_source and known.speed_source.here
    assert known.speed["turbo3/turbo3"].ratio_f16 == 2.0
    known = measured(speed("turbo3/turbo3", 9.0, 2048, "other CPU"))
    assert known.speed_source and not known.speed_source.here


# --- the command


def sizes_of_mini(cache: str, ctx: int) -> int:
    with memory.Sizes(data.MINI) as sizes:
        k, v = cache.split("/")
        return sizes.weights + sizes.usage(CachePair(k, v), ctx).total


def test_without_results_the_largest_that_fits_and_how_to_measure(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    run = turbokv("recommend", "--ctx", "8192", "--memory", "60MiB", "--json", path)
    assert run.returncode == 0, run.stderr
    answer = Recommendation.model_validate(strict_json(path))
    fitting = [c for c in answer.candidates if c.fits]
    assert [c.kv_bytes for c in fitting] == sorted((c.kv_bytes for c in fitting), key=lambda n: -(n or 0))
    assert all((c.total_bytes or 0) <= 60 * MIB for c in fitting)
    assert {c.requested for c in answer.candidates if not c.fits} == {"f16/f16", "q8_0/q8_0"}
    assert answer.recommended == "q8_0/turbo4"
    for c in answer.candidates:
        assert c.total_bytes == sizes_of_mini(c.requested, 8192)
        assert c.longest_ctx == 8192 if c.fits else 0 < (c.longest_ctx or 0) < 8192
    assert "KLD: not measured on this model" in run.stdout
    assert "its quality is not measured" in run.stdout
    assert re.search(r"turbokv sweep -m mini --task kld,speed --ctx 8192 --depth 8192 --cache q8_0/turbo4,", run.stdout)
    for c in answer.candidates:
        assert f"{(c.total_bytes or 0) / MIB:.1f}" in run.stdout


def test_with_results_by_kld_and_speed(tmp_path: Path) -> None:
    results = tmp_path / "results"
    for r in (
        kld("q8_0/turbo3", 0.015, ctx=1024), kld("turbo4/turbo4", 0.0075, ctx=1024), kld("q4_0/q4_0", 0.0076, ctx=1024),
        speed("turbo4/turbo4", 3.1, 1024), speed("q4_0/q4_0", 0.6, 1024),
        kld("turbo2/turbo2", 0.0, ctx=1024).model_copy(update={"model": of_mini(fingerprint="0" * 16)}),
    ):  # fmt: skip
        identity = text_fingerprint(f"{r.result.kind} {r.result.cache} {r.model.fingerprint}")
        store.append(results, r.model_copy(update={"id": identity}))
    arguments = ("--ctx", "8192", "--memory", "60MiB", "--cache", "q4_0,turbo4,q8_0/turbo3,turbo2")
    run = turbokv("recommend", *arguments, "--results", results)
    assert run.returncode == 0, run.stderr
    rows = [line.split()[0] for line in run.stdout.splitlines() if re.match(r" *(q4|q8|turbo)\S+/\S+ +\d", line)]
    assert rows == ["turbo4/turbo4", "q4_0/q4_0", "q8_0/turbo3", "turbo2/turbo2"]
    assert "KLD: measured on this model, 4 windows of 1024 tokens of sample.txt" in run.stdout
    assert "At 8192 tokens it was not measured" in run.stdout
    assert "Speed: measured on this machine, at depth 1024" in run.stdout
    assert "Recommended: turbo4/turbo4, the best by measured KLD" in run.stdout
    assert "1 results are of other models" in run.stderr


def test_recommended_command_starts_a_server_that_allocates_what_was_told(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    turbokv(
        "recommend",
        "-m",
        "bias",
        "--ctx",
        "500",
        "--parallel",
        "3",
        "--memory",
        "1GiB",
        "--cache",
        "turbo3",
        "--json",
        path,
    )
    answer = Recommendation.model_validate(strict_json(path))
    (best,) = answer.candidates
    assert (best.cache, best.longest_ctx) == ("turbo3_64/turbo3_64", 8192)
    assert answer.command
    words = shlex.split(answer.command)
    assert words[:5] == ["turbokv", "serve", "-m", "bias", "--"]
    with Server(data.BIAS, words[5:]) as server:
        log = server.log()
    ((k, v),) = re.findall(r"turbokv: cache K turbo3_64 (\d+) bytes, V turbo3_64 (\d+) bytes", log)[-1:]
    assert int(k) + int(v) == best.kv_bytes
    assert "n_slots = 3" in log or "3" in words


def test_f16_is_recommended_as_the_reference_where_it_fits() -> None:
    run = turbokv("recommend", "--memory", "1GiB", "--ctx", "256")
    assert "Recommended: f16/f16, the reference" in run.stdout


def test_refused_caches_are_listed_with_the_reason() -> None:
    run = turbokv("recommend", "-m", "bias", "--memory", "1GiB", "--cache", "tbq3,q8_0")
    assert run.returncode == 0
    assert "tbq3/tbq3 is refused: " in run.stdout
    assert "needs heads of a multiple of 128" in run.stdout
    assert "Recommended: q8_0/q8_0" in run.stdout


def test_too_little_memory_says_what_is_missing(tmp_path: Path) -> None:
    check_refused(
        turbokv("recommend", "--memory", "10MiB"), "weights of mini-q8_0.gguf alone take 16.3 MiB", "6.3 MiB more"
    )
    path = tmp_path / "r.json"
    run = turbokv("recommend", "--memory", "40MiB", "--ctx", "8192", "--json", path)
    assert run.returncode == 1
    assert "nothing fits: turbo2/turbo2, the smallest of all, lacks" in run.stderr
    assert "fits with --ctx 7" in run.stderr
    assert json.loads(path.read_text())["recommended"] is None


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    check_refused(turbokv("recommend", "--memory", "24G"), "'24G'", "24GiB")
    check_refused(turbokv("recommend", "--memory", "1GiB", "-m", tmp_path / "absent.gguf"), "no model at")
    check_refused(turbokv("recommend", "--memory", "1GiB", "--results", tmp_path), "no results at")
    check_refused(turbokv("recommend", "--memory", "1GiB", "--cache", "turbo9"), "'turbo9'")
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    check_refused(turbokv("recommend", "--memory", "1GiB", "-m", text), str(text), "cannot be loaded")
    assert turbokv("recommend").returncode == 2
