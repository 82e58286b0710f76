"""Measures of a ranking, computed by ir-measures (and trec_eval)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ckd_ray.config.measures import parse_measure


@dataclass(frozen=True)
class Measures:
    """Values by the measure's name in the configuration: `mean`, and `per_query` (name -> query id -> value)."""

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]

    @classmethod
    def of(cls, per_query: dict[str, dict[str, float]]) -> Measures:
        """The measures with their means; the mean over no query is 0."""
        mean = {name: float(np.mean(list(v.values()))) if v else 0.0 for name, v in per_query.items()}
        return cls(mean, per_query)


def measure_run(
    run: pd.DataFrame, qrels: pd.DataFrame, measures: Sequence[str], relevance_threshold: float = 1
) -> Measures:
    """Measure a run.

    Every query with at least one label counts. A query without results, or without a relevant label, has the value 0
    (trec_eval's convention with -c). trec_eval orders equal scores by id, so scores should fall with the rank
    (`falling_scores`).

    Args:
        run: columns query_id, doc_id, score.
        qrels: columns query_id, doc_id, relevance. Fractions, which trec_eval does not take, become 1 from the
            threshold on and 0 below it.
        measures: names of ir-measures, or MRR@K.
        relevance_threshold: the grade from which binary measures count a passage as relevant; nDCG keeps the grades.
    """
    import ir_measures

    if pd.api.types.is_float_dtype(qrels["relevance"]):
        relevant = (qrels["relevance"] >= relevance_threshold).astype(int)
        qrels, relevance_threshold = qrels.assign(relevance=relevant), 1
    parsed = {name: parse_measure(name, relevance_threshold) for name in measures}
    queries = list(dict.fromkeys(qrels["query_id"]))
    per_query: dict[str, dict[str, float]] = {name: dict.fromkeys(queries, 0.0) for name in measures}
    names: dict[str, list[str]] = {}
    for name, measure in parsed.items():
        names.setdefault(str(measure), []).append(name)
    if len(run) and len(qrels):
        for value in ir_measures.iter_calc(list(dict.fromkeys(parsed.values())), qrels, run):
            for name in names[str(value.measure)]:
                if value.query_id in per_query[name]:
                    per_query[name][value.query_id] = float(value.value)
    return Measures.of(per_query)


def measure_parts(
    parts: Iterable[tuple[pd.DataFrame, pd.DataFrame]], measures: Sequence[str], relevance_threshold: float = 1
) -> Measures:
    """`measure_run` of a run in parts: (run, qrels) of some queries each, every query in a single part.

    One part is in memory at a time; one number is kept for each query and measure.
    """
    per_query: dict[str, dict[str, float]] = {name: {} for name in measures}
    for run, qrels in parts:
        for name, values in measure_run(run, qrels, measures, relevance_threshold).per_query.items():
            per_query[name] |= values
    return Measures.of(per_query)
