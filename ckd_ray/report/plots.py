"""Plots as inline SVG, so that the page needs no other file. Colours come from the page's style sheet.

A plot scales with its container: the sizes below are those of its own coordinate system. `tag` escapes all texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 14, 34


@dataclass(frozen=True)
class Series:
    """A line: its name and (x, y) points in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Interval:
    """A row of `intervals`: a name, a mean with its interval, and single values (of seeds)."""

    name: str
    mean: float
    low: float
    high: float
    values: Sequence[float] = ()
    hint: str = ""  # on hover


@dataclass(frozen=True)
class Axis:
    """An axis of `parallel`: its name, and for each line the place on it from 0 to 1 and the value in words."""

    name: str
    places: Sequence[float]
    values: Sequence[str]


@dataclass(frozen=True)
class _Scale:
    """Maps [low, high] to `length` units from `start`; a negative length points up."""

    low: float
    high: float
    start: float
    length: float

    def __call__(self, value: float) -> float:
        return self.start + self.length * (value - self.low) / (self.high - self.low)


def number(value: float) -> str:
    """Four significant digits, thousands separated; never an exponent, which people read badly."""
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
    """At most `most` points, means of neighbours. Points that are not finite are left out."""
    good = [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = -(-len(good) // most) if good else 1
    parts = [good[i : i + size] for i in range(0, len(good), size)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def tag(name: str, *inner: object, **attributes: object) -> Markup:
    """An element. In the name of an attribute `_` stands for `-`, and one at the end is dropped (`class_`)."""
    written = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), f"{v:.1f}" if isinstance(v, float) else v)
        for key, v in attributes.items()
    ]
    return Markup("<{}{}>{}</{}>").format(name, Markup("").join(written), Markup("").join(map(_text, inner)), name)


def _text(inner: object) -> str:
    return inner if isinstance(inner, str) else str(inner)


def _label(text: str, x: float, y: float, anchor: str = "middle", kind: str = "tick") -> Markup:
    return tag("text", text, class_=kind, x=x, y=y, text_anchor=anchor)


def _hover(hint: str, *inner: Markup) -> Markup:
    return tag("g", tag("title", hint), *inner, class_="row")


def _across(y: float, right: float, text: str) -> Markup:
    """A horizontal grid line with its number at the left."""
    return tag("line", class_="grid", x1=_LEFT, x2=right, y1=y, y2=y) + _label(text, _LEFT - 8, y + 4, "end")


def _figure(
    caption: object, parts: Sequence[Markup], height: int = _HEIGHT, *, width: int = _WIDTH, kind: str = "plot",
    label: object = None, **data: str,
) -> Markup:  # fmt: skip
    named = caption if label is None else label
    svg = tag("svg", *parts, viewBox=f"0 0 {width} {height}", role="img", aria_label=named, **data)
    return tag("figure", tag("figcaption", caption), svg, class_=kind)


def lines(series: Sequence[Series], *, x: str, y: str, from_zero: bool = True) -> Markup:
    """A line chart with a legend. The page's script shows the values of all lines under the pointer."""
    drawn = [s for s in (Series(s.name, thinned(s.points)) for s in series) if s.points]
    if not drawn:
        return Markup("")
    xs, ys = ([p[i] for s in drawn for p in s.points] for i in (0, 1))
    y_low = min(0.0, *ys) if from_zero else min(ys)
    y_high = max(ys) if max(ys) > y_low else y_low + 1
    x_low, x_high = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    across, up = _Scale(x_low, x_high, _LEFT, width), _Scale(y_low, y_high, _TOP + height, -height)
    parts = [_across(up(tick), _WIDTH - _RIGHT, number(tick)) for tick in ticks(y_low, y_high)]
    parts += [_label(number(tick), across(tick), _HEIGHT - _BOTTOM + 16) for tick in ticks(x_low, x_high, 6)]
    parts.append(_label(x, _WIDTH - _RIGHT, _HEIGHT - 3, "end", "axis"))
    for i, s in enumerate(drawn):
        places = [(across(a), up(b)) for a, b in s.points]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(tag("polyline", class_=f"line c{i % 6}", points=points))
        if len(places) <= 12:
            parts += [tag("circle", class_=f"dot c{i % 6}", cx=a, cy=b, r=3) for a, b in places]
    data = {
        "frame": [_LEFT, _TOP, width, height, x_low, x_high, y_low, y_high, _WIDTH, _HEIGHT],
        "x": x,
        "series": [{"name": s.name, "points": [[round(a, 3), float(f"{b:.6g}")] for a, b in s.points]} for s in drawn],
    }
    legend = tag("span", *(tag("span", s.name, class_=f"key c{i % 6}") for i, s in enumerate(drawn)), class_="legend")
    caption = Markup("{}{}").format(y, legend)
    return _figure(caption, parts, label=f"{y} over {x}", data_lines=json.dumps(data))


