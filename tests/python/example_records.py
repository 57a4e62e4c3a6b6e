"""Records such as a sweep writes, for the tests of what reads them. The numbers are plausible, not measured."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from turbokv.record import (
    Build,
    Divergence,
    Environment,
    Estimate,
    KldResult,
    Model,
    NeedleCell,
    NeedleResult,
    NoiseFloor,
    Record,
    Refusal,
    Result,
    ServerResult,
    Speed,
    SpeedResult,
    SpeedSample,
    Text,
    Trial,
)
from turbokv.spec import BY_NAME

UPSTREAM_BITS = {"f16": 16.0, "q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5}
CACHES = (
    "f16", "q8_0", "q5_0", "q4_0", "turbo4", "turbo3", "turbo2", "tbq4", "tbq3", "tbq2",
    "q8_0/turbo4", "q8_0/turbo3", "q8_0/turbo2", "turbo4/turbo3", "turbo4/turbo2",
)  # fmt: skip
FAST = ("f16", "q8_0", "q4_0", "turbo4", "turbo3", "turbo2", "tbq3", "q8_0/turbo3")
MINI, BIAS = "mini-q8_0.gguf", "bias-q8_0.gguf"
LAYERS, KV_HEADS = 8, 2
HEADS = {MINI: 128, BIAS: 64}
UPSTREAM = "9f682fb640765ff79ee13a7a00cdbaa15c1ed07a"
START = datetime(2026, 11, 20, 21, 14, 5, tzinfo=UTC)
ENVIRONMENT = Environment(
    cpu="AMD EPYC 9R14", cores=2, gpu=None, os="Linux 6.1.0 x86_64", python="3.11.2", OMP_WAIT_POLICY="passive"
)
BUILD = Build(
    turbokv="0.1.0",
    commit="13ab5ff2c4b0c1f6b1f0a3f4f5d6c7b8a9e0d1c2",
    dirty=False,
    upstream_commit=UPSTREAM,
    build="5d1c0f9ab34e",
)


def split(cache: str) -> tuple[str, str]:
    k, _, v = cache.partition("/")
    return k, v or k


def bits(name: str) -> float:
    return UPSTREAM_BITS[name] if name in UPSTREAM_BITS else BY_NAME[name].bits_per_value


def effective(name: str, head: int) -> str:
    return f"{name}_64" if name.startswith("turbo") and head == 64 else name


def refused(cache: str, model: str) -> bool:
    return "tbq" in cache and HEADS.get(model) == 64


def kv_bytes(cache: str, tokens: int, model: str) -> int:
    head = HEADS.get(model, 128)
    k, v = (bits(effective(name, head)) for name in split(cache))
    return round(LAYERS * KV_HEADS * head * tokens * (k + v) / 8)


def described(cache: str, tokens: int, model: str) -> dict[str, Any]:
    """The fields of record.Cache."""
    head = HEADS.get(model, 128)
    k, v = (effective(name, head) for name in split(cache))
    return {
        "cache": f"{k}/{v}",
        "requested": "/".join(split(cache)),
        "bits_k": bits(k),
        "bits_v": bits(v),
        "kv_bytes": kv_bytes(cache, tokens, model),
    }


def noise(*parts: object) -> random.Random:
    return random.Random("|".join(map(str, parts)))


def loss(cache: str, model: str) -> float:
    """Mean KLD that a cache has on average; upstream's 4 and 5 bit types are a little worse at their size."""

    def of(name: str) -> float:
        return 0.0 if name == "f16" else 4.0 * 4.0 ** -bits(name) * (1.6 if name in ("q4_0", "q5_0") else 1.0)

    k, v = split(cache)
    return (1.0 if model != BIAS else 1.7) * (of(k) * 0.6 + of(v) * 0.4) + (0.0 if k == v == "f16" else 2e-5)


def divergence(mean: float, rng: random.Random) -> Divergence:
    spread = rng.uniform(0.07, 0.16)
    return Divergence(
        mean=mean,
        ci95=(mean * (1 - spread), mean * (1 + 1.2 * spread)),
        median=mean * 0.66,
        trimmed_mean=mean * 0.86,
        p99=mean * 6,
        p999=mean * 15,
        max=mean * 60,
    )


def kld(
    cache: str, ctx: int, model: str = MINI, *, chunks: int = 8, path: Literal["prefill", "decode"] = "prefill"
) -> KldResult:
    rng = noise("kld", cache, ctx, model, path)
    mean = loss(cache, model) * rng.uniform(0.92, 1.08) * (ctx / 2048) ** 0.08
    ppl_f16 = 15.1 * (ctx / 2048) ** -0.05
    delta = 0.9 * mean + rng.uniform(-0.2, 0.2) * mean
    return KldResult(
        **described(cache, ctx, model),
        kind="kld",
        ppl=ppl_f16 * math.exp(delta),
        ppl_f16=ppl_f16,
        delta_nll=Estimate(mean=delta, ci95=(delta - 0.3 * mean - 1e-5, delta + 0.3 * mean + 1e-5)),
        kld=divergence(mean, rng),
        same_top=1 - min(0.6, 0.62 * mean**0.5),
        last64=divergence(mean * 1.1, rng),
        noise_floor=NoiseFloor(n_ubatch=256, mean_kld=3.1e-5, same_top=0.9991),
        non_finite=0,
        ctx=ctx,
        chunks=chunks,
        path=path,
        text=Text(name="sample.txt", sha256="0a1b2c3d4e5f6071"),
        model=model,
        upstream_commit=UPSTREAM,
        seconds=3 + ctx / 100 + rng.random(),
    )


