"""What a set of records says: comparisons on equal terms, the Pareto front, what is missing.

Results are compared only where they measured the same thing: the same model, text, windows and path for divergences,
the same questions for needles, the same machine and token counts for speed. Of several results for one cache on equal
terms (another build, another machine) the last one counts; `Findings.replaced` says how many were left out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, TypeVar

from turbokv import cache_type, record
from turbokv.record import requested
from turbokv.spec import BY_NAME

F16 = str(cache_type.F16)
Family = Literal["upstream", "turbo", "tbq", "mixed"]
FAMILIES: tuple[Family, ...] = ("upstream", "turbo", "tbq", "mixed")
Measured = record.KldResult | record.NeedleResult | record.SpeedResult | record.ServerResult
R = TypeVar("R", bound=Measured)


def short(cache: str) -> str:
    """`turbo3/turbo3` -> `turbo3`."""
    k, _, v = cache.partition("/")
    return k if k == v else cache


def family(cache: str) -> Family:
    """`mixed` has one of upstream's types beside one of ours."""
    names = cache.split("/")
    ours = [name for name in names if name in BY_NAME]
    if not ours:
        return "upstream"
    if len(ours) < len(names):
        return "mixed"
    return "tbq" if all(name.startswith("tbq") for name in ours) else "turbo"


def overlap(one: record.Interval | None, other: record.Interval | None) -> bool:
    """Whether two intervals meet; without both nothing is told apart."""
    return one is None or other is None or (one[0] <= other[1] and other[0] <= one[1])


@dataclass(frozen=True)
class Group:
    """Results on equal terms."""

    model: str
    title: str  # what they have in common, e.g. `ctx 2048, 8 windows of sample.txt`
    cell: str  # that much of the title as other models, machines and runs share: what a gap is counted by


@dataclass(frozen=True)
class Divergences(Group):
    """`turbokv kld` or `ppl`, one result per cache, the largest cache first."""

    ctx: int
    compares: bool  # False: only perplexities were measured
    results: tuple[record.KldResult, ...]

    def bytes_per_token(self, result: record.KldResult) -> float:
        return result.kv_bytes / result.ctx

    def f16_bytes_per_token(self) -> float | None:
        """From f16's own result, or from one with as many bits for K as for V."""
        for r in sorted(self.results, key=lambda r: r.requested != F16):
            if r.bits_k == r.bits_v:
                return r.kv_bytes / r.ctx * 16 / r.bits_k
        return None

    def plotted(self) -> list[record.KldResult]:
        """What has a place in the plot, the smallest first: f16 is the reference, and a log scale has no 0."""
        found = [r for r in self.results if r.requested != F16 and r.kld and r.kld.mean is not None and r.kld.mean > 0]
        return sorted(found, key=lambda r: (r.kv_bytes, mean_kld(r)))

    def front(self) -> list[record.KldResult]:
        """The Pareto front: no other cache is as small and as close to f16. The smallest first."""
        front: list[record.KldResult] = []
        for result in self.plotted():
            if not front or mean_kld(result) < mean_kld(front[-1]):
                front.append(result)
        return front

    def close_to(self, chosen: record.KldResult) -> list[record.KldResult]:
        """Caches off the front, no more than 2 % larger than `chosen`, whose KLD is not told apart from its."""
        front = self.front()
        return [
            result
            for result in self.plotted()
            if result not in front
            and chosen.kv_bytes <= result.kv_bytes <= 1.02 * chosen.kv_bytes
            and overlap(interval(result), interval(chosen))
        ]

    def floor(self) -> record.NoiseFloor | None:
        """The noise floor, where it was measured and is not 0."""
        floors = [r.noise_floor for r in self.results if r.noise_floor]
        return next((floor for floor in floors if floor.mean_kld is not None and floor.mean_kld > 0), None)


def mean_kld(result: record.KldResult) -> float:
    """Of a result that has one."""
    assert result.kld is not None
    assert result.kld.mean is not None
    return result.kld.mean


def interval(result: record.KldResult) -> record.Interval | None:
    return result.kld.ci95 if result.kld else None


