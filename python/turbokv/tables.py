"""The report's tables, once for HTML and Markdown, and the compact ones that README shows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from turbokv import record
from turbokv.findings import (
    F16,
    Divergences,
    Findings,
    Memory,
    Needles,
    Servers,
    Speeds,
    short,
)

NONE = "\N{EN DASH}"
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Cell:
    """What stands in a table: a text, a smaller second line, and what to sort by (missing values sort last)."""

    text: str
    below: str = ""
    value: float | str | None = None

    def markdown(self) -> str:
        text = f"{self.text} ({self.below})" if self.below else self.text
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


@dataclass(frozen=True)
class Column:
    title: str
    about: str = ""  # one sentence, shown where the page has room


@dataclass(frozen=True)
class Table:
    """The first column names the cache, all others hold numbers."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def markdown(self) -> str:
        """A GitHub table; column 1 to the left, numbers to the right."""
        titles = " | ".join(Cell(column.title).markdown() for column in self.columns)
        lines = [f"| {titles} |", "|---|" + "---:|" * (len(self.columns) - 1)]
        lines += ["| " + " | ".join(cell.markdown() for cell in row) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


# --- numbers


def decimals(values: Iterable[float | None], least: int = 0, most: int = 6) -> int:
    """Digits behind the point that show two significant ones of the smallest value other than 0."""
    sizes = [abs(value) for value in values if value]
    if not sizes:
        return least
    return max(least, min(most, 1 - math.floor(math.log10(min(sizes)))))


def number(value: float | None, digits: int, *, sign: bool = False) -> str:
    if value is None:
        return NONE
    value = round(value, digits) or 0.0  # no -0.00
    text = f"{value:{'+' if sign and value else ''},.{digits}f}"
    return text.replace("-", MINUS)


def ends(ci: record.Interval | None, digits: int, *, sign: bool = False) -> str:
    return f"{number(ci[0], digits, sign=sign)}..{number(ci[1], digits, sign=sign)}" if ci and any(ci) else ""


def significant(value: float) -> str:
    """Two significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def value_cell(value: float | None, digits: int, ci: record.Interval | None = None, *, sign: bool = False) -> Cell:
    return Cell(number(value, digits, sign=sign), ends(ci, digits, sign=sign) if value is not None else "", value)


def percent(value: float | None, digits: int = 2) -> Cell:
    return Cell(NONE) if value is None else Cell(f"{100 * value:.{digits}f} %", value=value)


def cache_cell(requested: str, effective: str | None = None) -> Cell:
    """The name as asked for; below it what the context really took, where that differs."""
    below = short(effective) if effective and effective != requested else ""
    return Cell(short(requested), below, short(requested))


def mebibytes(size: float | None) -> Cell:
    return Cell(NONE) if size is None else Cell(f"{size / 2**20:,.1f}", value=size)


def estimate(cell: record.Estimate, digits: int, *, sign: bool = False) -> Cell:
    return value_cell(cell.mean, digits, cell.ci95, sign=sign)


# --- one table per group


def divergences(group: Divergences) -> Table:
    results = group.results
    bad = any(r.non_finite for r in results)
    columns = [
        Column("cache K/V"),
        Column("bits K/V", "bits per cached value, scales included"),
        Column("bytes/token", "of the K and V tensors that llama.cpp allocated, by the length of the context"),
    ]
    if group.compares:
        columns += [
            Column("mean KLD", "divergence of the predictions from those with an f16 cache, nats; 95 % interval below"),
            Column("median"),
            Column("trimmed", "mean without the largest and the smallest 1 % of the tokens"),
            Column("99.9 %", "one token in a thousand is worse"),
            Column("same top", "share of tokens whose most likely next token is that of f16"),
        ]
    columns += [
        Column("delta NLL", "mean of NLL - NLL of f16 over the same tokens; 95 % interval below"),
        Column("PPL", "perplexity"),
    ]
    columns += [Column("last 64", "mean KLD over the last 64 positions of every window")] * group.compares
    columns += [Column("bad", "tokens with a NaN or infinite logit, left out of all other numbers")] * bad
    spans = [r.kld for r in results if r.kld]
    mean, median, trimmed = (
        decimals(values, 3)
        for values in ([k.mean for k in spans], [k.median for k in spans], [k.trimmed_mean for k in spans])
    )
    last = decimals([r.last64.mean for r in results if r.last64], 3)
    tail = decimals([k.p999 for k in spans], 2, 4)
    nll = decimals([r.delta_nll.mean for r in results], 3, 5)
    rows = []
    for r in results:
        row = [
            cache_cell(r.requested, r.cache),
            Cell(f"{r.bits_k:g}/{r.bits_v:g}", value=r.bits_k + r.bits_v),
            value_cell(group.bytes_per_token(r), 0),
        ]
        if group.compares:
            k = r.kld
            row += [
                value_cell(k.mean if k else None, mean, k.ci95 if k else None),
                value_cell(k.median if k else None, median),
                value_cell(k.trimmed_mean if k else None, trimmed),
                value_cell(k.p999 if k else None, tail),
                percent(r.same_top),
            ]
        row += [estimate(r.delta_nll, nll, sign=True), value_cell(r.ppl, 3)]
        row += [value_cell(r.last64.mean if r.last64 else None, last)] * group.compares
        rows.append((*row, *[Cell(str(r.non_finite), value=r.non_finite)] * bad))
    return Table(tuple(columns), tuple(rows))


def needles(group: Needles) -> Table:
    columns = (
        Column("cache K/V"),
        Column("right", "share of trials answered right, over all lengths and depths; 95 % interval below"),
        Column("f16 right"),
        Column("lost", "trials that f16 answers right and this cache does not"),
        Column("gained", "the other way round"),
        Column("margin", "log-probability of the right answer minus that of the best wrong one, nats"),
        Column("delta margin", "margin - margin of f16 in the same trial; below 0 is worse than f16"),
    )
    rows = []
    for r in group.results:
        ci = r.accuracy.ci95
        right = percent(r.accuracy.mean, 1)
        below = f"{100 * ci[0]:.1f}..{100 * ci[1]:.1f}" if ci else ""
        rows.append(
            (
                cache_cell(r.requested, r.cache),
                Cell(right.text, below, right.value),
                percent(r.accuracy_f16, 1),
                Cell(str(r.lost), value=r.lost),
                Cell(str(r.gained), value=r.gained),
                estimate(r.margin, 2, sign=True),
                estimate(r.margin_delta, 2, sign=True),
            )
        )
    return Table(columns, tuple(rows))


def speeds(group: Speeds) -> Table:
    """Tokens/s, below it the multiple of f16's and its interval, per test and depth."""
    cells = [result for by_depth in group.results.values() for result in by_depth.values()]
    tests = [test for test in ("tg", "pp") if any(getattr(result, test) for result in cells)]
    columns = [Column("cache K/V")]
    columns += [Column(f"{test} {depth:,}", SPEED_ABOUT[test]) for test in tests for depth in group.depths()]
    energy = any(result.joules_per_token is not None for result in cells)
    columns += [Column(f"J/token {depth:,}", "energy of generation") for depth in group.depths() if energy]
    rows = []
    for cache, by_depth in group.results.items():
        row = [cache_cell(cache)]
        for test in tests:
            for depth in group.depths():
                speed = getattr(by_depth[depth], test) if depth in by_depth else None
                row.append(_speed_cell(speed))
        if energy:
            row += [value_cell(by_depth[d].joules_per_token if d in by_depth else None, 3) for d in group.depths()]
        rows.append(tuple(row))
    return Table(tuple(columns), tuple(rows))


SPEED_ABOUT = {
    "tg": "generated tokens/s behind that many tokens; below it the multiple of f16's with its 95 % interval",
    "pp": "prompt tokens/s behind that many tokens; below it the multiple of f16's with its 95 % interval",
}


def times(ratio: float | None, ci: record.Interval | None) -> str:
    """`3.70 x (3.10..4.30)`; empty without a ratio."""
    if ratio is None:
        return ""
    return f"{ratio:.2f} {TIMES}" + (f" ({ends(ci, 2)})" if ci and ci != (ratio, ratio) else "")


def _speed_cell(speed: record.Speed | None) -> Cell:
    if speed is None:
        return Cell(NONE)
    return Cell(number(speed.mean, 1 if speed.mean < 100 else 0), times(speed.ratio_f16, speed.ratio_ci95), speed.mean)


def memory(group: Memory) -> Table:
    peak = any(row.peak_bytes is not None for row in group.rows)
    columns = [
        Column("cache K/V"),
        Column("bytes/token"),
        Column("times smaller", "than an f16 cache"),
        Column("tokens in 1 GiB", "of cache"),
    ]
    columns += [Column("peak MiB", f"resident memory of llama-bench, model included, at depth {group.title}")] * peak
    rows = [
        (
            cache_cell(row.cache, row.effective),
            value_cell(row.bytes_per_token, 0),
            value_cell(row.times_smaller, 2),
            value_cell(2**30 / row.bytes_per_token, 0),
            *[mebibytes(row.peak_bytes)] * peak,
        )
        for row in group.rows
    ]
    return Table(tuple(columns), tuple(rows))


def servers(group: Servers) -> Table:
    columns = (
        Column("cache K/V"),
        Column("parallel", "requests at a time"),
        Column("tokens/s", "generated, all requests together; below it the multiple of f16's"),
        Column("prompt tokens/s"),
        Column("p50 s", "half of the requests take longer"),
        Column("p95 s", "one request in twenty takes longer"),
        Column("peak MiB"),
    )
    rows = []
    for r in group.results:
        ok = r.error is None
        rows.append(
            (
                cache_cell(r.requested, r.cache),
                Cell(str(r.parallel), value=r.parallel),
                Cell(number(r.tokens_per_second, 1), times(r.ratio_f16, r.ratio_ci95), r.tokens_per_second)
                if ok
                else Cell("failed"),
                value_cell(r.prompt_tokens_per_second if ok else None, 1),
                value_cell(r.latency_p50 if ok else None, 2),
                value_cell(r.latency_p95 if ok else None, 2),
                mebibytes(r.peak_bytes),
            )
        )
    return Table(columns, tuple(rows))


# --- compact tables: rows caches, columns what was varied


def compact(found: Findings) -> dict[str, Table]:
    """kld, ppl, needle, speed_tg, speed_pp, memory and server of what was measured: small enough for a README."""
    tables: dict[str, Table] = {}
    many = len(found.models) > 1

    def heading(model: str, text: str) -> str:
        return f"{model.removesuffix('.gguf')} {text}" if many else text

    kld = [group for group in found.divergences if group.compares]
    if kld:
        digits = decimals([r.kld.mean for group in kld for r in group.results if r.kld], 3)
        columns: dict[str, dict[str, Cell]] = {"bits K/V": {}}
        for group in kld:
            title = heading(group.model, f"ctx {group.ctx}")
            column = columns.setdefault(title if title not in columns else heading(group.model, group.title), {})
            for r in group.results:
                columns["bits K/V"].setdefault(r.requested, Cell(f"{r.bits_k:g}/{r.bits_v:g}"))
                column[r.requested] = value_cell(r.kld.mean if r.kld else None, digits, r.kld.ci95 if r.kld else None)
        tables["kld"] = _crossed(columns)
    if found.divergences:
        columns = {}
        for group in found.divergences:
            title = heading(group.model, f"ctx {group.ctx}")
            columns[title if title not in columns else heading(group.model, group.title)] = {
                r.requested: value_cell(r.ppl, 3) for r in group.results
            }
        tables["ppl"] = _crossed(columns)
    if found.needles:
        columns = {}
        for needle in found.needles:
            task = f"{needle.cell} " * (len({other.title for other in found.needles}) > 1)
            right = columns.setdefault(heading(needle.model, f"{task}right"), {})
            delta = columns.setdefault(heading(needle.model, f"{task}delta margin"), {})
            right[F16] = percent(needle.results[0].accuracy_f16, 1)
            for n in needle.results:
                right[n.requested] = percent(n.accuracy.mean, 1)
                delta[n.requested] = estimate(n.margin_delta, 2, sign=True)
        tables["needle"] = _crossed(columns)
    for test, name in (("tg", "generation"), ("pp", "prompt")):
        columns = {}
        for speed in found.speeds:
            for depth in speed.depths():
                column = {}
                for cache, by_depth in speed.results.items():
                    measured = getattr(by_depth[depth], test) if depth in by_depth else None
                    if measured is not None:
                        column[cache] = _speed_cell(measured)
                if column:
                    title = heading(speed.model, f"{name} at {depth:,}")
                    columns[title if title not in columns else f"{title}, {speed.title}"] = column
        if columns:
            tables[f"speed_{test}"] = _crossed(columns)
    sizes = {
        heading(group.model, "bytes/token"): {row.cache: value_cell(row.bytes_per_token, 0) for row in group.rows}
        for group in found.memory
        if group.rows
    }
    if sizes:
        tables["memory"] = _crossed(sizes)
    if found.servers:
        columns = {}
        for server in found.servers:
            for s in server.results:
                title = heading(server.model, f"{s.parallel} parallel{s.placement.title}")
                columns.setdefault(title, {})[s.requested] = Cell(
                    number(s.tokens_per_second, 1), times(s.ratio_f16, s.ratio_ci95)
                )
        tables["server"] = _crossed(columns)
    return tables


def _crossed(columns: dict[str, dict[str, Cell]]) -> Table:
    caches = list(dict.fromkeys(cache for column in columns.values() for cache in column))
    rows = [(cache_cell(cache), *(column.get(cache, Cell(NONE)) for column in columns.values())) for cache in caches]
    return Table((Column("cache K/V"), *map(Column, columns)), tuple(rows))