def perplexity(cache: str, ctx: int, model: str = MINI) -> KldResult:
    return kld(cache, ctx, model).model_copy(
        update={"kind": "ppl", "kld": None, "same_top": None, "last64": None, "noise_floor": None}
    )


def needle(
    cache: str,
    model: str = MINI,
    *,
    lengths: Sequence[int] = (1024, 2048, 4096, 8000),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    seeds: int = 6,
) -> NeedleResult:
    rng = noise("needle", cache, model)
    harm = 12 * loss(cache, model)
    cells, trials, f16_trials = [], [], []
    for length in lengths:
        for depth in depths:
            field, f16 = [], []
            for seed in range(seeds):
                reference = 11 - length / 1000 + noise(model, length, depth, seed).gauss(0, 1.5)
                margin = reference - harm * (1 + length / 4000) * rng.uniform(0.6, 1.4)
                f16.append(reference)
                field.append(
                    Trial(
                        length=length,
                        depth=depth,
                        seed=seed,
                        haystack=lengths.index(length) * seeds + seed,
                        right=margin > 0,
                        margin=margin,
                        right_f16=reference > 0,
                        margin_f16=reference,
                    )
                )
            trials += field
            f16_trials += f16
            cells.append(
                NeedleCell(
                    length=length,
                    depth=depth,
                    trials=seeds,
                    accuracy=sum(trial.right for trial in field) / seeds,
                    margin=sum(trial.margin or 0.0 for trial in field) / seeds,
                    accuracy_f16=sum(margin > 0 for margin in f16) / seeds,
                    margin_delta=sum((t.margin or 0.0) - m for t, m in zip(field, f16, strict=True)) / seeds,
                )
            )
    accuracy = sum(trial.right for trial in trials) / len(trials)
    accuracy_f16 = sum(margin > 0 for margin in f16_trials) / len(trials)
    change = sum(cell.margin_delta or 0.0 for cell in cells) / len(cells)
    margin = sum(trial.margin or 0.0 for trial in trials) / len(trials)
    pairs = list(zip(trials, f16_trials, strict=True))
    return NeedleResult(
        **described(cache, max(lengths) + 192, model),
        task="single",
        accuracy=Estimate(mean=accuracy, ci95=(max(0.0, accuracy - 0.04), min(1.0, accuracy + 0.03))),
        accuracy_f16=accuracy_f16,
        margin=Estimate(mean=margin, ci95=(margin - 0.4, margin + 0.4)),
        margin_delta=Estimate(mean=change, ci95=(change * 1.15 - 0.05, change * 0.85 + 0.05)),
        lost=sum(reference > 0 and not trial.right for trial, reference in pairs),
        gained=sum(reference <= 0 and trial.right for trial, reference in pairs),
        margin_f16=margin - change,
        non_finite=0,
        haystacks=len(lengths) * seeds,
        distractors=4,
        words=1,
        template="plain",
        cells=cells,
        trials=trials,
        text=Text(name="sample.txt", sha256="0a1b2c3d4e5f6071"),
        model=model,
        upstream_commit=UPSTREAM,
        seconds=120.0,
    )


def speed(cache: str, depth: int, model: str = MINI, *, error: str | None = None) -> SpeedResult:
    rng = noise("speed", cache, depth, model)
    k, v = split(cache)
    ours = (k in BY_NAME) + (v in BY_NAME)
    full = {0: 0.55, 1: 2.7, 2: 3.5}[ours] + rng.uniform(-0.2, 0.3)
    if cache == "f16":
        full = 1.0
    share = depth / (depth + 2500)

    def of(base: float, slope: float) -> Speed:
        ratio = math.exp(math.log(full) * share * 1.2)
        rate = base / (1 + depth / slope) * ratio
        wide = rng.uniform(0.03, 0.12)
        return Speed(
            mean=rate,
            ci95=(rate * (1 - wide), rate * (1 + wide)),
            ratio_f16=ratio,
            ratio_ci95=(1.0, 1.0) if cache == "f16" else (ratio * (1 - wide), ratio * (1 + wide)),
        )

    tg, pp = of(210, 2200), of(900, 1900)
    return SpeedResult(
        cache="/".join(split(cache)),
        depth=depth,
        tg=None if error else tg,
        pp=None if error else pp,
        n_gen=64,
        n_prompt=512,
        threads=2,
        rounds=5,
        samples=[] if error else [SpeedSample(round=i, pp=pp.mean, tg=tg.mean) for i in range(1, 6)],
        peak_bytes=None if error else 190_000_000 + 2 * kv_bytes(cache, depth + 512, model),
        kv_bytes=kv_bytes(cache, depth + 512, model),
        error=error,
        model=model,
        cpu=ENVIRONMENT.cpu,
        OMP_WAIT_POLICY=ENVIRONMENT.OMP_WAIT_POLICY,
        upstream_commit=UPSTREAM,
        build=BUILD.build,
        seed=1,
    )


