"""Names of measures: ir-measures' own, and MRR, which it calls RR."""

from __future__ import annotations

import math
from typing import Any

# trec_eval or ir-measures itself computes these for any ids, so `cannot_compute` does not try them.
_USUAL = ("RR", "nDCG", "R", "P", "AP", "Success")


def parse_measure(name: str, relevance_threshold: float = 1) -> Any:
    """The ir-measures measure of that name.

    Binary measures count grades from `relevance_threshold` on, unless the name sets `rel` itself; nDCG keeps the
    grades.

    Raises:
        ValueError: ir-measures does not know the measure. A known one may still be impossible to compute, see
            `cannot_compute`.
    """
    import ir_measures

    spelled = name.strip()
    if spelled.upper().startswith("MRR"):
        spelled = "RR" + spelled[3:]
    try:
        measure = ir_measures.parse_measure(spelled)
    except (NameError, ValueError, SyntaxError) as error:
        known = ", ".join(computed())
        raise ValueError(f"unknown measure {name!r}; known are {known}, with @K for a cutoff") from error
    threshold = math.ceil(relevance_threshold)
    if threshold > 1 and "rel" in measure.SUPPORTED_PARAMS and "rel" not in measure.params:
        measure = measure(rel=threshold)
    return measure


def cannot_compute(measure: Any) -> str | None:
    """Why a measure cannot be computed here; None if it can. Unusual measures are tried on one passage."""
    import ir_measures

    if measure.NAME in _USUAL and set(measure.params) <= {"cutoff", "rel"} and measure.params.get("rel", 1) >= 1:
        return None
    import pandas as pd

    qrels = pd.DataFrame({"query_id": ["q"], "doc_id": ["p"], "relevance": [1]})
    run = pd.DataFrame({"query_id": ["q", "q"], "doc_id": ["p", "other"], "score": [2.0, 1.0]})
    try:
        able = [p for p in ir_measures.DefaultPipeline.providers if p.is_available() and p.supports(measure)]
        if not able:
            return "nothing that is installed here does"
        if able[0].NAME == "gdeval":  # a Perl script that would write errors to the terminal
            return "gdeval computes it, which fails on query ids that are not numbers"
        list(ir_measures.iter_calc([measure], qrels, run))
    except Exception as error:  # whatever a provider raises
        return " ".join(str(error).split()) or type(error).__name__
    return None


def computed() -> list[str]:
    """The names of measures that can be computed here, with or without a cutoff."""
    import ir_measures

    def works(measure: Any) -> bool:
        return cannot_compute(measure) is None

    known = ir_measures.measures.registry
    return sorted({"MRR", *(name for name, measure in known.items() if works(measure) or works(measure @ 10))})