def intervals(rows: Sequence[Interval], *, caption: str, zero: bool = False) -> Markup:
    """Means with their intervals, one row each; `zero` draws the line of no difference."""
    if not rows:
        return Markup("")
    row_height, top, left = 32, 8, 176
    height = top + row_height * len(rows) + 28
    numbers = [v for r in rows for v in (r.mean, r.low, r.high, *r.values)] + ([0.0] if zero else [])
    low, high = min(numbers), max(numbers)
    margin = (high - low or abs(high) or 1.0) * 0.06
    at = _Scale(low - margin, high + margin, left, _WIDTH - left - _RIGHT)
    marks = [("grid", tick) for tick in ticks(at.low, at.high, 5)]
    parts = [_label(number(tick), at(tick), height - 8) for _, tick in marks]
    for kind, tick in [*marks, ("zero", 0.0)] if zero else marks:
        parts.append(tag("line", class_=kind, x1=at(tick), x2=at(tick), y1=top, y2=height - 24))
    for i, row in enumerate(rows):
        y = top + row_height * (i + 0.5)
        parts.append(
            _hover(
                row.hint or f"{row.name}: {row.mean:.4f} [{row.low:.4f}, {row.high:.4f}]",
                tag("rect", class_="hit", x=0, y=y - row_height / 2, width=_WIDTH, height=row_height),
                _label(row.name, left - 12, y + 4, "end", "name"),
                tag("line", class_="whisker", x1=at(row.low), x2=at(row.high), y1=y, y2=y),
                *(tag("circle", class_="seed", cx=at(v), cy=y, r=2.5) for v in row.values),
                tag("circle", class_="dot c0", cx=at(row.mean), cy=y, r=5),
            )
        )
    return _figure(caption, parts, height)


def difference_intervals(rows: Mapping[str, Any], other: str, caption: str) -> Markup:
    """The student's difference from one other system under every measure of a split of `evaluation/table.json`."""
    shown = []
    for name, row in rows.items():
        d = row["student_minus"][other]
        hint = f"{name}: {d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}], corrected p {d['p_holm']:.4f}"
        shown.append(Interval(name, d["mean"], d["low"], d["high"], (), hint))
    return intervals(shown, caption=caption, zero=True)


def system_intervals(cells: Mapping[str, Any], caption: str) -> Markup:
    """The systems of `compare/table.json` under one measure, with the value of each seed."""
    rows = [Interval(name, c["mean"], c["low"], c["high"], c["seeds"]) for name, c in cells.items()]
    return intervals(rows, caption=caption)


def histogram(values: Sequence[float], *, caption: str, x: str, bins: int = 21) -> Markup:
    """How often each difference occurs; losses and wins have colours of their own. The height of a bar is the square
    root of the count, so that a few queries stay visible beside many unchanged ones."""
    good = [v for v in values if math.isfinite(v)]
    if not good:
        return Markup("")
    reach = max(abs(v) for v in good)
    if reach < 1e-6:  # all equal, up to rounding: an axis as narrow as that has no readable ends
        reach = 1.0
    counts = [0] * bins
    for v in good:
        counts[min(bins - 1, int((v + reach) / (2 * reach) * bins))] += 1
    height, wide = 170, (_WIDTH - 2 * _RIGHT) / bins
    base = height - 24
    parts = []
    for i, count in enumerate(counts):
        a, b = -reach + 2 * reach * i / bins, -reach + 2 * reach * (i + 1) / bins
        tall = (height - 50) * math.sqrt(count / max(counts))
        kind = "same" if a < 0 < b else ("loss" if b <= 0 else "win")
        left = _RIGHT + i * wide
        parts.append(
            _hover(
                f"{count:,} queries from {a:+.3f} to {b:+.3f}",
                tag("rect", class_="hit", x=left, y=0, width=wide, height=base),
                tag("rect", class_=f"bar {kind}", x=left + 1, y=base - tall, width=wide - 2, height=tall, rx=2),
                *([_label(f"{count:,}", left + wide / 2, base - 5 - tall)] if count else []),
            )
        )
    for tick, anchor, px in ((-reach, "start", _RIGHT), (0.0, "middle", _WIDTH / 2), (reach, "end", _WIDTH - _RIGHT)):
        parts.append(_label(number(tick), px, height - 7, anchor))
    return _figure(caption, parts, height, label=f"{caption}, {x}")


