"""Plots as inline SVG, drawn here so that the page needs nothing else. Colours come from the page's style sheet.

All texts are escaped. A plot scales with its container: sizes below are those of its own coordinate system.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 34


@dataclass(frozen=True)
class Series:
    """A line: its name and (x, y) points in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]


def number(value: float) -> str:
    """Four significant digits, thousands separated; never an exponent for what people read."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "not finite"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:.{min(digits, 8)}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """Means of neighbours, so that a long training is a few hundred points; points that are not finite are left out."""
    good = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = -(-len(good) // most) if good else 1
    parts = [good[i : i + size] for i in range(0, len(good), size)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def lines(series: Sequence[Series], *, x: str, y: str, from_zero: bool = True) -> str:
    """A line chart with a legend and, with scripts, a reading of all lines under the pointer."""
    drawn = [Series(s.name, thinned(s.points)) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    xs, ys = [p[0] for s in drawn for p in s.points], [p[1] for s in drawn for p in s.points]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    if from_zero and y_low > 0:
        y_low = 0.0
    y_high = y_high if y_high > y_low else y_low + 1
    x_high = x_high if x_high > x_low else x_low + 1
    inner_w, inner_h = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(px: float, py: float) -> tuple[float, float]:
        return (
            _LEFT + inner_w * (px - x_low) / (x_high - x_low),
            _TOP + inner_h * (1 - (py - y_low) / (y_high - y_low)),
        )

    parts = []
    for tick in ticks(y_low, y_high):
        _, py = at(x_low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in ticks(x_low, x_high, 6):
        px, _ = at(tick, y_low)
        parts.append(
            f'<text class="tick" x="{px:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{number(tick)}</text>'
        )
    parts.append(f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 3}" text-anchor="end">{escape(x)}</text>')
    for i, s in enumerate(drawn):
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(*p) for p in s.points))
        parts.append(f'<polyline class="line c{i % 6}" points="{path}"/>')
        if len(s.points) <= 12:
            parts += [
                f'<circle class="dot c{i % 6}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>'
                for a, b in map(at, *zip(*s.points, strict=True))
            ]
    data = {
        "frame": [_LEFT, _TOP, inner_w, inner_h, x_low, x_high, y_low, y_high, _WIDTH, _HEIGHT],
        "x": x,
        "series": [{"name": s.name, "points": [[round(a, 3), float(f"{b:.6g}")] for a, b in s.points]} for s in drawn],
    }
    legend = "".join(f'<span class="key c{i % 6}">{escape(s.name)}</span>' for i, s in enumerate(drawn))
    return (
        f'<figure class="plot"><figcaption>{escape(y)}<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y)} over {escape(x)}" '
        f'data-lines="{escape(json.dumps(data))}">{"".join(parts)}</svg></figure>'
    )


@dataclass(frozen=True)
class Interval:
    """A row of `intervals`: a name, a mean with its interval, single values (of seeds), and the text on hover."""

    name: str
    mean: float
    low: float
    high: float
    values: Sequence[float] = ()
    hint: str = ""


def intervals(rows: Sequence[Interval], *, caption: str, zero: bool = False) -> str:
    """Means with their intervals, one row each; `zero` draws the line of no difference."""
    if not rows:
        return ""
    row_height, top, left = 32, 8, 176
    height = top + row_height * len(rows) + 28
    numbers = [v for r in rows for v in (r.mean, r.low, r.high, *r.values)] + ([0.0] if zero else [])
    low, high = min(numbers), max(numbers)
    margin = (high - low or abs(high) or 1.0) * 0.06
    low, high = low - margin, high + margin

    def at(value: float) -> float:
        return left + (_WIDTH - left - _RIGHT) * (value - low) / (high - low)

    parts = []
    for tick in ticks(low, high, 5):
        px = at(tick)
        parts.append(f'<line class="grid" x1="{px:.1f}" x2="{px:.1f}" y1="{top}" y2="{height - 24}"/>')
        parts.append(f'<text class="tick" x="{px:.1f}" y="{height - 8}" text-anchor="middle">{number(tick)}</text>')
    if zero:
        parts.append(f'<line class="zero" x1="{at(0):.1f}" x2="{at(0):.1f}" y1="{top}" y2="{height - 24}"/>')
    for i, row in enumerate(rows):
        y = top + row_height * (i + 0.5)
        hint = row.hint or f"{row.name}: {row.mean:.4f} [{row.low:.4f}, {row.high:.4f}]"
        parts.append(
            f'<g class="row"><title>{escape(hint)}</title>'
            f'<rect class="hit" x="0" y="{y - row_height / 2:.1f}" width="{_WIDTH}" height="{row_height}"/>'
            f'<text class="name" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(row.name)}</text>'
            f'<line class="whisker" x1="{at(row.low):.1f}" x2="{at(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            + "".join(f'<circle class="seed" cx="{at(v):.1f}" cy="{y:.1f}" r="2.5"/>' for v in row.values)
            + f'<circle class="dot c0" cx="{at(row.mean):.1f}" cy="{y:.1f}" r="5"/></g>'
        )
    return (
        f'<figure class="plot"><figcaption>{escape(caption)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(caption)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def histogram(values: Sequence[float], *, caption: str, x: str, bins: int = 21) -> str:
    """How often each difference occurs; losses and wins have colours of their own. Bars follow the square root of the
    count, so that a few queries stay visible beside many unchanged ones."""
    good = [v for v in values if math.isfinite(v)]
    if not good:
        return ""
    reach = max(abs(v) for v in good)
    if reach < 1e-6:  # all equal, up to rounding: an axis as narrow as that has no readable ends
        reach = 1.0
    counts = [0] * bins
    for v in good:
        counts[min(bins - 1, int((v + reach) / (2 * reach) * bins))] += 1
    inner_w, height = _WIDTH - 2 * _RIGHT, 170
    tallest, wide = math.sqrt(max(counts)), inner_w / bins
    parts = []
    for i, count in enumerate(counts):
        a, b = -reach + 2 * reach * i / bins, -reach + 2 * reach * (i + 1) / bins
        h = (height - 50) * math.sqrt(count) / tallest
        kind = "same" if a < 0 < b else ("loss" if b <= 0 else "win")
        hint = f"{count:,} queries from {a:+.3f} to {b:+.3f}"
        left = _RIGHT + i * wide
        parts.append(
            f'<g class="row"><title>{hint}</title><rect class="hit" x="{left:.1f}" y="0" width="{wide:.1f}" '
            f'height="{height - 24}"/><rect class="bar {kind}" x="{left + 1:.1f}" y="{height - 24 - h:.1f}" '
            f'width="{wide - 2:.1f}" height="{h:.1f}" rx="2"/>'
            + (
                f'<text class="tick" x="{left + wide / 2:.1f}" y="{height - 29 - h:.1f}" text-anchor="middle">'
                f"{count:,}</text>"
                if count
                else ""
            )
            + "</g>"
        )
    for tick, anchor, px in ((-reach, "start", _RIGHT), (0.0, "middle", _WIDTH / 2), (reach, "end", _WIDTH - _RIGHT)):
        parts.append(f'<text class="tick" x="{px}" y="{height - 7}" text-anchor="{anchor}">{number(tick)}</text>')
    return (
        f'<figure class="plot"><figcaption>{escape(caption)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(caption)}, {escape(x)}">{"".join(parts)}</svg></figure>'
    )


@dataclass(frozen=True)
class Axis:
    """One axis of `parallel`: its name, and for every line the place on it from 0 to 1 and the value in words."""

    name: str
    places: Sequence[float]
    values: Sequence[str]


def parallel(axes: Sequence[Axis], *, best: int, names: Sequence[str], caption: str) -> str:
    """Parallel coordinates: a line a trial through its value on every axis, the better the stronger by the last axis;
    the line number `best` stands out. A line's values are shown on hover."""
    if len(axes) < 2 or not names:
        return ""
    top, bottom, side = 34, 26, 60
    gap = (_WIDTH - 2 * side) / (len(axes) - 1)
    inner = _HEIGHT - top - bottom
    parts = []
    for i, axis in enumerate(axes):
        px = side + i * gap
        parts.append(f'<line class="grid" x1="{px:.1f}" x2="{px:.1f}" y1="{top}" y2="{_HEIGHT - bottom}"/>')
        parts.append(f'<text class="name" x="{px:.1f}" y="{top - 18}" text-anchor="middle">{escape(axis.name)}</text>')
        ends = sorted(zip(axis.places, axis.values, strict=True))
        for (place, text), dy in ((ends[0], 14), (ends[-1], -5)):
            py = top + inner * (1 - place)
            parts.append(
                f'<text class="tick" x="{px:.1f}" y="{py + dy:.1f}" text-anchor="middle">{escape(text)}</text>'
            )
    order = sorted(range(len(names)), key=lambda n: (n == best, axes[-1].places[n]))
    for n in order:
        points = " ".join(
            f"{side + i * gap:.1f},{top + inner * (1 - axis.places[n]):.1f}" for i, axis in enumerate(axes)
        )
        hint = f"{names[n]}: " + ", ".join(f"{axis.name} {axis.values[n]}" for axis in axes)
        kind = "line c1" if n == best else "line c0"
        strength = 1.0 if n == best else 0.15 + 0.55 * axes[-1].places[n]
        parts.append(
            f'<g class="row"><title>{escape(hint)}</title>'
            f'<polyline class="{kind}" points="{points}" opacity="{strength:.2f}"/></g>'
        )
    return (
        f'<figure class="plot"><figcaption>{escape(caption)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(caption)}">{"".join(parts)}</svg>'
        "</figure>"
    )


