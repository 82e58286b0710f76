"""Names of measures: ir-measures' own, and MRR, which it calls RR."""

from __future__ import annotations

from typing import Any


def parse_measure(name: str, relevance_threshold: int = 1) -> Any:
    """The ir-measures measure of that name.

    Binary measures count grades from `relevance_threshold` on, unless the name sets `rel` itself; nDCG keeps the
    grades.

    Raises:
        ValueError: ir-measures knows no such measure.
    """
    import ir_measures

    spelled = name.strip()
    if spelled.upper().startswith("MRR"):
        spelled = "RR" + spelled[3:]
    try:
        measure = ir_measures.parse_measure(spelled)
    except (NameError, ValueError, SyntaxError) as error:
        known = ", ".join(sorted({"MRR"} | set(ir_measures.measures.registry)))
        raise ValueError(f"unknown measure {name!r}; ir-measures knows {known}, with @K for a cutoff") from error
    if relevance_threshold > 1 and "rel" in measure.SUPPORTED_PARAMS and "rel" not in measure.params:
        measure = measure(rel=relevance_threshold)
    return measure
