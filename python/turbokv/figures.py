"""The report's charts: Vega-Lite by altair, drawn once to SVG by vl-convert, so that the page needs no script for them.

DARK gives every colour its counterpart for dark screens. Marks carry a
description (aria-label), which the page also shows as a tooltip.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

from turbokv import labels, record
from turbokv.findings import F16, FAMILIES, Divergences, Family, Speeds, family, interval, mean_kld, short
from turbokv.labels import Box
from turbokv.tables import significant

INK, MUTED, GRID, FRONT = "#1c2127", "#5a6470", "#e2e5e9", "#9aa3ad"
# Okabe and Ito's palette, which all common kinds of colour vision tell apart; grey for what is upstream's.
FAMILY_COLORS: dict[Family, str] = {"upstream": "#66707b", "turbo": "#0072b2", "tbq": "#009e73", "mixed": "#d55e00"}
FAMILY_SHAPES: dict[Family, str] = {"upstream": "square", "turbo": "circle", "tbq": "triangle-up", "mixed": "diamond"}
LINE_COLORS = ("#0072b2", "#c25500", "#00805d", "#b0568c", "#8a6d00")
LINE_DASHES = ([1, 0], [7, 3], [2, 2], [9, 3, 2, 3], [4, 4])
DARK = {  # what the page draws instead on a dark screen
    INK: "#e8eaed",
    MUTED: "#a3adb8",
    GRID: "#2b323a",
    FRONT: "#6b7580",
    "#66707b": "#aab4bf",
    "#0072b2": "#56b4e9",
    "#009e73": "#2cc295",
    "#d55e00": "#ff9248",
    "#c25500": "#ff9248",
    "#00805d": "#2cc295",
    "#b0568c": "#e39ac4",
    "#8a6d00": "#e6c84c",
}

FONT_SIZE = 12.0
KLD_TITLE, SPEED_TITLE = "KLD from f16, nats", "times f16"


@dataclass(frozen=True)
class LogScale:
    """A logarithmic axis of the given length in pixels, from `low` to `high`."""

    low: float
    high: float
    length: float

    def at(self, value: float) -> float:
        return self.length * math.log(value / self.low) / math.log(self.high / self.low)

    def value(self, position: float) -> float:
        return float(self.low * (self.high / self.low) ** (position / self.length))

    def ticks(self, steps: Iterable[float]) -> list[float]:
        """Multiples of powers of 10 within the scale."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = (float(f"{step}e{decade}") for decade in decades for step in steps)
        return [tick for tick in found if self.low <= tick <= self.high]


def padded(values: list[float], length: float, pad: float) -> LogScale:
    """A scale for positive values with `pad` pixels free at both ends; at least a factor of 1.5 wide."""
    low, high = min(values), max(values)
    if high / low < 1.5:
        low, high = low / 1.25, high * 1.25
    factor = (high / low) ** (pad / (length - 2 * pad))
    return LogScale(low / factor, high * factor, length)


def within(means: list[float], ends: list[float], factor: float) -> list[float]:
    """The ends of intervals, no further out than `factor` times the means: one wide interval must not flatten all."""
    low, high = min(means) / factor, max(means) * factor
    return [min(max(end, low), high) for end in ends]


def few_ticks(scale: LogScale) -> list[float]:
    """About 3 to 7 round numbers."""
    for steps in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 4, 6),
        (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8),
    ):
        ticks = scale.ticks(steps)
        if len(ticks) >= 3 and scale.at(ticks[0]) < 0.2 * scale.length:
            break
    return ticks


