"""The report in sentences. Each follows from the records: what was not measured is not spoken of."""

from __future__ import annotations

from dataclasses import dataclass

from turbokv import record
from turbokv.findings import (
    F16,
    Divergences,
    Findings,
    Needles,
    Speeds,
    family,
    interval,
    mean_kld,
    overlap,
    plural,
    short,
)
from turbokv.tables import ends, significant


@dataclass(frozen=True)
class Choice:
    """A cache on the Pareto front."""

    cache: str
    family: str
    text: str


@dataclass(frozen=True)
class Summary:
    model: str
    title: str  # the comparison that the front is from; empty without one
    compared: int  # caches in it, f16 left out
    choices: tuple[Choice, ...]
    sentences: tuple[str, ...]


def summaries(found: Findings) -> list[Summary]:
    """One per model, in the order of `found.models`."""
    result = []
    for model in found.models:
        headline = found.headline(model)
        sentences = []
        if headline:
            sentences += _off_the_front(headline)
        sentences += [text for group in found.needles if group.model == model for text in _needle(group)]
        sentences += [text for group in found.speeds if group.model == model for text in _speed(group)]
        choices = _choices(headline, found) if headline else ()
        result.append(
            Summary(
                model,
                headline.title if headline else "",
                len(headline.plotted()) if headline else 0,
                choices,
                tuple(sentences),
            )
        )
    return result


def listed(names: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _choices(group: Divergences, found: Findings) -> tuple[Choice, ...]:
    others = [
        other for other in found.divergences if other.model == group.model and other.compares and other.ctx != group.ctx
    ]
    choices = []
    f16 = group.f16_bytes_per_token()
    for r in group.front():
        size = group.bytes_per_token(r)
        ci = interval(r)
        text = f"{f16 / size:.1f} times smaller than f16, " if f16 else ""
        text += f"{size:,.0f} bytes per token"
        text += f"; KLD {significant(mean_kld(r))}"
        text += f" ({significant(ci[0])}..{significant(ci[1])})" if ci else ""
        text += f", same top {100 * r.same_top:.1f} %." if r.same_top is not None else "."
        floor = group.floor()
        if floor and floor.mean_kld and mean_kld(r) <= floor.mean_kld:
            text += " That is no more than rounding."
        text += _against_upstream(group, r)
        if close := group.close_to(r):
            text += f" Not told apart from it: {listed([short(other.requested) for other in close])}."
        off = [
            f"ctx {other.ctx}"
            for other in others
            if r.requested in {p.requested for p in other.plotted()} - {p.requested for p in other.front()}
        ]
        text += f" Not on the front at {listed(list(dict.fromkeys(off)))}." if off else ""
        choices.append(Choice(short(r.requested), family(r.requested), text))
    return tuple(choices)


def _against_upstream(group: Divergences, r: record.KldResult) -> str:
    """Beside the smallest of upstream's types that takes at least as many bytes."""
    if family(r.requested) == "upstream":
        return ""
    larger = [u for u in group.plotted() if family(u.requested) == "upstream" and u.kv_bytes >= r.kv_bytes]
    if not larger:
        return ""
    other = larger[0]
    saved = 1 - r.kv_bytes / other.kv_bytes
    name = short(other.requested)
    text = f" {100 * saved:.0f} % fewer bytes than {name}" if saved >= 0.005 else f" As many bytes as {name}"
    if overlap(interval(r), interval(other)):
        return f"{text}; their KLD is not told apart."
    ratio = mean_kld(r) / mean_kld(other)
    return f"{text}, {significant(ratio) if ratio < 10 else f'{ratio:,.0f}'} times its KLD."


def _off_the_front(group: Divergences) -> list[str]:
    front = {r.requested for r in group.front()}
    off = [short(r.requested) for r in reversed(group.plotted()) if r.requested not in front]
    if not off:
        return []
    return [f"Off the front, where another cache is no larger and closer to f16: {listed(off)}."]


def _needle(group: Needles) -> list[str]:
    results = [r for r in group.results if r.requested != F16]
    if not results:
        return []
    n = sum(cell.trials for cell in results[0].cells)
    text = f"Needles ({group.title}): f16 answers {100 * results[0].accuracy_f16:.0f} %."
    kept = [short(r.requested) for r in results if r.lost == 0]
    if len(kept) == len(results):
        return [f"{text} {plural(len(kept), 'cache')} measured, and none loses a trial that f16 answers."]
    worst = max(results, key=lambda r: r.lost)
    text += f" Nothing that f16 answers is lost with {listed(kept)}." if kept else " Every cache loses some of these."
    return [f"{text} Most is lost with {short(worst.requested)}: {worst.lost} of {plural(n, 'trial')}."]


def _speed(group: Speeds) -> list[str]:
    depth = group.depths()[-1]
    sentences = []
    for test, name in (("tg", "Generation"), ("pp", "Prompt processing")):
        found: list[tuple[str, float, record.Interval | None]] = []
        for cache, by_depth in group.results.items():
            speed = getattr(by_depth[depth], test) if depth in by_depth else None
            if speed is not None and speed.ratio_f16 is not None and cache != F16:
                found.append((short(cache), speed.ratio_f16, speed.ratio_ci95))
        if not found:
            continue
        best, worst = max(found, key=lambda f: f[1]), min(found, key=lambda f: f[1])
        text = f"{name} behind {depth:,} tokens: {_times(best)} f16's speed with {best[0]}"
        equal = [f[0] for f in found if f is not best and overlap(f[2], best[2])]
        text += f" (not told apart from {listed(equal)})" if equal else ""
        if worst is not best and worst[0] not in equal:
            text += f", {_times(worst)} with {worst[0]}"
        sentences.append(f"{text}.")
    return sentences


def _times(found: tuple[str, float, record.Interval | None]) -> str:
    return f"{found[1]:.2f} times" + (f" ({ends(found[2], 2)})" if found[2] else "")