@dataclass(frozen=True)
class Needles(Group):
    """`turbokv needle`, one result per cache."""

    results: tuple[record.NeedleResult, ...]

    def lengths(self) -> list[int]:
        return sorted({cell.length for result in self.results for cell in result.cells})

    def depths(self) -> list[float]:
        return sorted({cell.depth for result in self.results for cell in result.cells})


@dataclass(frozen=True)
class Speeds(Group):
    """`turbokv speed` on one machine; results[cache][depth] in tokens."""

    results: dict[str, dict[int, record.SpeedResult]]

    def depths(self) -> list[int]:
        return sorted({depth for by_depth in self.results.values() for depth in by_depth})


@dataclass(frozen=True)
class Servers(Group):
    """`turbokv speed --parallel` on one machine."""

    results: tuple[record.ServerResult, ...]


@dataclass(frozen=True)
class MemoryRow:
    cache: str
    effective: str
    bytes_per_token: float
    times_smaller: float | None  # than f16
    peak_bytes: int | None  # resident memory of llama-bench at the greatest depth


@dataclass(frozen=True)
class Memory(Group):
    """What a cache takes, from the tensors that llama.cpp allocated; the title is the depth of `peak_bytes`."""

    rows: tuple[MemoryRow, ...]


@dataclass(frozen=True)
class Gap:
    """Caches that are not there under conditions under which others are."""

    kind: str
    model: str
    cell: str
    caches: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    """A cache that was refused, or a measurement that was given up."""

    kind: str
    model: str
    cache: str
    where: str
    reason: str


@dataclass(frozen=True)
class Findings:
    records: tuple[record.Record, ...]
    models: tuple[str, ...]
    divergences: tuple[Divergences, ...]
    needles: tuple[Needles, ...]
    speeds: tuple[Speeds, ...]
    servers: tuple[Servers, ...]
    memory: tuple[Memory, ...]
    gaps: tuple[Gap, ...]
    failures: tuple[Failure, ...]
    expected: int  # cells of the grid that `gaps` counts in
    replaced: int

    def headline(self, model: str) -> Divergences | None:
        """The comparison that the summary speaks of: the one with the most caches; of those the longest context."""
        found = [group for group in self.divergences if group.model == model and group.front()]
        return max(found, key=lambda group: (len(group.plotted()), group.ctx), default=None)


def find(records: list[record.Record]) -> Findings:
    """Sorts records, one per id, into comparable groups."""
    labels = _model_labels(records)
    models = tuple(dict.fromkeys(labels.values()))
    rank = _cache_rank(records)

    def grouped(kind: type[R], key: Callable[[record.Record, R], Any], cell: Callable[[R], Hashable]) -> Any:
        """[[results], ...] by model and key, each with one result per cell, the caches in rank."""
        groups: dict[tuple[str, Any], dict[Hashable, R]] = {}
        for item in records:
            if isinstance(item.result, kind):
                group = groups.setdefault((labels[item.model], key(item, item.result)), {})
                group[cell(item.result)] = item.result
        return [
            (group_key, sorted(groups[group_key].values(), key=lambda r: rank[requested(r)]))
            for group_key in sorted(groups, key=lambda k: (models.index(k[0]), k[1]))
        ]

    divergences = [
        Divergences(model, *_kld_titles(results[0]), results[0].ctx, results[0].kind == "kld", tuple(results))
        for (model, _), results in grouped(
            record.KldResult,
            lambda _, r: (
                (r.kind != "kld", r.path != "prefill", r.text.name, r.text.sha256, r.ctx, r.chunks),
                _place(r),
            ),
            requested,
        )
    ]
    needles = [
        Needles(model, *_needle_titles(results[0]), tuple(results))
        for (model, _), results in grouped(
            record.NeedleResult,
            lambda _, r: (
                (r.task, r.template, r.distractors, r.text.sha256),
                tuple(sorted((c.length, c.depth, c.trials) for c in r.cells)),
                _place(r),
            ),
            requested,
        )
    ]  # fmt: skip
    speeds = []
    for (model, _), results in grouped(
        record.SpeedResult,
        lambda item, r: (
            (r.cpu, item.environment.gpu or "", r.threads, r.OMP_WAIT_POLICY, r.n_prompt, r.n_gen),
            _place(r),
        ),
        lambda r: (r.cache, r.depth),
    ):
        by_cache: dict[str, dict[int, record.SpeedResult]] = {}
        for result in results:
            by_cache.setdefault(result.cache, {})[result.depth] = result
        speeds.append(Speeds(model, *_speed_titles(results[0]), by_cache))
    servers = [
        Servers(model, *_server_titles(results[0]), tuple(sorted(results, key=lambda r: r.parallel)))
        for (model, _), results in grouped(
            record.ServerResult,
            lambda item, r: (
                (item.environment.cpu, item.environment.gpu or "", r.threads, r.n_prompt, r.n_gen),
                _place(r),
            ),
            lambda r: (requested(r), r.parallel),
        )
    ]
    failures = _failures(records, labels)
    gaps, expected = _gaps(models, divergences, needles, speeds, servers, failures, rank)
    kept = sum(len(d.results) for d in divergences) + sum(len(n.results) for n in needles)
    kept += sum(len(s.results) for s in servers) + sum(len(found) for s in speeds for found in s.results.values())
    return Findings(
        records=tuple(records),
        models=models,
        divergences=tuple(divergences),
        needles=tuple(needles),
        speeds=tuple(speeds),
        servers=tuple(servers),
        memory=tuple(_memory(model, divergences, speeds) for model in models),
        gaps=tuple(gaps),
        failures=tuple(failures),
        expected=expected,
        replaced=sum(not isinstance(item.result, record.Refusal) for item in records) - kept,
    )


