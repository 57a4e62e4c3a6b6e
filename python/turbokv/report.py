"""Records as a page that one file holds, and as Markdown.

The page opens without a network: charts are drawn into it as SVG, style and script stand in it, and its content
security policy lets nothing else run or load. The same records give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from typing import Any

import jinja2

from turbokv import findings, record, store, tables
from turbokv.errors import TurbokvError
from turbokv.findings import Divergences, Findings, Needles, family, plural, short
from turbokv.native import PACKAGE
from turbokv.summary import Summary, listed, summaries
from turbokv.tables import Table

TEMPLATES = PACKAGE / "templates"

GLOSSARY = (
    ("KLD", "Kullback-Leibler divergence of the next-token distribution from the one with an f16 cache, in nats, "
     "averaged over the scored tokens: how far the predictions move, whatever the true next token is."),
    ("95 % CI", "A range that holds the mean over all such text, or all such rounds, in 95 of 100 measurements; caches "
     "whose intervals overlap are not told apart."),
    ("trimmed, median, 99.9 %", "The KLD without its extremes, of the middle token, and what one token in a thousand "
     "exceeds: a small mean with a large 99.9 % is rare but heavy damage."),
    ("same top", "Share of tokens where the most likely next token is the one that f16 would give; greedy decoding "
     "goes another way at the others."),
    ("delta NLL", "Mean change of the negative log-likelihood of the true next token, paired with f16; it is the "
     "logarithm of the ratio of the perplexities, and errors up and down cancel in it."),
    ("noise floor", "f16 against itself, computed in batches of another size: differences of that size are rounding."),
    ("Pareto front", "The caches to which no other measured one is both no larger and closer to f16."),
    ("needle, margin", "A fact is hidden in a long text and asked for. The margin is the log-probability of the right "
     "answer minus that of the best wrong one, in nats; its change from f16 shows harm before an answer is lost."),
    ("tg, pp", "Generated tokens per second, and prompt tokens per second, behind as many tokens as the depth says; "
     "multiples of f16 are formed within a round."),
    ("bits", "Bits per cached value of K and V, scales included; f16 has 16."),
)  # fmt: skip


@dataclass(frozen=True)
class HeatCell:
    """A field of a heat map. `step` is the accuracy in tenths; `lost` says that f16 is more often right."""

    text: str
    below: str
    step: int
    lost: bool
    about: str


@dataclass(frozen=True)
class HeatMap:
    cache: str
    family: str
    rows: tuple[tuple[str, tuple[HeatCell | None, ...]], ...]  # depth, one cell per length


def current(records: list[record.Record]) -> Findings:
    """Findings of the last record of every id. Raises TurbokvError where there is nothing to report."""
    if not records:
        raise TurbokvError("there is no result in it: run `turbokv sweep` first, or name another file")
    return findings.find(store.latest(records))


def page(records: list[record.Record]) -> str:
    """The report as HTML."""
    from altair.utils.schemapi import debug_mode

    from turbokv import figures  # altair takes most of a second to import

    found = current(records)
    script = (TEMPLATES / "report.js").read_text()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(TEMPLATES)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["zip"] = zip
    environment.filters |= {"short": short, "family": family, "plural": plural, "listed": listed, "unbroken": unbroken}
    # The charts' schema is checked by the tests; checking it here takes half of the time.
    with debug_mode(False):
        return environment.get_template("report.html").render(
            found=found,
            title=title(found),
            measured=measured(found),
            warnings=warnings(found),
            summaries=summaries(found),
            headlines={model: found.headline(model) for model in found.models},
            tables=tables,
            figures=figures,
            heat_maps=heat_maps,
            environments=counted(found, "environment"),
            builds=counted(found, "build"),
            model_files=counted(found, "model"),
            commands=commands(found),
            glossary=GLOSSARY,
            dark=figures.DARK,
            panel_labels=panel_labels,
            style=(TEMPLATES / "report.css").read_text(),
            script=script,
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )


def title(found: Findings) -> str:
    return f"KV caches of {listed([model.removesuffix('.gguf') for model in found.models])}"


def unbroken(text: str) -> str:
    """Keeps numbers and their percent sign on one line."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def measured(found: Findings) -> str:
    """How many results, of when, by what."""
    dates = sorted({item.started[:10] for item in found.records})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    versions = sorted({item.build.turbokv for item in found.records})
    upstream = sorted({item.build.upstream_commit[:9] for item in found.records})
    what = f"turbokv {listed(versions)}, llama.cpp {listed(upstream)}"
    return f"{plural(len(found.records), 'result')}, measured {when} (UTC) with {what}"


