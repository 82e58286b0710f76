"""The table *teacher against student*."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from ckd_ray.evaluate.measures import Measures
from ckd_ray.evaluate.significance import paired_difference


def compare(teacher: Measures, student: Measures) -> dict[str, Any]:
    """For each measure: teacher, student, and the paired difference with its p and 95 % interval."""
    rows = {}
    for name in student.mean:
        queries = list(student.per_query[name])
        a = np.array([teacher.per_query[name].get(q, 0.0) for q in queries])
        b = np.array([student.per_query[name][q] for q in queries])
        rows[name] = {
            "teacher": teacher.mean[name],
            "student": student.mean[name],
            "queries": len(queries),
            **{f"difference_{key}": value for key, value in asdict(paired_difference(a, b)).items()},
        }
    return rows


def render(comparison: dict[str, Any] | None) -> str:
    """Plain text, one block a split."""
    if not comparison:
        return "no evaluation split, so nothing was measured"
    lines = []
    for split, rows in comparison.items():
        queries = next(iter(rows.values()))["queries"]
        lines.append(f"{split} ({queries:,} queries)")
        lines.append(f"  {'measure':<12}{'teacher':>9}{'student':>9}{'difference':>12}   {'95 % interval':<20}{'p':>7}")
        for name, row in rows.items():
            interval = f"[{row['difference_low']:+.4f}, {row['difference_high']:+.4f}]"
            lines.append(
                f"  {name:<12}{row['teacher']:>9.4f}{row['student']:>9.4f}{row['difference_mean']:>+12.4f}   "
                f"{interval:<20}{row['difference_p']:>7.4f}"
            )
    return "\n".join(lines)