def scatter(
    points: Sequence[tuple[float, float, str]], *, x: str, y: str, logarithmic: bool = False, labels: Sequence[str] = ()
) -> str:
    """Points with a text each on hover; `labels` names the places 0, 1, 2, ... where x is no number."""
    good = [(math.log10(a) if logarithmic else a, b, text) for a, b, text in points]
    if not good:
        return ""
    width, height = _WIDTH // 2, 200
    low, high = min(p[0] for p in good), max(p[0] for p in good)
    low, high = (low - 0.5, high + 0.5) if high == low or labels else (low, high)
    y_low, y_high = min(p[1] for p in good), max(p[1] for p in good)
    y_low, y_high = (y_low, y_high) if y_high > y_low else (y_low - 0.5, y_high + 0.5)

    def at(a: float, b: float) -> tuple[float, float]:
        return (
            _LEFT + (width - _LEFT - _RIGHT) * (a - low) / (high - low),
            _TOP + (height - _TOP - _BOTTOM) * (1 - (b - y_low) / (y_high - y_low)),
        )

    parts = []
    for tick in ticks(y_low, y_high, 4):
        py = at(low, tick)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    if labels:
        marks = [(float(i), text) for i, text in enumerate(labels)]
    elif logarithmic:
        marks = [(v, number(10**v)) for v in (low, (low + high) / 2, high)]
    else:
        marks = [(v, number(v)) for v in ticks(low, high, 4)]
    for value, text in marks:
        px = at(value, y_low)[0]
        parts.append(
            f'<text class="tick" x="{px:.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>'
        )
    for a, b, text in good:
        px, py = at(a, b)
        parts.append(
            f'<g class="row"><title>{escape(text)}</title>'
            f'<circle class="dot c0" cx="{px:.1f}" cy="{py:.1f}" r="4"/></g>'
        )
    return (
        f'<figure class="plot small"><figcaption>{escape(x)}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(y)} by {escape(x)}">{"".join(parts)}</svg>'
        "</figure>"
    )


def bar(share: float, kind: str = "") -> str:
    """A small horizontal bar for a table cell, `share` from 0 to 1."""
    width = 100 * min(1.0, max(0.0, share))
    return f'<span class="meter {escape(kind)}"><span style="width:{width:.1f}%"></span></span>'