def server(cache: str, parallel: int, model: str = MINI) -> ServerResult:
    rng = noise("server", cache, parallel, model)
    ratio = 1.0 if cache == "f16" else rng.uniform(0.9, 1.9)
    return ServerResult(
        **described(cache, 4096 * parallel, model),
        parallel=parallel,
        n_prompt=2048,
        n_gen=64,
        requests=8 * parallel,
        tokens_per_second=70 * ratio * parallel**0.3,
        prompt_tokens_per_second=400 * ratio,
        ratio_f16=ratio,
        ratio_ci95=(ratio * 0.95, ratio * 1.05),
        latency_p50=2.1 * parallel**0.7 / ratio,
        latency_p95=2.9 * parallel**0.7 / ratio,
        rounds=3,
        peak_bytes=260_000_000,
        error=None,
        threads=2,
        model=model,
        upstream_commit=UPSTREAM,
    )


def refusal(cache: str, task: str, model: str = BIAS) -> Refusal:
    name = next(name for name in split(cache) if name not in UPSTREAM_BITS)
    reason = f"{name} needs heads that are a multiple of 128, {model} has {HEADS.get(model, 64)}: take turbo"
    return Refusal(task=task, cache="/".join(split(cache)), reason=f"{reason}{name[-1]}")


def record(
    result: Result, model: str = MINI, *, n: int = 0, build: Build = BUILD, environment: Environment = ENVIRONMENT
) -> Record:
    """The n-th record of a sweep; its id follows from what was measured."""
    circumstances = f"{model} {build.build} {environment.cpu} {what(result)}"
    k, v = (BY_NAME.get(name) for name in split(getattr(result, "cache", "f16")))
    return Record(
        id=hashlib.sha256(circumstances.encode()).hexdigest()[:16],
        command=f"turbokv {what(result)} -m {model}",
        started=(START + timedelta(minutes=11 * n)).isoformat(timespec="seconds"),
        seconds=getattr(result, "seconds", 40.0),
        model=Model(
            name=model,
            bytes=17_000_000,
            fingerprint=hashlib.sha256(model.encode()).hexdigest()[:16],
            architecture="qwen3" if model == MINI else "llama",
            parameters=16_000_000,
            n_ctx_train=8192,
        ),
        layout_k=k.layout_string if k else "",
        layout_v=v.layout_string if v else "",
        environment=environment,
        build=build,
        result=result,
    )


def what(result: Result) -> str:
    match result:
        case KldResult():
            return f"{result.kind} -c {result.ctx} --chunks {result.chunks} --cache {result.requested}"
        case NeedleResult():
            return f"needle --cache {result.requested}"
        case SpeedResult():
            return f"speed --depth {result.depth} --cache {result.cache}"
        case ServerResult():
            return f"speed --parallel {result.parallel} --cache {result.requested}"
        case Refusal():
            return f"{result.task} --cache {result.cache}"


def sweep(
    models: Iterable[str] = (MINI, BIAS),
    caches: Sequence[str] = CACHES,
    contexts: Sequence[int] = (512, 2048, 8192),
    depths: Sequence[int] = (0, 2048, 8192),
    *,
    with_server: bool = True,
) -> list[Record]:
    """A finished sweep: divergences, needles, speed, llama-server, and what the second model refuses."""
    results: list[tuple[Result, str]] = []
    for model in models:
        taken = [cache for cache in caches if not refused(cache, model)]
        results += [(kld(cache, ctx, model), model) for ctx in contexts for cache in taken]
        results += [(needle(cache, model), model) for cache in taken if cache != "f16"]
        results += [(speed(cache, depth, model), model) for depth in depths for cache in taken if cache in FAST]
        results += [
            (refusal(cache, task, model), model)
            for cache in caches
            if refused(cache, model)
            for task in ("kld", "needle", *(["speed"] * (cache in FAST)))
        ]
    if with_server:
        results += [(server(cache, parallel), MINI) for parallel in (1, 4) for cache in ("f16", "q8_0", "turbo3")]
    return [record(result, model, n=n) for n, (result, model) in enumerate(results)]


def write(path: Path, records: Iterable[Record]) -> Path:
    path.write_text("".join(item.model_dump_json() + "\n" for item in records))
    return path