def pareto(group: Divergences, width: int, height: int) -> str:
    """SVG: KLD over bytes per token, both logarithmic, with 95 % intervals, the front and a label per cache."""
    results = group.plotted()
    front = group.front()
    pad = 34.0
    x = padded([group.bytes_per_token(r) for r in results], width, pad)
    y_values = [mean_kld(r) for r in results]
    y_values += within(y_values, [end for r in results for end in interval(r) or ()], 5)
    measured = group.floor()
    floor = measured.mean_kld if measured and measured.mean_kld else None
    if floor and floor < min(y_values) / 30:  # so far below everything that it would only take room
        floor = None
    y = padded([*y_values, *([floor] if floor else [])], height, pad)

    places = apart([(x.at(group.bytes_per_token(r)), height - y.at(mean_kld(r))) for r in results])
    position = {r.requested: place for r, place in zip(results, places, strict=True)}

    def px(r: record.KldResult) -> tuple[float, float]:
        return position[r.requested]

    rows, obstacles = [], []
    for r in results:
        ends = interval(r)
        low, high = (min(max(end, y.low), y.high) for end in ends) if ends else (mean_kld(r),) * 2
        size, left = group.bytes_per_token(r), px(r)[0]
        obstacles.append(Box(left - 2, height - y.at(high), left + 2, height - y.at(low)))
        rows.append(
            {
                "x": x.value(left),
                "y": mean_kld(r),
                "low": low,
                "high": high,
                "family": family(r.requested),
                "about": f"{short(r.cache)}: {size:,.0f} bytes per token, KLD {significant(mean_kld(r))}"
                + (f", 95 % CI {significant(ends[0])}..{significant(ends[1])}" if ends else "")
                + (", on the Pareto front" if r in front else ""),
            }
        )
    steps = [{"x": group.bytes_per_token(r), "y": mean_kld(r)} for r in front]
    if steps:  # what the front allows for more bytes than its last cache has
        steps.append({"x": x.high, "y": steps[-1]["y"]})
    corners = [(x.at(group.bytes_per_token(r)), px(r)[1]) for r in front]
    for (left, top), (right, bottom) in zip(corners, [*corners[1:], (float(width), corners[-1][1])], strict=True):
        obstacles.append(Box(left, top - 1, right, top + 1))
        obstacles.append(Box(right - 1, top, right + 1, bottom))
    if floor:
        level = height - y.at(floor)
        obstacles += [Box(0, level - 1, width, level + 1), Box(0, level - 16, 130, level)]

    texts = [short(r.requested) for r in results]
    beside = labels.place(places, texts, obstacles, Box(0, 0, width, height), FONT_SIZE)
    marks = [
        {"x": x.value(place.x), "y": y.value(height - place.y), "text": text}
        for place, text in zip(beside, texts, strict=True)
    ]
    leaders = [
        {**row, "x2": x.value(place.leader[0]), "y2": y.value(height - place.leader[1])}
        for place, row in zip(beside, rows, strict=True)
        if place.leader
    ]

    x_axis = alt.X("x:Q").scale(type="log", domain=[x.low, x.high], nice=False)
    x_axis = x_axis.title("KV cache, bytes per token").axis(values=few_ticks(x), format=",~r", grid=False)
    y_axis = alt.Y("y:Q").scale(type="log", domain=[y.low, y.high], nice=False)
    y_axis = y_axis.title(KLD_TITLE).axis(values=few_ticks(y), format="~g")
    families = [name for name in FAMILIES if any(row["family"] == name for row in rows)]
    colour = alt.Color("family:N").scale(domain=families, range=[FAMILY_COLORS[f] for f in families]).legend(None)
    shape = alt.Shape("family:N").scale(domain=families, range=[FAMILY_SHAPES[f] for f in families]).legend(None)

    layers: list[Any] = [
        chart(steps).mark_line(interpolate="step-after", color=FRONT, strokeWidth=2, aria=False).encode(x_axis, y_axis),
        chart(leaders).mark_rule(color=FRONT, aria=False).encode(x_axis, y_axis, x2="x2:Q", y2="y2:Q"),
        chart(rows)
        .mark_rule(strokeWidth=1.6, aria=False)
        .encode(x_axis, alt.Y("low:Q").title(KLD_TITLE), y2="high:Q", color=colour),
        chart(rows)
        .mark_point(size=85, filled=True, opacity=1)
        .encode(x_axis, y_axis, color=colour, shape=shape, description="about:N"),
        chart(marks)
        .mark_text(fontSize=FONT_SIZE, color=INK, baseline="middle", aria=False)
        .encode(x_axis, y_axis, text="text:N"),
    ]
    if floor:
        line = [{"x": x.value(4), "y": floor, "text": "noise floor: rounding"}]
        layers += [
            chart(line).mark_rule(strokeDash=[3, 3], color=MUTED, aria=False).encode(y=y_axis),
            chart(line)
            .mark_text(align="left", dy=-8, color=MUTED, fontSize=11, aria=False)
            .encode(x_axis, y_axis, text="text:N"),
        ]
    return svg(layers, width, height, f"KLD over bytes per token, {group.model}")