def warnings(found: Findings) -> list[str]:
    """What a reader must know before believing the numbers."""
    notes = []
    missing = sum(len(gap.caches) for gap in found.gaps)
    if missing:
        notes.append(f"Incomplete: {missing} of {plural(found.expected, 'cell')} are not in these results.")
    dirty = sum(item.build.dirty is True for item in found.records)
    if dirty:
        notes.append(f"{plural(dirty, 'result')} came from a checkout with changes that were not committed.")
    builds = {item.build.build for item in found.records}
    if len(builds) > 1:
        notes.append(f"The results came from {len(builds)} builds, which may differ.")
    if found.replaced:
        notes.append(
            f"{plural(found.replaced, 'result')} of the same cell from another build or machine "
            f"{'is' if found.replaced == 1 else 'are'} not shown: the last one counts."
        )
    bad = [short(r.requested) for group in found.divergences for r in group.results if r.non_finite]
    if bad:
        notes.append(f"NaN or infinite logits with {listed(list(dict.fromkeys(bad)))}: see the column bad.")
    return notes


def counted(found: Findings, field: str) -> list[tuple[Any, int]]:
    """The different circumstances of that kind and how many results have each, in order of appearance."""
    counts: dict[Any, int] = {}
    for item in found.records:
        counts[getattr(item, field)] = counts.get(getattr(item, field), 0) + 1
    return list(counts.items())


def commands(found: Findings) -> list[str]:
    return list(dict.fromkeys(item.command for item in found.records))


def panel_labels(groups: list[Divergences]) -> list[str]:
    """`ctx 2048` where that tells a model's comparisons apart, else the whole title."""
    labels = [f"ctx {group.ctx}" for group in groups]
    return labels if len(set(labels)) == len(labels) else [group.title for group in groups]


def heat_maps(group: Needles) -> list[HeatMap]:
    """f16's first, then one per cache; depths down, lengths across."""
    reference = {(c.length, c.depth): c for r in group.results for c in r.cells}
    maps = [_heat_map(group, findings.F16, reference, of_f16=True)]
    return maps + [
        _heat_map(group, r.requested, {(c.length, c.depth): c for c in r.cells}, of_f16=False)
        for r in group.results
        if r.requested != findings.F16
    ]


def _heat_map(
    group: Needles, cache: str, cells: dict[tuple[int, float], record.NeedleCell], *, of_f16: bool
) -> HeatMap:
    def view(length: int, depth: float) -> HeatCell | None:
        cell = cells.get((length, depth))
        if cell is None:
            return None
        accuracy = cell.accuracy_f16 if of_f16 else cell.accuracy
        delta = None if of_f16 else cell.margin_delta
        about = f"{short(cache)}, {length:,} tokens, depth {depth:g}: right in {100 * accuracy:.0f} % of "
        about += f"{plural(cell.trials, 'trial')}"
        if not of_f16:
            about += f", f16 in {100 * cell.accuracy_f16:.0f} %"
            about += f"; margin {tables.number(delta, 2, sign=True)} from f16" if delta is not None else ""
        below = "" if of_f16 else tables.number(delta, 1, sign=True)
        return HeatCell(
            f"{100 * accuracy:.0f}", below, round(10 * accuracy), not of_f16 and accuracy < cell.accuracy_f16, about
        )

    rows = tuple((f"{depth:g}", tuple(view(length, depth) for length in group.lengths())) for depth in group.depths())
    return HeatMap(short(cache), family(cache), rows)


