"""The queries and passages of the batch of a step: a function of (seed, step) alone.

Neither the number of workers nor a restart changes a batch. Shapes: B queries of the global batch, k negatives a query,
M = 1 + k passages a query (the positive first), N = B * M passages of the batch, R ranks, K drawn negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ckd_ray.arrays import BoolArray, Int64Array
from ckd_ray.data.positives import Positives
from ckd_ray.errors import UserError
from ckd_ray.model.length_buckets import ranges


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
        rankings: (num_queries, depth) passage indices, best first, -1 after the end of a ranking (memory-mapped). Hard
            negatives come from their top; None samples negatives from the whole corpus (the teacher's training).
        negatives_depth: the number of unlabelled passages of the top to draw from.
        sampling: `uniform` draws the negatives evenly from the top; `strata` draws one from each of as many strata of
            rank (`rank_strata`), so that every batch has some of the best unlabelled passages and some distant ones.
        left_out: passages that are in no batch. The random draws do not depend on them. A positive that is drawn from
            them is replaced by the next positive of its query, and a negative by a copy of the positive, which does not
            count (`valid_mask`). A query without another positive is replaced by another query.
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
        sampling: Literal["uniform", "strata"] = "uniform",
        left_out: Sequence[int] = (),
    ) -> None:
        self.positives, self.left_out = positives, frozenset(left_out)
        self.queries = positives.labelled_queries
        holders = positives.queries_of(left_out).tolist()
        lost = [query for query in holders if self.left_out.issuperset(positives.of(query).tolist())]
        self._kept = np.setdiff1d(self.queries, lost)
        if not len(self._kept):
            raise UserError(
                "no training query has a labelled passage",
                where="collection.qrels",
                expected="qrels.train with at least one grade of collection.positive_grade or more",
            )
        self.num_passages, self.batch_size, self.negatives = num_passages, batch_size, negatives
        self.seed, self.rankings, self.negatives_depth, self.sampling = seed, rankings, negatives_depth, sampling
        self._epoch, self._order = -1, self.queries

    def batch(self, step: int) -> Batch:
        """The batch of `step` (from 0): consecutive queries of this epoch's permutation."""
        first = step * self.batch_size
        queries_B = np.array([self._query(first + i) for i in range(self.batch_size)], np.int64)
        rng = np.random.default_rng([self.seed, 1, step])
        starts_B = self.positives.offsets[queries_B]
        counts_B = self.positives.offsets[queries_B + 1] - starts_B
        passages_BM = np.empty((self.batch_size, 1 + self.negatives), np.int64)
        passages_BM[:, 0] = self.positives.passages[starts_B + rng.integers(0, counts_B)]
        passages_BM[:, 1:] = self._negatives(rng, queries_B)
        if self.left_out:
            self._leave_out(queries_B, passages_BM)
        return Batch(queries_B, passages_BM)

    def _leave_out(self, queries_B: Int64Array, passages_BM: Int64Array) -> None:
        """Replace the passages that are left out, in place."""
        out_BM = np.isin(passages_BM, list(self.left_out))
        for row in np.flatnonzero(out_BM[:, 0]).tolist():
            known = self.positives.of(int(queries_B[row])).tolist()
            drawn = known.index(passages_BM[row, 0])
            passages_BM[row, 0] = next(p for p in known[drawn:] + known if p not in self.left_out)
        passages_BM[:, 1:] = np.where(out_BM[:, 1:], passages_BM[:, :1], passages_BM[:, 1:])

    def _query(self, position: int) -> int:
        epoch, place = divmod(position, len(self.queries))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, 0, epoch]).permutation(self.queries)
        query = int(self._order[place])
        if len(self._kept) < len(self.queries) and query not in self._kept:
            return int(np.random.default_rng([self.seed, 3, position]).choice(self._kept))
        return query

    def _negatives(self, rng: np.random.Generator, queries_B: Int64Array) -> Int64Array:
        """(B, negatives) unlabelled passages from the top of the ranking; from the corpus where it has too few."""
        labels = _LabelledPairs(self.positives, queries_B, self.num_passages)
        chosen_BK = np.full((len(queries_B), self.negatives), -1, np.int64)
        if self.rankings is not None and self.negatives:
            top_BR = np.asarray(self.rankings[queries_B], np.int64)
            rows_BR = np.broadcast_to(np.arange(len(top_BR))[:, None], top_BR.shape)
            usable_BR = (top_BR >= 0) & ~labels.hold(rows_BR, top_BR)
            # Labelled passages are removed before the cut, so that every query has the same depth of negatives.
            usable_BR &= usable_BR.cumsum(1) <= self.negatives_depth
            if self.sampling == "strata":
                first_BK = self._of_strata(rng, usable_BR)
            else:
                # The smallest of independent draws are a sample without replacement, for all rows at once.
                draws_BR = np.where(usable_BR, rng.random(top_BR.shape), np.inf)
                first_BK = draws_BR.argsort(1, kind="stable")[:, : self.negatives]
            found_BK = np.take_along_axis(top_BR, first_BK, 1)
            found_BK[~np.take_along_axis(usable_BR, first_BK, 1)] = -1
            chosen_BK[:, : found_BK.shape[1]] = found_BK
        rows, columns = np.nonzero(chosen_BK < 0)
        while len(rows):
            drawn = rng.integers(0, self.num_passages, len(rows))
            # Where every passage of the corpus is labelled there are no negatives; `valid_mask` excludes these.
            good = ~labels.hold(rows, drawn) | (labels.counts_B[rows] >= self.num_passages)
            chosen_BK[rows[good], columns[good]] = drawn[good]
            rows, columns = rows[~good], columns[~good]
        return chosen_BK

    def _of_strata(self, rng: np.random.Generator, usable_BR: BoolArray) -> Int64Array:
        """Columns (B, K) of the top: one from each stratum of the row's usable columns, best stratum first."""
        order_BR = np.argsort(~usable_BR, axis=1, kind="stable")  # usable columns first, best first
        counts_B = usable_BR.sum(1)
        places_BK = np.empty((len(usable_BR), min(self.negatives, usable_BR.shape[1])), np.int64)
        draws_BK = np.asarray(rng.random(places_BK.shape))
        for count in np.unique(counts_B).tolist():
            rows = np.flatnonzero(counts_B == count)
            edges = rank_strata(count, places_BK.shape[1])
            places_BK[rows] = edges[:-1] + (draws_BK[rows] * np.diff(edges)).astype(np.int64)
        return np.take_along_axis(order_BR, places_BK, 1)