def apart(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points in pixels; two that would cover each other are moved 5 to the left and right."""
    moved = list(points)
    for i, (x, y) in enumerate(points):
        for j, (other_x, other_y) in enumerate(points[:i]):
            if abs(x - other_x) < 2 and abs(y - other_y) < 9 and moved[j] == points[j]:
                moved[j], moved[i] = (other_x - 5, other_y), (x + 5, y)
                break
    return moved


@dataclass(frozen=True)
class Panel:
    """The lines of one family."""

    family: Family
    svg: str


def speed_panels(group: Speeds, test: str, width: int = 235, height: int = 220) -> list[Panel]:
    """SVGs: speed as a multiple of f16's over depth, one panel per family, all on the same axes.

    `test` is tg or pp. f16 is the line at 1.
    """
    speeds: dict[str, list[tuple[int, record.Speed]]] = {}
    for cache, by_depth in group.results.items():
        found = [(depth, getattr(r, test)) for depth, r in sorted(by_depth.items())]
        kept = [(depth, speed) for depth, speed in found if speed is not None and speed.ratio_f16 is not None]
        if kept and cache != F16:
            speeds[cache] = kept
    if not speeds:
        return []
    ratios = [1.0, *(speed.ratio_f16 or 1.0 for line in speeds.values() for _, speed in line)]
    ends = [end for line in speeds.values() for _, speed in line for end in speed.ratio_ci95 or ()]
    y = padded(ratios + within(ratios, ends, 2), height, 16)
    depths = sorted({depth for line in speeds.values() for depth, _ in line})
    span = max(depths[-1] - depths[0], 1)
    x_low, x_high = depths[0] - 0.06 * span, depths[-1] + 0.62 * span  # labels stand right of the last point
    panels = []
    for name in FAMILIES:
        own = {cache: line for cache, line in speeds.items() if family(cache) == name}
        if own:
            panels.append(Panel(name, _speed_panel(own, depths, (x_low, x_high), y, width, height)))
    return panels


def _speed_panel(
    lines: dict[str, list[tuple[int, record.Speed]]],
    depths: list[int],
    x_domain: tuple[float, float],
    y: LogScale,
    width: int,
    height: int,
) -> str:
    names = list(lines)
    per_pixel = (x_domain[1] - x_domain[0]) / width
    rows: list[dict[str, Any]] = []
    for i, (cache, line) in enumerate(lines.items()):
        shift = (i - (len(lines) - 1) / 2) * 3 * per_pixel  # intervals of several caches stand side by side
        for depth, speed in line:
            assert speed.ratio_f16 is not None
            low, high = speed.ratio_ci95 or (speed.ratio_f16,) * 2
            shown = {"low": max(low, y.low), "high": min(high, y.high)}
            row = {"x": depth + shift, "y": speed.ratio_f16, "cache": cache, "depth": depth} | shown
            ends = f", 95 % CI {low:.2f}..{high:.2f}" if speed.ratio_ci95 else ""
            row["about"] = (
                f"{short(cache)} at depth {depth:,}: {speed.ratio_f16:.2f} x f16{ends}, {speed.mean:.1f} tokens/s"
            )
            rows.append(row)
    last = [[row for row in rows if row["cache"] == cache][-1] for cache in names]
    heights = labels.spread([height - y.at(row["y"]) for row in last], FONT_SIZE + 2, 8, height - 8)
    marks = [
        {
            "x": row["depth"] + 14 * per_pixel,
            "y": y.value(height - at),
            "text": short(row["cache"]),
            "cache": row["cache"],
        }
        for row, at in zip(last, heights, strict=True)
    ]
    x_axis = alt.X("x:Q").scale(domain=list(x_domain), nice=False, zero=False)
    x_axis = x_axis.axis(values=depths, format=",d", grid=False).title("tokens in the cache")
    ticks = y.ticks((1, 1.5, 2, 3, 4, 5, 7)) if y.high / y.low < 40 else y.ticks((1,))
    y_axis = alt.Y("y:Q").scale(type="log", domain=[y.low, y.high], nice=False)
    y_axis = y_axis.axis(values=ticks, format="~g").title(SPEED_TITLE)
    count = range(len(names))
    scale = alt.Scale(domain=names, range=[LINE_COLORS[i % len(LINE_COLORS)] for i in count])
    dashes = alt.Scale(domain=names, range=[LINE_DASHES[i % len(LINE_DASHES)] for i in count])
    colour = alt.Color("cache:N").scale(scale).legend(None)
    dash = alt.StrokeDash("cache:N").scale(dashes).legend(None)
    layers = [
        chart([{"y": 1.0}]).mark_rule(color=MUTED, strokeWidth=1.5, aria=False).encode(y=y_axis),
        chart(rows).mark_line(strokeWidth=2, aria=False).encode(x_axis, y_axis, color=colour, strokeDash=dash),
        chart(rows)
        .mark_rule(strokeWidth=1.4, aria=False)
        .encode(x_axis, alt.Y("low:Q").title(SPEED_TITLE), y2="high:Q", color=colour),
        chart(rows)
        .mark_point(size=42, filled=True, opacity=1)
        .encode(x_axis, y_axis, color=colour, description="about:N"),
        chart(marks)
        .mark_text(align="left", fontSize=FONT_SIZE, baseline="middle", aria=False)
        .encode(x_axis, y_axis, text="text:N", color=colour),
    ]
    return svg(layers, width, height, "speed over depth")


def chart(rows: list[dict[str, Any]]) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=rows))


def svg(layers: list[Any], width: int, height: int, description: str) -> str:
    """Draws a chart with a frame of that size. The page decides how large it is shown."""
    axis = {
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titleColor": MUTED,
        "labelColor": MUTED,
        "gridColor": GRID,
        "domainColor": FRONT,
        "tickColor": FRONT,
        "labelOverlap": True,
    }
    spec = (
        alt.layer(*layers).configure(background="transparent", font="sans-serif", padding=4).configure_view(stroke=None)
    )
    spec = spec.configure_axis(**axis).properties(width=width, height=height, description=description)
    version: str | None = alt.SCHEMA_VERSION.rsplit(".", 1)[0].removeprefix("v")
    if version not in vl_convert.get_vegalite_versions():
        version = None  # vl-convert's newest: these charts use nothing that is new
    drawn = vl_convert.vegalite_to_svg(spec.to_dict(), vl_version=version)
    head, rest = drawn.split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', head)
    assert box is not None
    view = box[1]
    return f'<svg viewBox="{view}" style="max-width:{view.split()[2]}px" role="img">{rest}'
