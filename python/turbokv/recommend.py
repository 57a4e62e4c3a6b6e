"""Which cache to use: what fits into memory, ranked by what has been measured on this very model.

Bytes are llama.cpp's own, see memory.py. KLD and speed come from records of a sweep. Only those of the same file
count, known by its fingerprint: another model's KLD may be a hundred times smaller or larger at the same cache. KLDs
are compared within one text and window size only, and speeds within one machine, number of threads and depth: of all
such sets of records that one is taken which has the most of the caches, then the one nearest to the context that is
asked for.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from turbokv import data, device, native
from turbokv.cache_type import F16, CachePair, parse_pairs
from turbokv.doctor import cpu_name
from turbokv.engine import interrupts
from turbokv.errors import TurbokvError
from turbokv.fingerprint import model_fingerprint
from turbokv.memory import STEP, Sizes
from turbokv.spec import BY_NAME

if TYPE_CHECKING:
    from turbokv import record  # slow to import

CACHES = "f16,q8_0,q8_0/turbo4,q8_0/turbo3,q4_0,turbo4,turbo4/turbo3,turbo3,turbo2"
ROUNDING = 0.0003  # nats; a mean KLD below it is rounding, see `turbokv kld --help`
UNITS = {"b": 1} | {
    prefix + suffix: base**power
    for suffix, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate("kmgt", 1)
}


def parse_bytes(text: str) -> int:
    """Parses 24GiB, 24GB, 800MiB, 1.5 GiB; GB are 1000^3 bytes, GiB 1024^3. Raises TurbokvError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if not found or found[2] not in UNITS or not float(found[1]):
        raise TurbokvError(f"'{text}' is no amount of memory: write 24GiB, 24GB or 800MiB")
    return int(float(found[1]) * UNITS[found[2]])


def show_bytes(count: float) -> str:
    """In MiB, or in GiB from 10 GiB on."""
    return f"{count / 2**30:.2f} GiB" if count >= 10 * 2**30 else f"{count / 2**20:.1f} MiB"


Source = TypeVar("Source", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True)
class Measured:
    """What is known of the caches of one model, by effective pair."""

    kld: dict[str, record.Estimate]
    kld_source: record.KldSource | None
    speed: dict[str, record.Speed]
    speed_source: record.SpeedSource | None
    others: int  # records of other models, or of other byte layouts: not used


def measured(
    records: Iterable[record.Record],
    fingerprint: str,
    effective: Callable[[str], str],
    wanted: set[str],
    ctx: int,
) -> Measured:
    """What `records` tell of a model. `effective` maps a cache as asked for to its effective types, `wanted` are the
    effective pairs to choose among, ctx the context to be near to."""
    from turbokv.record import Estimate, KldResult, KldSource, SpeedResult, SpeedSource

    records = [r for r in records if isinstance(r.result, KldResult | SpeedResult)]
    own = [r for r in records if r.model.fingerprint == fingerprint and _same_layout(r)]
    klds: dict[KldSource, dict[str, record.Estimate]] = {}
    speeds: dict[SpeedSource, dict[str, record.Speed]] = {}
    for r in own:
        result = r.result
        if isinstance(result, KldResult) and result.kld and result.kld.mean is not None:
            place = result.placement.label
            kld_source = KldSource(
                ctx=result.ctx, chunks=result.chunks, path=result.path, text=result.text, placement=place
            )
            estimate = Estimate(mean=result.kld.mean, ci95=result.kld.ci95)
            klds.setdefault(kld_source, {})[result.cache] = estimate
        elif isinstance(result, SpeedResult) and result.tg and result.tg.ratio_f16 is not None:
            place = result.placement.label
            here = result.cpu == cpu_name() and place == device.placement().label
            speed_source = SpeedSource(
                depth=result.depth, threads=result.threads, cpu=result.cpu, here=here, placement=place
            )
            speeds.setdefault(speed_source, {})[effective(result.cache)] = result.tg

    def by_kld(source: KldSource) -> tuple[float, ...]:
        return -_distance(source.ctx, ctx), source.path == "prefill", source.chunks

    def by_speed(source: SpeedSource) -> tuple[float, ...]:
        return source.here, -_distance(source.depth, ctx), source.threads

    kld_sources, speed_sources = _best_first(klds, wanted, by_kld), _best_first(speeds, wanted, by_speed)
    return Measured(
        kld=klds[kld_sources[0]] if kld_sources else {},
        kld_source=kld_sources[0] if kld_sources else None,
        speed=speeds[speed_sources[0]] if speed_sources else {},
        speed_source=speed_sources[0] if speed_sources else None,
        others=len(records) - len(own),
    )


def _same_layout(r: record.Record) -> bool:
    """Whether the bytes of its cache still mean the same. Upstream's types have no layout here."""
    recorded = zip(r.result.cache.split("/"), (r.layout_k, r.layout_v), strict=True)
    return all(name not in BY_NAME or BY_NAME[name].layout_string == layout for name, layout in recorded)


def _distance(a: int, b: int) -> float:
    """Between two contexts, in powers of two."""
    return abs(math.log2(a + 1) - math.log2(b + 1))


def _best_first(
    found: dict[Source, dict[str, Value]], wanted: set[str], key: Callable[[Source], tuple[float, ...]]
) -> list[Source]:
    """The sets with the most of what is wanted, then those with the largest key, then the last."""
    return sorted(reversed(found), key=lambda source: (len(found[source].keys() & wanted), *key(source)), reverse=True)


