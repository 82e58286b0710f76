"""What the page shows of the trials of `ckd-ray tune`."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from ckd_ray.report.plots import Axis, number, parallel, scatter


def in_words(value: Any) -> str:
    """A number in four digits, anything else as it is."""
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def changed_by_search(search: dict[str, Any]) -> list[str]:
    """The settings of the best trial that differ from the configuration, which stands in brackets."""
    best, default = search["best"], search["default"]
    keys = [key for key in best if key in default and best[key] != default[key]]
    return [f"{key} {in_words(best[key])} ({in_words(default[key])})" for key in keys]


def parallel_trials(search: dict[str, Any]) -> Markup:
    """All trials that were measured, in parallel coordinates."""
    measured = [t for t in search["trials"] if t["mrr@10"] is not None]
    axes = []
    for key in search["default"]:
        places, texts, *_ = _scale([t[key] for t in measured])
        axes.append(Axis(key.partition(".")[2], places, texts))
    values = [t["mrr@10"] for t in measured]
    span = (max(values) - min(values) or 1.0) if values else 1.0
    axes.append(Axis("MRR@10", [(v - min(values)) / span for v in values], [f"{v:.4f}" for v in values]))
    return parallel(
        axes,
        best=next((i for i, t in enumerate(measured) if t["trial"] == search["best"]["trial"]), -1),
        names=[f"trial {t['trial']}" for t in measured],
        caption="All trials, the better the stronger; MRR@10 on the dev queries of the search",
    )


def slices(search: dict[str, Any]) -> list[Markup]:
    """MRR@10 by the value of each key, with the importance of the key."""
    measured = [t for t in search["trials"] if t["mrr@10"] is not None]
    drawn = []
    for key in search["default"]:
        _, texts, xs, logarithmic, labels = _scale([t[key] for t in measured])
        points = [
            (x, t["mrr@10"], f"trial {t['trial']}: {text}, MRR@10 {t['mrr@10']:.4f}")
            for x, text, t in zip(xs, texts, measured, strict=True)
        ]
        title = f"{key}, importance {search['importance'][key]:.2f}" if search.get("importance") else key
        drawn.append(scatter(points, x=title, y="MRR@10", logarithmic=logarithmic, labels=labels))
    return drawn


def _scale(values: list[Any]) -> tuple[list[float], list[str], list[float], bool, list[str]]:
    """Of the values of a key: places from 0 to 1, texts, x of a slice, whether x is logarithmic, names of places."""
    texts = [in_words(v) for v in values]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers or len(set(values)) <= 5:
        order = sorted(set(values), key=lambda v: (v if numbers else 0, str(v)))
        xs = [float(order.index(v)) for v in values]
        return [x / max(1, len(order) - 1) for x in xs], texts, xs, False, [in_words(v) for v in order]
    log = min(values) > 0 and max(values) / min(values) > 20
    scaled = [math.log10(v) if log else float(v) for v in values]
    span = (max(scaled) - min(scaled)) or 1.0
    return [(v - min(scaled)) / span for v in scaled], texts, [float(v) for v in values], log, []