def parallel(axes: Sequence[Axis], *, best: int, names: Sequence[str], caption: str) -> Markup:
    """Parallel coordinates: a line a trial through its value on each axis, the better by the last axis the stronger.
    Line number `best` stands out. The values of a line are shown on hover."""
    if len(axes) < 2 or not names:
        return Markup("")
    top, bottom, side = 34, 26, 60
    up = _Scale(0, 1, _HEIGHT - bottom, top + bottom - _HEIGHT)
    places_x = [side + i * (_WIDTH - 2 * side) / (len(axes) - 1) for i in range(len(axes))]
    parts = []
    for px, axis in zip(places_x, axes, strict=True):
        parts.append(tag("line", class_="grid", x1=px, x2=px, y1=top, y2=_HEIGHT - bottom))
        parts.append(_label(axis.name, px, top - 18, kind="name"))
        ends = sorted(zip(axis.places, axis.values, strict=True))
        parts += [_label(text, px, up(place) + dy) for (place, text), dy in ((ends[0], 14), (ends[-1], -5))]
    for n in sorted(range(len(names)), key=lambda n: (n == best, axes[-1].places[n])):
        points = " ".join(f"{px:.1f},{up(axis.places[n]):.1f}" for px, axis in zip(places_x, axes, strict=True))
        strength = 1.0 if n == best else 0.15 + 0.55 * axes[-1].places[n]
        kind = "line c1" if n == best else "line c0"
        hint = f"{names[n]}: " + ", ".join(f"{axis.name} {axis.values[n]}" for axis in axes)
        parts.append(_hover(hint, tag("polyline", class_=kind, points=points, opacity=f"{strength:.2f}")))
    return _figure(caption, parts)


def scatter(
    points: Sequence[tuple[float, float, str]], *, x: str, y: str, logarithmic: bool = False, labels: Sequence[str] = ()
) -> Markup:
    """Points with a text each on hover; `labels` names the places 0, 1, 2, ... where x is not a number."""
    good = [(math.log10(a) if logarithmic else a, b, text) for a, b, text in points]
    if not good:
        return Markup("")
    width, height = _WIDTH // 2, 200
    low, high = min(p[0] for p in good), max(p[0] for p in good)
    low, high = (low - 0.5, high + 0.5) if high == low or labels else (low, high)
    y_low, y_high = min(p[1] for p in good), max(p[1] for p in good)
    y_low, y_high = (y_low, y_high) if y_high > y_low else (y_low - 0.5, y_high + 0.5)
    across = _Scale(low, high, _LEFT, width - _LEFT - _RIGHT)
    up = _Scale(y_low, y_high, height - _BOTTOM, _TOP + _BOTTOM - height)
    parts = [_across(up(tick), width - _RIGHT, number(tick)) for tick in ticks(y_low, y_high, 4)]
    if labels:
        marks = [(float(i), text) for i, text in enumerate(labels)]
    elif logarithmic:
        marks = [(v, number(10**v)) for v in (low, (low + high) / 2, high)]
    else:
        marks = [(v, number(v)) for v in ticks(low, high, 4)]
    parts += [_label(text, across(v), height - _BOTTOM + 16) for v, text in marks]
    parts += [_hover(text, tag("circle", class_="dot c0", cx=across(a), cy=up(b), r=4)) for a, b, text in good]
    return _figure(x, parts, height, width=width, kind="plot small", label=f"{y} by {x}")