# --- Markdown


def markdown_tables(records: list[record.Record]) -> dict[str, str]:
    """Compact GitHub tables by name (kld, ppl, needle, speed_tg, speed_pp, memory, server) of what was measured."""
    return {name: table.markdown() for name, table in tables.compact(current(records)).items()}


def markdown(records: list[record.Record]) -> str:
    """The report as GitHub Markdown: what the page says, without its charts."""
    found = current(records)
    parts = [f"# {plain(title(found))}", f"{plain(measured(found))}."]
    parts += [f"> **{plain(note)}**" for note in warnings(found)]
    parts += ["## Summary", *map(_summary_markdown, summaries(found))]
    sections: list[tuple[str, list[tuple[str, str, Table]]]] = [
        ("Divergence", [(g.model, f"{g.title}{_floor(g)}", tables.divergences(g)) for g in found.divergences]),
        ("Needle", [(g.model, g.title, tables.needles(g)) for g in found.needles]),
        ("Speed", [(g.model, g.title, tables.speeds(g)) for g in found.speeds]),
        ("Memory", [(g.model, "KV cache", tables.memory(g)) for g in found.memory if g.rows]),
        ("Server", [(g.model, g.title, tables.servers(g)) for g in found.servers]),
    ]
    for heading, groups in sections:
        parts += [f"## {heading}"] * bool(groups)
        for model, text, table in groups:
            parts += [f"{plain(model)}, {plain(text)}:", table.markdown().rstrip()]
    if found.gaps or found.failures:
        lines = [
            f"- {gap.kind}, {plain(gap.model)}, {plain(gap.cell)}: not measured: {', '.join(map(short, gap.caches))}"
            for gap in found.gaps
        ]
        lines += [
            f"- {plain(f.kind)}, {plain(f.model)}, {short(plain(f.cache))}, {f.where}: {plain(f.reason)}"
            for f in found.failures
        ]
        parts += ["## Missing and refused", "\n".join(lines)]
    lines = [
        f"- {plain(e.cpu)}, {plural(e.cores, 'core')}, GPU {plain(e.gpu or 'none')}, {plain(e.os)}, "
        f"Python {plain(e.python)}, OMP_WAIT_POLICY={plain(e.OMP_WAIT_POLICY)}: {plural(n, 'result')}"
        for e, n in counted(found, "environment")
    ]
    lines += [
        f"- turbokv {plain(b.turbokv)}, commit {plain(b.commit or 'unknown')}{' with changes' * (b.dirty is True)}, "
        f"llama.cpp {plain(b.upstream_commit)}, build {plain(b.build)}: {plural(n, 'result')}"
        for b, n in counted(found, "build")
    ]
    parts += ["## Environment", "\n".join(lines)]
    parts += ["## Commands", "\n".join(f"    {line}" for text in commands(found) for line in text.splitlines())]
    parts += ["## Glossary", "\n".join(f"- **{name}**: {text}" for name, text in GLOSSARY)]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Text from a record as one Markdown line in which nothing is markup."""
    text = " ".join(text.split())
    text = re.sub(r"([\\`*\[\]|]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _floor(group: Divergences) -> str:
    floor = group.floor()
    return "" if floor is None else f"; noise floor {floor.mean_kld:.6f}"


def _summary_markdown(item: Summary) -> str:
    lines = [f"### {plain(item.model)}"]
    if item.choices:
        what = "On the Pareto front, smallest first" if item.compared > 1 else "The only cache measured beside f16"
        lines.append(f"{what} ({plain(item.title)}):")
        lines.append("\n".join(f"- **{plain(choice.cache)}**: {plain(choice.text)}" for choice in item.choices))
    lines += [plain(text) for text in item.sentences]
    return "\n\n".join(lines)
