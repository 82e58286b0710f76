"""The closing table: the alternatives of a user (the encoder as it is, BM25), the teacher and the student.

Each system has its mean with a 95 % bootstrap interval. A paired test compares the student with each other system.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ckd_ray.evaluate.measures import Measures
from ckd_ray.evaluate.significance import aligned, bootstrap_interval, holm, paired_difference

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
    """The contents of `evaluation/table.json`.

    Args:
        found: split -> system -> measures, all on the same queries.

    Returns:
        `splits`: split -> measure -> `systems` (the mean, low, high and n of each) and `student_minus` (the mean, low,
        high, p and p_holm of the student's difference from each other system); and `verdict`, see `verdict_of`.

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
    values = aligned({name: systems[name].per_query[measure] for name in SYSTEMS if name in systems})
    means = {}
    for name, values_N in values.items():
        low, high = bootstrap_interval(values_N[None])
        mean = float(values_N.mean()) if len(values_N) else 0.0
        means[name] = {"mean": mean, "low": low, "high": high, "n": len(values_N)}
    others = [name for name in values if name != STUDENT] if STUDENT in values else []
    tests = {name: asdict(paired_difference(values[name], values[STUDENT])) for name in others}
    for test, corrected in zip(tests.values(), holm([test["p"] for test in tests.values()]), strict=True):
        test["p_holm"] = corrected
    return {"systems": means, "student_minus": tests}


def verdict_of(splits: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Whether the student is better than the encoder as it is, by the first measure of the split with the most queries
    (dev of equals), where chance plays the smallest part. None where one of them was not measured.

    Returns:
        `better` (the higher mean), `split`, `measure`, the means `student` and `encoder`, `difference`, the corrected
        `p`, and `text`, a sentence for the user.
    """
    first = {split: next(iter(rows.items())) for split, rows in splits.items() if rows}
    tested = {split: row for split, (_, row) in first.items() if "encoder" in row["student_minus"]}
    if not tested:
        return None
    split = max(tested, key=lambda name: (tested[name]["systems"][STUDENT]["n"], name == "dev"))
    measure, row = first[split]
    difference = row["student_minus"]["encoder"]
    student, encoder = (row["systems"][name]["mean"] for name in (STUDENT, "encoder"))
    better = difference["mean"] > 0
    figures = f"{measure} {student:.4f} against {encoder:.4f} on {split}"
    figures += f" ({difference['mean']:+.4f}, p {difference['p_holm']:.4f})"
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


def render_table(table: Mapping[str, Any]) -> str:
    """Plain text of at most 100 columns: a block for each split and measure, a legend, and what was left out."""
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
        text += f"{difference['mean']:>+16.4f}   {interval:<20}{difference['p_holm']:>7.4f}"
    return text
