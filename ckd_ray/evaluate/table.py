"""The closing table: what a user would pick instead (the encoder as it is, BM25), the teacher and the student.

Each system has its mean with a 95 % bootstrap interval, and the student's difference from each has a paired test.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from ckd_ray.evaluate.measures import Measures
from ckd_ray.evaluate.significance import bootstrap_interval, holm, paired_difference

TABLE = "table.json"  # in evaluation/
STUDENT = "student"
# In the order of the table, with the names that people read.
SYSTEMS = {"encoder": "encoder as it is", "bm25": "BM25", "teacher": "teacher", STUDENT: "student"}
_CHANCE = 0.05
NOTE = (
    "interval: 95 % bootstrap over queries; p: paired randomisation test of the difference,",
    "Holm-corrected over the comparisons of one measure and split",
)


def build_table(found: Mapping[str, Mapping[str, Measures]]) -> dict[str, Any]:
    """What `evaluation/table.json` holds.

    Args:
        found: split -> system -> measures; every system was measured on the same queries.

    Returns:
        `splits`: split -> measure -> `systems` (of each its mean, low, high and n) and `student_minus` (of each other
        system the difference's mean, low, high, p and p_holm); and `verdict`, see `verdict_of`.

    Raises:
        ValueError: two systems of a split were measured on different queries.
    """
    splits = {
        split: {name: _row(name, systems) for name in next(iter(systems.values())).mean}
        for split, systems in found.items()
        if systems
    }
    return {"splits": splits, "verdict": verdict_of(splits)}


def _row(measure: str, systems: Mapping[str, Measures]) -> dict[str, Any]:
    shown = {name: systems[name].per_query[measure] for name in SYSTEMS if name in systems}
    queries = list(next(iter(shown.values())))
    if any(set(per_query) != set(queries) for per_query in shown.values()):
        raise ValueError(f"{measure}: {', '.join(shown)} were not measured on the same queries")
    values = {name: np.array([per_query[q] for q in queries], np.float64) for name, per_query in shown.items()}
    means = {}
    for name, values_N in values.items():
        low, high = bootstrap_interval(values_N[None])
        mean = float(values_N.mean()) if queries else 0.0
        means[name] = {"mean": mean, "low": low, "high": high, "n": len(queries)}
    others = [name for name in values if name != STUDENT] if STUDENT in values else []
    tests = {name: asdict(paired_difference(values[name], values[STUDENT])) for name in others}
    corrected = dict(zip(others, holm([test["p"] for test in tests.values()]), strict=True))
    differences = {name: {**test, "p_holm": corrected[name]} for name, test in tests.items()}
    return {"systems": means, "student_minus": differences}


def verdict_of(splits: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Whether the student is better than the encoder as it is, on the first measure of dev (of the first split where
    there is no dev). None where one of them was not measured.

    Returns:
        `better` (the higher mean), `split`, `measure`, the means `student` and `encoder`, `difference`, the corrected
        `p`, and `text`, which says it in plain words.
    """
    split = "dev" if "dev" in splits else next(iter(splits), None)
    if split is None or not splits[split]:
        return None
    measure, row = next(iter(splits[split].items()))
    difference = row["student_minus"].get("encoder")
    if difference is None:
        return None
    student, encoder = (row["systems"][name]["mean"] for name in (STUDENT, "encoder"))
    better = difference["mean"] > 0
    figures = f"{measure} {student:.4f} against {encoder:.4f} on {split}"
    figures += f" ({difference['mean']:+.4f}, p {_p(difference)})"
    if not better:
        text = (
            f"The student is not better than the encoder as it is: {figures}. Use the encoder for now. To get a better"
            " student, search for settings (ckd-ray tune), train longer (distill.steps) or label more queries."
        )
    elif difference["p_holm"] >= _CHANCE:
        text = f"The student is ahead of the encoder as it is by no more than chance would explain: {figures}."
    else:
        text = f"The student is better than the encoder as it is: {figures}."
    return {
        "better": better,
        "split": split,
        "measure": measure,
        "student": student,
        "encoder": encoder,
        "difference": difference["mean"],
        "p": difference["p_holm"],
        "text": text,
    }


def _p(difference: Mapping[str, Any]) -> str:
    return f"{difference['p_holm']:.4f}"


def render_table(table: Mapping[str, Any]) -> str:
    """Plain text of at most 100 columns: one block a split and measure, what the columns mean, and what is left out."""
    if not table["splits"]:
        return "no evaluation split, so nothing was measured"
    lines = []
    for split, rows in table["splits"].items():
        if not rows:
            continue
        queries = next(iter(next(iter(rows.values()))["systems"].values()))["n"]
        lines.append(f"{split} ({queries:,} queries)")
        for measure, row in rows.items():
            head = f"  {measure:<18}{'mean':>8}   {'95 % interval':<18}"
            if row["student_minus"]:
                head += f"{'student minus it':>16}   {'95 % interval':<20}{'p':>7}"
            lines.append(head.rstrip())
            lines += [_line(name, cell, row["student_minus"].get(name)) for name, cell in row["systems"].items()]
    lines += NOTE
    lines += [f"{SYSTEMS.get(name, name)}: left out: {why}" for name, why in table.get("left_out", {}).items()]
    return "\n".join(lines)


def _line(name: str, cell: Mapping[str, Any], difference: Mapping[str, Any] | None) -> str:
    text = f"  {SYSTEMS[name]:<18}{cell['mean']:>8.4f}   [{cell['low']:.4f}, {cell['high']:.4f}]"
    if difference is not None:
        interval = f"[{difference['low']:+.4f}, {difference['high']:+.4f}]"
        text += f"{difference['mean']:>+16.4f}   {interval:<20}{_p(difference):>7}"
    return text
