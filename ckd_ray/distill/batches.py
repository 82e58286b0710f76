"""Which queries and passages make up the batch of a step: a function of (seed, step) alone.

Neither the number of workers nor a restart changes a batch. Shapes: B queries of the global batch, k negatives a query,
M = 1 + k passages a query (the positive first), N = B * M passages of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ckd_ray.errors import UserError

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


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
        relevance: Int64Array,
        grade: int,
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

    @property
    def labelled_queries(self) -> Int64Array:
        """Queries with at least one labelled passage; only these are trained on."""
        return np.flatnonzero(np.diff(self.offsets)).astype(np.int64)


@dataclass(frozen=True)
class Batch:
    """queries_B: dense query indices; passages_BM: dense passage indices, the positive in column 0."""

    queries_B: Int64Array
    passages_BM: Int64Array


class BatchPlan:
    """Draws batches.

    Args:
        positives: labels of the training split.
        num_passages: size of the corpus.
        rankings: (num_queries, depth) passage indices, best first, -1 where a ranking ends (memory-mapped), whose top
            is the pool of hard negatives; None samples negatives from the whole corpus (the teacher's training).
        negatives_depth: how much of the top counts.
    """

    def __init__(
        self,
        positives: Positives,
        *,
        num_passages: int,
        batch_size: int,
        negatives: int,
        seed: int,
        rankings: npt.NDArray[np.integer] | None = None,
        negatives_depth: int = 100,
    ) -> None:
        self.positives = positives
        self.queries = positives.labelled_queries
        if not len(self.queries):
            raise UserError(
                "no training query has a labelled passage",
                where="collection.qrels",
                expected="qrels.train with at least one grade of collection.positive_grade or more",
            )
        self.num_passages, self.batch_size, self.negatives = num_passages, batch_size, negatives
        self.seed, self.rankings, self.negatives_depth = seed, rankings, negatives_depth
        self._epoch, self._order = -1, self.queries

    def batch(self, step: int) -> Batch:
        """The batch of `step` (from 0): consecutive queries of this epoch's permutation."""
        queries = np.array([self._query(step * self.batch_size + i) for i in range(self.batch_size)], np.int64)
        rng = np.random.default_rng([self.seed, 1, step])
        passages = np.empty((self.batch_size, 1 + self.negatives), np.int64)
        for row, query in enumerate(queries.tolist()):
            labelled = self.positives.of(query)
            passages[row, 0] = rng.choice(labelled)
            passages[row, 1:] = self._negatives(rng, query, labelled)
        return Batch(queries, passages)

    def _query(self, position: int) -> int:
        epoch, place = divmod(position, len(self.queries))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, 0, epoch]).permutation(self.queries)
        return int(self._order[place])

    def _negatives(self, rng: np.random.Generator, query: int, labelled: Int64Array) -> Int64Array:
        """`negatives` passages that are not labelled; from the top of the ranking, filled up from the corpus."""
        chosen = np.empty(0, np.int64)
        if self.rankings is not None:
            # The labelled passages are taken out before the cut, so that every query has the same depth of negatives.
            top = np.asarray(self.rankings[query], np.int64)
            pool = top[(top >= 0) & ~np.isin(top, labelled)][: self.negatives_depth]
            chosen = rng.choice(pool, min(self.negatives, len(pool)), replace=False)
        while len(chosen) < self.negatives:
            extra = rng.integers(0, self.num_passages, self.negatives - len(chosen))
            fresh = extra[~np.isin(extra, labelled)]
            # A corpus in which everything is labelled has no negatives; the valid mask then takes these out.
            chosen = np.concatenate([chosen, fresh if self.num_passages > len(labelled) else extra])
        return chosen


def valid_mask(batch: Batch, positives: Positives) -> BoolArray:
    """Bool (B, N): False where a passage of the batch is no negative of the query, and not its positive column either.

    Column i * M holds query i's own positive. For row i, other columns that hold a labelled passage of the query, or a
    passage that stands further left (or in the positive's column) already, are excluded from the row's softmax.
    """
    flat = batch.passages_BM.reshape(-1)
    per_query = batch.passages_BM.shape[1]
    seen_before = np.ones(len(flat), bool)
    seen_before[np.unique(flat, return_index=True)[1]] = False
    valid = np.repeat(~seen_before[None], len(batch.queries_B), axis=0)
    for row, query in enumerate(batch.queries_B.tolist()):
        valid[row, np.isin(flat, positives.of(query))] = False
        valid[row, row * per_query] = True
    return valid
