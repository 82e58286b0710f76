"""The closing table on the page: the encoder as it is, BM25, the teacher and the student, as HTML.

Every text from outside (names of measures and splits, reasons) goes through `escape`.
"""

from __future__ import annotations

from html import escape
from typing import Any

from ckd_ray.evaluate.table import STUDENT, SYSTEMS
from ckd_ray.report.facts import Facts
from ckd_ray.report.plots import Interval, intervals


def worth(facts: Facts) -> str:
    """Whether the student is better than the encoder as it is."""
    verdict = (facts.closing or {}).get("verdict")
    if not verdict:
        return ""
    kind = "" if verdict["better"] else " class=down"
    return f"<p{kind}><b>{escape(verdict['text'])}</b></p>"


def systems(facts: Facts) -> str:
    """Every system with its means and intervals, the other systems first: what a user would have without the run."""
    closing = facts.closing or {}
    parts = []
    for split, rows in closing.get("splits", {}).items():
        names = list(next(iter(rows.values()))["systems"]) if rows else []
        if not names:
            continue
        heads = "".join(f"<th>{escape(measure)}" for measure in rows)
        body = "".join(
            f"<tr><td class=l>{escape(SYSTEMS.get(name, name))}</td>"
            + "".join(f"<td>{_with_interval(row['systems'][name])}</td>" for row in rows.values())
            + "</tr>"
            for name in names
        )
        queries = rows[next(iter(rows))]["systems"][names[0]]["n"]
        parts.append(
            f"<h3>{escape(split)} ({queries:,} queries)</h3><div class=scroll><table><thead><tr><th class=l>system"
            f"{heads}</tr></thead><tbody>{body}</tbody></table></div>"
        )
    missing = "".join(
        f"<p class=note>{escape(SYSTEMS.get(name, name))} is left out: {escape(str(why))}</p>"
        for name, why in closing.get("left_out", {}).items()
    )
    return "".join(parts) + missing


def _with_interval(cell: dict[str, Any]) -> str:
    return f"{cell['mean']:.4f} <span class=soft>[{cell['low']:.4f}, {cell['high']:.4f}]</span>"


def differences(facts: Facts) -> str:
    """The student's difference from every other system, split by split, with the differences drawn."""
    parts = []
    for split, rows in (facts.closing or {}).get("splits", {}).items():
        against = list(next(iter(rows.values()))["student_minus"]) if rows else []
        if not against:
            continue
        body = "".join(
            f"<tr><td class=l>{escape(name)}</td><td class=l>{escape(SYSTEMS.get(other, other))}</td>"
            f"<td>{row['systems'][other]['mean']:.4f}</td><td>{row['systems'][STUDENT]['mean']:.4f}</td>"
            f"<td>{d['mean']:+.4f}</td><td>[{d['low']:+.4f}, {d['high']:+.4f}]</td>"
            f"<td>{d['p']:.4f}</td><td>{d['p_holm']:.4f}</td></tr>"
            for name, row in rows.items()
            for other, d in row["student_minus"].items()
        )
        drawn = "".join(
            intervals(
                [
                    Interval(name, d["mean"], d["low"], d["high"], (), _hint(name, d))
                    for name, d in ((name, row["student_minus"][other]) for name, row in rows.items())
                ],
                caption=f"Student minus {SYSTEMS.get(other, other)}, 95 % interval",
                zero=True,
            )
            for other in against
        )
        queries = next(iter(rows.values()))["systems"][STUDENT]["n"]
        parts.append(
            f"<h3>{escape(split)} ({queries:,} queries)</h3><div class=scroll><table class=sortable>"
            "<thead><tr><th class=l>measure<th class=l>other system<th>its mean<th>student<th>difference"
            f"<th>95 % interval<th>p<th>corrected p</tr></thead><tbody>{body}</tbody></table></div>"
            f"<div class=two>{drawn}</div>"
        )
    return "".join(parts)


def _hint(name: str, d: dict[str, Any]) -> str:
    return f"{name}: {d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}], corrected p {d['p_holm']:.4f}"
