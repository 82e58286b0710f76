"""What the labels of a run look like, measured over a sample of its training queries. Needs no Ray."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ckd_ray.inspection.labelled_run import LabelledRun

KINDS = ("one_hot", "teacher", "collective")
RELEVANT = 0.1  # the probability from which a label calls an unlabelled passage relevant, as `label --suggest` does


def summarize_labels(opened: LabelledRun, sample: int = 50) -> dict[str, Any]:
    """Compare the kinds of labels over the top `distill.negatives_depth` of the ranking and the labelled passages.

    Args:
        sample: labelled queries to measure, evenly spaced over the training queries.

    Returns:
        `queries` (ids of the sample), `raising` (ids of those to which collective labels add a relevant passage),
        `labelled_queries`, `candidates` (passages a query, mean), `threshold`, and `kinds`: kind -> means over the
        queries of `entropy` (nats), `entropy_share` (of that of equal probabilities), `label_mass` (the probability of
        the labelled passages), `relevant` (unlabelled passages of at least `threshold`), and `share` (of the queries
        that have such a passage).
    """
    labelled_queries = opened.positives.labelled_queries
    chosen = labelled_queries[np.unique(np.linspace(0, len(labelled_queries) - 1, sample).astype(int))]
    rows: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in KINDS}
    sizes = []
    for query in chosen.tolist():
        passages = opened.with_labelled(query, opened.rankings[query][: opened.settings.negatives_depth])
        unlabelled = ~np.isin(passages, opened.positives.of(query))
        found = opened.distributions(query, passages)
        sizes.append(len(passages))
        for kind in KINDS:
            p = getattr(found, kind).numpy()
            entropy = float(-(p[p > 0] * np.log(p[p > 0])).sum())
            relevant = int((p[unlabelled] >= RELEVANT).sum())
            highest = math.log(len(p)) if len(p) > 1 else 1.0
            rows[kind].append((entropy, entropy / highest, float(p[~unlabelled].sum()), relevant, relevant > 0))
    names = ("entropy", "entropy_share", "label_mass", "relevant", "share")
    ids = [opened.queries.ids[query] for query in chosen]
    measured = [(kind, found) for kind, found in rows.items() if found]
    return {
        "queries": ids,
        "raising": [query for query, row in zip(ids, rows["collective"], strict=True) if row[-1]],
        "labelled_queries": len(labelled_queries),
        "candidates": float(np.mean(sizes)) if sizes else 0.0,
        "threshold": RELEVANT,
        "kinds": {kind: dict(zip(names, np.mean(found, axis=0).tolist(), strict=True)) for kind, found in measured},
    }
