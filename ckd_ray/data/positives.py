"""The labelled passages of queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckd_ray.arrays import Float64Array, Int64Array


@dataclass(frozen=True)
class Positives:
    """The labelled passages of every query of a split, in compressed rows.

    Attributes:
        offsets: (num_queries + 1,) int64; passages: flat int64, dense passage indices.
    """

    offsets: Int64Array
    passages: Int64Array

    @classmethod
    def from_qrels(
        cls,
        num_queries: int,
        query_index: Int64Array,
        passage_index: Int64Array,
        relevance: Int64Array | Float64Array,
        grade: float,
    ) -> Positives:
        """Labels with `relevance >= grade`; a query may end up with none."""
        chosen = relevance >= grade
        queries, passages = query_index[chosen].astype(np.int64), passage_index[chosen].astype(np.int64)
        order = np.lexsort((passages, queries))
        counts = np.bincount(queries, minlength=num_queries)
        return cls(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), passages[order])

    def of(self, query: int) -> Int64Array:
        """The labelled passages of one query."""
        return self.passages[self.offsets[query] : self.offsets[query + 1]]

    def queries_of(self, passages: Sequence[int]) -> Int64Array:
        """The queries that have a label for one of these passages, ascending."""
        at = np.flatnonzero(np.isin(self.passages, list(passages)))
        return np.unique(np.searchsorted(self.offsets, at, side="right") - 1)

    @property
    def labelled_queries(self) -> Int64Array:
        """Queries with at least one labelled passage; only these are trained on."""
        return np.flatnonzero(np.diff(self.offsets)).astype(np.int64)