def _model_labels(records: list[record.Record]) -> dict[record.Model, str]:
    """File names; with the fingerprint behind where two files have the same name."""
    prints: dict[str, set[str]] = {}
    for item in records:
        prints.setdefault(item.model.name, set()).add(item.model.fingerprint)
    return {
        item.model: item.model.name + (f" ({item.model.fingerprint})" if len(prints[item.model.name]) > 1 else "")
        for item in records
    }


def _cache_rank(records: list[record.Record]) -> dict[str, tuple[float, int, str]]:
    """Sorts caches: most bits first, upstream's before ours. Those whose bits no record tells come last."""
    bits: dict[str, float] = {}
    for item in records:
        if isinstance(item.result, record.Cache):
            found = item.result.bits_k + item.result.bits_v
            bits[item.result.requested] = min(found, bits.get(item.result.requested, found))
    names = {
        item.result.cache if isinstance(item.result, record.Refusal) else requested(item.result) for item in records
    }
    return {name: (-bits.get(name, 0.0), FAMILIES.index(family(name)), name) for name in names}  # fmt: skip


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def _place(result: record.Placed) -> tuple[bool, str]:
    """What results of one group share: the CPU first, then GPUs by name."""
    return result.placement.on_gpu, result.placement.label


def _kld_titles(result: record.KldResult) -> tuple[str, str]:
    text = f"of {result.text.name}" + ", token by token" * (result.path == "decode") + result.placement.title
    return f"ctx {result.ctx}, {plural(result.chunks, 'window')} {text}", f"ctx {result.ctx} {text}"


def _needle_titles(result: record.NeedleResult) -> tuple[str, str]:
    trials = sum(cell.trials for cell in result.cells)
    title = f"{result.task}, {plural(trials, 'trial')}, {plural(result.distractors, 'distractor')}"
    return title + result.placement.title, result.task + result.placement.title


def _speed_titles(result: record.SpeedResult) -> tuple[str, str]:
    tokens = f"{result.n_prompt:,} prompt and {result.n_gen:,} generated tokens"
    threads = f"{plural(result.threads, 'thread')}, OMP_WAIT_POLICY={result.OMP_WAIT_POLICY}"
    return f"{tokens}, {result.cpu}, {threads}{result.placement.title}", f"{tokens}{result.placement.title}"