def rank_strata(count: int, strata: int) -> Int64Array:
    """Edges (strata + 1,) of `strata` ranges of the ranks 0..count-1.

    The steps are geometric but at least one rank wide: the first strata are single ranks, the last are broad. With
    fewer ranks than strata, the last ranges are of ranks that do not exist.
    """
    if count <= strata:
        return np.arange(strata + 1)
    edges = [round((count + 1) ** (i / strata)) - 1 for i in range(strata + 1)]
    for i in range(1, strata + 1):  # steps shorter than a rank are widened
        edges[i] = max(edges[i], edges[i - 1] + 1)
    for i in range(strata, 0, -1):  # edges that this moved beyond the end come back
        edges[i] = min(edges[i], count - (strata - i))
    return np.array(edges, np.int64)


class _LabelledPairs:
    """The labelled passages of some queries, as (row, passage) pairs.

    Attributes:
        counts_B: labelled passages of each row; rows, passages: the pairs, flat.
    """

    def __init__(self, positives: Positives, queries_B: Int64Array, num_passages: int) -> None:
        starts_B = positives.offsets[queries_B]
        self.counts_B = positives.offsets[queries_B + 1] - starts_B
        self.rows = np.repeat(np.arange(len(queries_B)), self.counts_B)
        self.passages = positives.passages[ranges(starts_B, self.counts_B)]
        self._width = num_passages
        self._keys = self.rows * num_passages + self.passages

    def hold(self, rows: Int64Array, passages: Int64Array) -> BoolArray:
        """True where passages[i] is labelled for the query of rows[i]."""
        return np.isin(rows * self._width + passages, self._keys)


def valid_mask(batch: Batch, positives: Positives) -> BoolArray:
    """Bool (B, N): the columns that count in the softmax of each row: the query's positive, and its negatives.

    Column i * M holds query i's positive, the next M - 1 columns its own negatives. In row i no other column with a
    labelled passage of the query is valid. Of several columns with the same passage one is valid: the query's own, else
    the leftmost.
    """
    flat = batch.passages_BM.reshape(-1)
    rows = np.arange(len(batch.queries_B))
    order = np.argsort(flat, kind="stable")
    by_passage = flat[order]
    seen_before = np.zeros(len(flat), bool)
    seen_before[order[1:]] = by_passage[1:] == by_passage[:-1]
    valid = np.repeat(~seen_before[None], len(rows), axis=0)
    _prefer_own(valid, batch.passages_BM, by_passage, order, np.flatnonzero(seen_before))
    labels = _LabelledPairs(positives, batch.queries_B, int(flat.max(initial=0)) + 1)
    first = np.searchsorted(by_passage, labels.passages, side="left")
    hits = np.searchsorted(by_passage, labels.passages, side="right") - first
    valid[np.repeat(labels.rows, hits), order[ranges(first, hits)]] = False
    valid[rows, rows * batch.passages_BM.shape[1]] = True
    return valid


def _prefer_own(
    valid: BoolArray, passages_BM: Int64Array, by_passage: Int64Array, order: Int64Array, repeated: Int64Array
) -> None:
    """In the row of a query, its own column replaces the column of another query's list with the same passage."""
    width = passages_BM.shape[1]
    for column in repeated.tolist():
        row, place = divmod(column, width)
        passage = passages_BM[row, place]
        leftmost = int(order[np.searchsorted(by_passage, passage, side="left")])
        if leftmost // width != row and passage not in passages_BM[row, :place]:
            valid[row, leftmost] = False
            valid[row, column] = True