# --- ranking


def ranked(fitting: list[record.Candidate]) -> list[record.Candidate]:
    """Candidates that fit, best first.

    By mean KLD: the smallest comes first, together with all that cannot be told from it, because their 95 % interval
    reaches below the upper end of its own, or because their KLD is rounding; these are ordered by generation speed,
    where it is measured, then by bytes. Then the smallest of the rest, and so on. Caches without a measured KLD come
    last, the largest first: more bits are all that is known of them.
    """
    known = sorted((c for c in fitting if c.kld), key=lambda c: _mean(c))
    out: list[record.Candidate] = []
    while known:
        limit = max(_high(known[0]), ROUNDING)
        group = [c for c in known if _low(c) <= limit]
        out += sorted(group, key=lambda c: (-(c.tg_ratio_f16 or 0.0), c.kv_bytes or 0))
        known = [c for c in known if c not in group]
    return out + sorted((c for c in fitting if not c.kld), key=lambda c: -(c.kv_bytes or 0))


def _mean(c: record.Candidate) -> float:
    return (c.kld and c.kld.mean) or 0.0


def _low(c: record.Candidate) -> float:
    return c.kld.ci95[0] if c.kld and c.kld.ci95 else _mean(c)


def _high(c: record.Candidate) -> float:
    return c.kld.ci95[1] if c.kld and c.kld.ci95 else _mean(c)


# --- the whole answer


def recommend(
    model: Path,
    memory: int,
    ctx: int | None,
    parallel: int,
    caches: str,
    records: list[record.Record],
) -> tuple[record.Recommendation, Measured]:
    """What fits into `memory` bytes with `parallel` requests of ctx tokens each (None: as many as the model was trained
    on), ranked. Raises TurbokvError where nothing can be said, such as weights that do not fit."""
    from turbokv import record

    pairs = list(dict.fromkeys(parse_pairs(caches)))
    fingerprint = model_fingerprint(model)
    with interrupts.deferred(), Sizes(model) as sizes:
        if sizes.weights >= memory:
            raise TurbokvError(
                f"the weights of {model.name} alone take {show_bytes(sizes.weights)}, "
                f"{show_bytes(sizes.weights - memory)} more than --memory: take a smaller quantization of the model, "
                "or more memory"
            )
        ctx = ctx or sizes.model.n_ctx_train or STEP

        def effective(cache: str) -> str:
            (pair,) = parse_pairs(cache)
            try:
                return str(sizes.model.effective(pair))
            except TurbokvError:
                return cache  # refused: such a record is of no use, and does no harm

        known = measured(records, fingerprint, effective, {effective(str(pair)) for pair in pairs}, ctx)
        candidates = []
        for pair in pairs:
            interrupts.check()
            candidates.append(_candidate(sizes, pair, memory, ctx, parallel, known))
        fitting = ranked([c for c in candidates if c.fits])
        others = sorted((c for c in candidates if not c.fits), key=lambda c: (c.refused is not None, c.kv_bytes or 0))
        best = fitting[0].requested if fitting else None
        return record.Recommendation(
            model=model.name,
            fingerprint=fingerprint,
            architecture=sizes.architecture,
            parameters=sizes.parameters,
            n_ctx_train=sizes.model.n_ctx_train,
            memory=memory,
            ctx=ctx,
            parallel=parallel,
            weights_bytes=sizes.weights,
            kld_source=known.kld_source,
            speed_source=known.speed_source,
            candidates=fitting + others,
            recommended=best,
            command=command(model, best, ctx, parallel) if best else None,
            upstream_commit=native.build_info()["upstream_commit"],
        ), known


def _candidate(
    sizes: Sizes, pair: CachePair, memory: int, ctx: int, parallel: int, known: Measured
) -> record.Candidate:
    from turbokv import record

    try:
        effective = str(sizes.model.effective(pair))
        usage = sizes.usage(pair, ctx * parallel, parallel)
    except TurbokvError as error:
        return record.Candidate(requested=str(pair), cache=None, refused=str(error))
    longest = sizes.longest(pair, memory, max(ctx, sizes.model.n_ctx_train), parallel)
    total = sizes.weights + usage.total
    is_f16 = effective == str(F16)  # the reference: 0 and 1 by definition
    kld = record.Estimate(mean=0.0, ci95=None) if is_f16 else known.kld.get(effective)
    speed = known.speed.get(effective)
    return record.Candidate(
        requested=str(pair),
        cache=effective,
        refused=None,
        kv_bytes=usage.kv,
        compute_bytes=usage.compute,
        total_bytes=total,
        fits=total <= memory,
        longest_ctx=longest,
        kld=kld,
        tg_ratio_f16=1.0 if is_f16 else speed.ratio_f16 if speed else None,
        tg_ratio_ci95=speed.ratio_ci95 if speed and not is_f16 else None,
    )


def as_given(model: Path) -> str:
    """A model as it is written on the command line."""
    name = next((name for name, path in data.BUILT_IN.items() if path == model), str(model))
    return shlex.quote(name)


def command(model: Path, cache: str, ctx: int, parallel: int) -> str:
    """The server with that cache; behind `--` stand llama-server's own options."""
    k, v = cache.split("/")
    options = f"--cache-type-k {k} --cache-type-v {v} --ctx-size {ctx * parallel} --parallel {parallel} --cache-ram 0"
    return f"turbokv serve -m {as_given(model)} -- {options}"