def _server_titles(result: record.ServerResult) -> tuple[str, str]:
    tokens = f"{result.n_prompt:,} prompt and {result.n_gen:,} generated tokens"
    title = result.placement.title
    return f"{tokens}, {plural(result.threads, 'thread')}{title}", f"{tokens}{title}"


def _failures(records: list[record.Record], labels: dict[record.Model, str]) -> list[Failure]:
    failures = []
    for item in records:
        result, model = item.result, labels[item.model]
        if isinstance(result, record.Refusal):
            failures.append(Failure(result.task, model, result.cache, "refused", result.reason))
        elif isinstance(result, record.SpeedResult | record.ServerResult) and result.error is not None:
            where = f"depth {result.depth}" if isinstance(result, record.SpeedResult) else f"{result.parallel} parallel"
            failures.append(Failure(result.kind, model, requested(result), where, result.error))
    return list(dict.fromkeys(failures))


def _gaps(
    models: Iterable[str],
    divergences: list[Divergences],
    needles: list[Needles],
    speeds: list[Speeds],
    servers: list[Servers],
    failures: list[Failure],
    rank: dict[str, tuple[float, int, str]],
) -> tuple[list[Gap], int]:
    """The grid is what was measured: every cache of a kind, on every model, under all terms that occur.

    f16 is the reference of every run, so that it is never missing.
    """
    cells: set[tuple[str, str, str, str]] = set()  # kind, model, conditions, cache
    for group in divergences:
        cells |= {(r.kind, group.model, group.cell, r.requested) for r in group.results}
    cells |= {("needle", group.model, group.cell, r.requested) for group in needles for r in group.results}
    cells |= {
        ("speed", group.model, f"{group.cell}, depth {depth}", cache)
        for group in speeds
        for cache, by_depth in group.results.items()
        for depth in by_depth
    }
    cells |= {
        ("server", group.model, f"{group.cell}, {r.parallel} parallel", r.requested)
        for group in servers
        for r in group.results
    }
    refused = {(f.kind, f.model, f.cache) for f in failures if f.where == "refused"}
    refused |= {("server", model, cache) for kind, model, cache in refused if kind == "speed"}
    expected = 0
    gaps = []
    for kind in ("kld", "ppl", "needle", "speed", "server"):
        titles = list(dict.fromkeys(cell[2] for cell in sorted(cells, key=_title_order) if cell[0] == kind))
        caches = sorted({cell[3] for cell in cells if cell[0] == kind} - {F16}, key=rank.__getitem__)
        for model in models if kind != "server" else sorted({cell[1] for cell in cells if cell[0] == kind}):
            for title in titles:
                wanted = [cache for cache in caches if (kind, model, cache) not in refused]
                missing = tuple(cache for cache in wanted if (kind, model, title, cache) not in cells)
                expected += len(wanted)
                if missing:
                    gaps.append(Gap(kind, model, title, missing))
    return gaps, expected


def _title_order(cell: tuple[str, str, str, str]) -> tuple[object, ...]:
    """Numbers within a title by size: ctx 512 before ctx 2048."""
    parts = ["".join(part) for _, part in groupby(cell[2], str.isdigit)]
    return tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts)


def _memory(model: str, divergences: list[Divergences], speeds: list[Speeds]) -> Memory:
    """Bytes per token where a context of known size was allocated; the longest one counts."""
    longest: dict[str, tuple[int, MemoryRow]] = {}
    own = [group for group in speeds if group.model == model]
    depth = max((group.depths()[-1] for group in own), default=0)
    peaks = {
        cache: found[depth].peak_bytes for group in own for cache, found in group.results.items() if depth in found
    }
    for group in divergences:
        f16 = group.f16_bytes_per_token()
        for r in group.results if group.model == model else ():
            if r.requested not in longest or r.ctx > longest[r.requested][0]:
                size = r.kv_bytes / r.ctx
                row = MemoryRow(r.requested, r.cache, size, f16 / size if f16 else None, peaks.get(r.requested))
                longest[r.requested] = (r.ctx, row)
    rows = [row for _, row in longest.values()]
    return Memory(
        model, f"{depth:,} tokens", "", tuple(sorted(rows, key=lambda row: (-row.bytes_per_token, row.cache)))
    )
