"""The section about the trials of `ckd-ray tune`. Texts from outside go through `escape`."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from ckd_ray.progress import duration
from ckd_ray.report.facts import Facts
from ckd_ray.report.plots import Axis, number, parallel, scatter


def search(facts: Facts) -> str:
    """The trials of `ckd-ray tune`: what was best, parallel coordinates, a slice and the importance of every key."""
    found = facts.search
    if not found:
        return ""
    measured = [t for t in found["trials"] if t["mrr@10"] is not None]
    keys = list(found["default"])
    best = found["best"]["trial"]
    rows = "".join(_trial_row(trial, keys, best) for trial in found["trials"])
    heads = "".join(f"<th>{escape(key)}" for key in keys)
    scales = {key: _scale([t[key] for t in measured]) for key in keys}
    axes = [Axis(key.partition(".")[2], *scales[key][:2]) for key in keys]
    values = [t["mrr@10"] for t in measured]
    span = (max(values) - min(values) or 1.0) if values else 1.0
    axes.append(Axis("MRR@10", [(v - min(values)) / span for v in values], [f"{v:.4f}" for v in values]))
    drawn = parallel(
        axes,
        best=next((i for i, t in enumerate(measured) if t["trial"] == best), -1),
        names=[f"trial {t['trial']}" for t in measured],
        caption="All trials, the better the stronger; MRR@10 on the dev queries of the search",
    )
    slices = "".join(
        scatter(
            [(x, t["mrr@10"], _hint(t, key)) for x, t in zip(xs, measured, strict=True)],
            x=f"{key}, importance {found['importance'][key]:.2f}" if found.get("importance") else key,
            y="MRR@10",
            logarithmic=log,
            labels=labels,
        )
        for key, (_, _, xs, log, labels) in scales.items()
    )
    changed = [f"{k} {number_or(v)} ({number_or(found['default'][k])})" for k, v in found["best"].items()
               if k in keys and v != found["default"][k]]  # fmt: skip
    said = f"trial {best}: " + (", ".join(changed) or "the configuration as it is")
    agreement = found.get("agreement")
    first = (
        f" How well label settings do without training agrees with how well their students do by "
        f"{agreement['spearman']} (Spearman, {agreement['combinations']} settings)."
        if agreement
        else ""
    )
    return (
        f"<p>Best of {len(found['trials'])} trials, the configured value in brackets: {escape(said)}. The search took "
        f"{100 * (1 - found['saved']['share']):.0f} % of the time of as many whole pipelines.{escape(first)}</p>{drawn}"
        f"<div class=slices>{slices}</div><div class=scroll><table class=sortable><thead><tr><th>trial{heads}<th>steps"
        f"<th>MRR@10<th>time<th class=l>state</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _trial_row(trial: dict[str, Any], keys: list[str], best: int) -> str:
    cells = "".join(f"<td>{escape(number_or(trial[key]))}</td>" for key in keys)
    value = "" if trial["mrr@10"] is None else f"{trial['mrr@10']:.4f}"
    state = "best" if trial["trial"] == best else trial["state"]
    state += f": {trial['cause']}" if trial["cause"] else ""
    seconds = trial["seconds"]
    return (
        f"<tr><td>{escape(str(trial['trial']))}</td>{cells}<td>{trial['steps']:,}</td><td>{value}</td>"
        f"<td data-v={seconds:.1f}>{escape(duration(seconds))}</td><td class=l>{escape(state)}</td></tr>"
    )


def _hint(trial: dict[str, Any], key: str) -> str:
    return f"trial {trial['trial']}: {number_or(trial[key])}, MRR@10 {trial['mrr@10']:.4f}"


def number_or(value: Any) -> str:
    """A number in four digits, anything else as it is."""
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _scale(values: list[Any]) -> tuple[list[float], list[str], list[float], bool, list[str]]:
    """Of a key's values: places from 0 to 1, texts, x of a slice, whether that is logarithmic, and names of places."""
    texts = [number_or(v) for v in values]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if not numbers or len(set(values)) <= 5:
        order = sorted(set(values), key=lambda v: (v if numbers else 0, str(v)))
        xs = [float(order.index(v)) for v in values]
        return [x / max(1, len(order) - 1) for x in xs], texts, xs, False, [number_or(v) for v in order]
    log = min(values) > 0 and max(values) / min(values) > 20
    scaled = [math.log10(v) if log else float(v) for v in values]
    span = (max(scaled) - min(scaled)) or 1.0
    return [(v - min(scaled)) / span for v in scaled], texts, [float(v) for v in values], log, []
