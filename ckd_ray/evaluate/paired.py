"""Two systems on the same queries: the table *teacher against student*, and any run against any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ckd_ray.errors import UserError
from ckd_ray.evaluate.significance import aligned, paired_difference

PerQuery = Mapping[str, Mapping[str, float]]  # measure -> query id -> value


def compare_values(first: PerQuery, second: PerQuery, names: tuple[str, str]) -> dict[str, Any]:
    """For each measure of both: the two means under `names`, the number of queries, and the difference second - first
    with its p and 95 % interval.

    Raises:
        ValueError: the two were measured on different queries (`same_queries` tells users).
    """
    rows = {}
    for measure in (m for m in second if m in first):
        b, a = aligned({names[1]: second[measure], names[0]: first[measure]}).values()
        rows[measure] = {
            names[0]: float(a.mean()) if len(a) else 0.0,
            names[1]: float(b.mean()) if len(b) else 0.0,
            "queries": len(a),
            **{f"difference_{key}": value for key, value in asdict(paired_difference(a, b)).items()},
        }
    return rows


def same_queries(first: PerQuery, second: PerQuery, where: str) -> None:
    """Raise UserError, with numbers, when two runs were measured on different queries."""
    a, b = ({q for values in side.values() for q in values} for side in (first, second))
    if a == b:
        return
    only_a, only_b = sorted(a - b), sorted(b - a)
    examples = ", ".join([*only_a[:2], *only_b[:2]])
    raise UserError(
        "the two runs were measured on different queries, so they cannot be compared query by query",
        where=where,
        expected="the same query ids in both",
        found=f"{len(a & b):,} in both, {len(only_a):,} only here, {len(only_b):,} only there (such as {examples})",
        fix="evaluate both runs on the same collection and splits",
    )


def render(comparison: Mapping[str, Any], names: tuple[str, str]) -> str:
    """Plain text, a block for each split."""
    lines = []
    for split, rows in comparison.items():
        if not rows:
            continue
        queries = next(iter(rows.values()))["queries"]
        widths = [max(9, len(name) + 2) for name in names]
        heads = "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
        lines.append(f"{split} ({queries:,} queries)")
        lines.append(f"  {'measure':<12}{heads}{'difference':>12}   {'95 % interval':<20}{'p':>7}")
        for name, row in rows.items():
            interval = f"[{row['difference_low']:+.4f}, {row['difference_high']:+.4f}]"
            values = "".join(f"{row[n]:>{width}.4f}" for n, width in zip(names, widths, strict=True))
            lines.append(
                f"  {name:<12}{values}{row['difference_mean']:>+12.4f}   {interval:<20}{row['difference_p']:>7.4f}"
            )
    return "\n".join(lines)
