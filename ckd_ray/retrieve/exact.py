"""Exact MaxSim over ragged passages, by grouped matrix products.

Scores are sum_i max_j <q_i, d_j> over unit rows; l2 and cosine rank alike there. A group of passages of about equal
length (groups.py) is one dense product and a plain reduction without a mask.

A ranking takes several passes. The first scores everything with a bound of its error: in 8 bits where the processor is
fast at that (`int8.py`), else in float32. The `depth` best by lower bound are then scored in float64, and the least of
these scores is the threshold. Passages whose upper bound is below it are left out. The rest is scored in float32, and
in float64 where that does not decide.

Stored rows and queries are float16, so every product is a multiple of 2^-48 and, between unit rows, every partial sum
is below 2: float64 (53 bits) adds them without rounding. Final scores are therefore *exact* and rounded once. They do
not depend on the first pass, block shapes, threads, the cut into shards, the number of actors or the processor.

Queries have different numbers of rows, and zeros behind them. Only rows that count are multiplied: queries of about
equal length form a block (query_blocks.py).

Shapes: B queries, Q rows of the longest query, R rows of several queries, N passages, L rows a passage, T rows of all,
P pairs of query and passage, D dimensions, K results.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ckd_ray.arrays import Float32Array, Int64Array
from ckd_ray.model.length_buckets import ranges
from ckd_ray.retrieve.groups import Group, groups_of
from ckd_ray.retrieve.int8 import (
    FirstPass,
    RoundedQueries,
    bounds_of,
    choose_first_pass,
    estimates_of,
    round_queries,
)
from ckd_ray.retrieve.query_blocks import QueryBlock, blocks_of, rows_until_last
from ckd_ray.retrieve.rows import RangeRows

# A query row's score with a passage without rows: the least score of unit rows.
EMPTY_ROW_SCORE = -1.0
# Numbers of a block of similarities: 4 MiB of float32 (measured: smaller ones need too many calls, larger ones exceed
# the cache).
_BLOCK = 1 << 20
_GPU_BLOCK = 1 << 27
# Query rows of a block: their 1 MiB stays in the second-level cache.
_COLUMNS = 2048
_GPU_COLUMNS = 1 << 15
# Rows converted from float16 at a time: 512 KiB of float32.
_CONVERTED = 1 << 10
# Passages that a block of the dense pass scores for all queries of a batch.
_PASSAGES = 1 << 14
_EXACT_UNIT = 2.0**48
# When a first pass in 8 bits pays: from so many times `depth` passages on, since it leaves two or three times `depth`
# to score again; and from so many query rows on, since rounding a passage's rows costs the same for any number of
# queries.
_LEAST_PASSAGES = 8
_LEAST_ROWS = 256
# The largest share of a block that the bounds may leave undecided; above it the block is scored in float32 instead.
_MOST_KEPT = 0.5

# Queries, passages (positions in the range), lower and upper bounds of the scores: (P,) each.
_Candidates = tuple[Int64Array, Int64Array, Float32Array, Float32Array]


def error_bound(query_rows: int, dim: int) -> float:
    """The largest error of a float32 score of unit rows: of Q sums of D products each, then of a sum of Q."""
    return query_rows * (dim + query_rows) * 2.0**-23


class Scorer:
    """MaxSim of a batch of queries with the passages of `source`.

    Args:
        queries_BQD: unit rows, and behind a query's last one rows of zeros; they are rounded to float16, as the store
            keeps them.
        device: where the products are computed.
    """

    def __init__(self, queries_BQD: Tensor, source: RangeRows, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.lengths_B = rows_until_last(queries_BQD)
        self.query_rows = max(1, int(self.lengths_B.max(initial=0)))
        self.queries_BQD = queries_BQD[:, : self.query_rows].half().contiguous().to(self.device)
        self.source = source
        self.num_queries, self.dim = len(queries_BQD), queries_BQD.shape[2]
        gpu = self.device.type == "cuda"
        self._block, self._columns = (_GPU_BLOCK, _GPU_COLUMNS) if gpu else (_BLOCK, _COLUMNS)
        # Products of one passage with all of its queries pay when they are large compared with the cost of a call.
        self._by_passage_from = float("inf") if gpu else 3.0

    def dense(self, passages: Int64Array) -> Tensor:
        """(B, N) float32 scores of all queries with all of `passages` (positions in the range)."""
        out_NB = self._empty_scores().repeat(len(passages), 1)
        most = max((asked_DR.shape[1] for _, asked_DR in self._columns_of_blocks), default=1)

        def score(part: Int64Array) -> None:
            for group in groups_of(self.source, passages[part], self.device):
                step = max(1, self._block // (most * group.length))
                members = torch.from_numpy(part[group.members]).to(self.device)
                for start in range(0, len(members), step):
                    rows = group.rows_TD[start * group.length : (start + step) * group.length].float()
                    scores_nB = torch.empty(len(rows) // group.length, self.num_queries, device=self.device)
                    for block, asked_DR in self._columns_of_blocks:
                        best_nR = torch.mm(rows, asked_DR).view(-1, group.length, asked_DR.shape[1]).amax(1)
                        scores_nB[:, block.queries] = best_nR.view(len(best_nR), -1, block.length).sum(-1)
                    out_NB[members[start : start + step]] = scores_nB

        self._spread(score, len(passages))
        return out_NB.T.contiguous()

    def estimate(self, passages: Int64Array) -> tuple[Tensor, Tensor]:
        """(B, N) float32 estimates in 8 bits of all scores with `passages`, and (B, N) bounds of their errors.

        On a CPU only. See `int8.py`; a passage without rows has its exact score and the bound 0.
        """
        rounded, count = self._rounded, len(passages)
        out_NB = self._empty_scores().repeat(count, 1)
        longest_N, most_lost_N = torch.zeros(count), torch.zeros(count)

        def score(part: Int64Array) -> None:
            for group in groups_of(self.source, passages[part], self.device):
                members = torch.from_numpy(part[group.members])
                for these, *found in estimates_of(rounded, group.rows_TD, group.length):
                    at = members[these]
                    out_NB[at], longest_N[at], most_lost_N[at] = found

        self._spread(score, count)
        return out_NB.T.contiguous(), bounds_of(rounded, longest_N, most_lost_N)

    # Both are made once for all passages, which are scored part by part.
    @cached_property
    def _columns_of_blocks(self) -> list[tuple[QueryBlock, Tensor]]:
        blocks = blocks_of(self.lengths_B, self._columns)
        return [(block, block.rows_of(self.queries_BQD).float().T.contiguous()) for block in blocks]

    @cached_property
    def _rounded(self) -> RoundedQueries:
        return round_queries(self.queries_BQD, self.lengths_B)

    def _empty_scores(self) -> Tensor:
        """(B,) scores of the queries with a passage without rows."""
        return EMPTY_ROW_SCORE * torch.from_numpy(self.lengths_B).float().to(self.device)

    def _spread(self, work: Callable[[Int64Array], None], count: int) -> None:
        """`work` on all of 0..count, in as many threads as torch may use, each with its own products.

        A product of one passage is too small for two threads: they would wait for each other.
        """
        threads = torch.get_num_threads()
        if self.device.type == "cuda" or threads == 1 or count < 16 * threads:
            work(np.arange(count))
            return
        parts = [np.arange(i, count, threads) for i in range(threads)]
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(work, parts))
        finally:
            torch.set_num_threads(threads)  # what the pool's threads set would hold for threads started later

    def pairs(self, query_P: Int64Array, passage_P: Int64Array, *, exact: bool = False) -> Float32Array:
        """(P,) scores of pairs of a query and a passage (position in the range).

        Args:
            exact: in float64, rounded once; else in float32.
        """
        out_P = (EMPTY_ROW_SCORE * self.lengths_B[query_P]).astype(np.float32)
        passages, inverse = np.unique(passage_P, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        ends = np.cumsum(np.bincount(inverse, minlength=len(passages)))
        dtype = torch.float64 if exact else torch.float32
        queries_BQD = self.queries_BQD.to(dtype)
        rows_RD = queries_BQD.view(-1, self.dim)
        by_passage = len(query_P) >= self._by_passage_from * max(1, len(passages))

        def score(part: Int64Array) -> None:
            for group in groups_of(self.source, passages[part], self.device):
                members = part[group.members]
                counts = np.diff(ends, prepend=0)[members]
                at = order[ranges(ends[members] - counts, counts)]
                if by_passage:
                    self._score_by_passage(group, rows_RD, query_P[at], counts, at, out_P)
                else:
                    member = np.repeat(np.arange(len(counts)), counts)
                    self._score_by_pair(group, queries_BQD, query_P[at], member, at, out_P)

        self._spread(score, len(passages))
        return out_P

    def _score_by_passage(
        self,
        group: Group,
        rows_RD: Tensor,
        query_p: Int64Array,
        counts: Int64Array,
        at_p: Int64Array,
        out_P: Float32Array,
    ) -> None:
        """One product a passage, with the rows of its queries. Buffers are reused, so that they stay in the cache."""
        dtype, lengths_p = rows_RD.dtype, np.maximum(1, self.lengths_B[query_p])
        row_R = torch.from_numpy(ranges(query_p * self.query_rows, lengths_p))  # of all pairs, pair after pair
        starts_p = np.cumsum(lengths_p) - lengths_p
        ends = np.append(starts_p, len(row_R))[np.cumsum(counts)]
        most = int(np.diff(ends, prepend=0).max(initial=0))
        asked_RD = torch.empty(most, self.dim, dtype=dtype)
        similarity = torch.empty(group.length * most, dtype=dtype)
        best_R = torch.empty(len(row_R), dtype=dtype)
        low, converted = 0, max(1, _CONVERTED // group.length)
        for i, high in enumerate(ends.tolist()):
            if i % converted == 0:
                rows_TD = group.rows_TD[i * group.length : (i + converted) * group.length].to(dtype)
            row, columns = i % converted * group.length, high - low
            asked = torch.index_select(rows_RD, 0, row_R[low:high], out=asked_RD[:columns])
            block = similarity[: group.length * columns].view(group.length, columns)
            torch.mm(rows_TD[row : row + group.length], asked.T, out=block)
            torch.amax(block, 0, out=best_R[low:high])
            low = high
        out_P[at_p] = _sums(best_R.numpy(), starts_p)

    def _score_by_pair(
        self,
        group: Group,
        queries_BQD: Tensor,
        query_p: Int64Array,
        member_p: Int64Array,
        at_p: Int64Array,
        out_P: Float32Array,
    ) -> None:
        rows_nLD = group.rows_TD.view(-1, group.length, self.dim)
        step = max(1, self._block // (group.length * (self.dim + self.query_rows)))
        for low in range(0, len(at_p), step):
            part = slice(low, low + step)
            rows = rows_nLD[torch.from_numpy(member_p[part]).to(self.device)].to(queries_BQD.dtype)
            asked = queries_BQD[torch.from_numpy(query_p[part]).to(self.device)]
            best_pQ = torch.bmm(rows, asked.transpose(1, 2)).amax(1).cpu().numpy()
            out_P[at_p[part]] = _sums(best_pQ.reshape(-1), np.arange(len(best_pQ)) * self.query_rows)


def _sums(best_R: npt.NDArray[np.floating], starts_P: Int64Array) -> Float32Array:
    """Sums over the rows of each pair, which begin at `starts_P`. float64 is added as integers of unit 2^-48, so the
    order of addition does not matter."""
    if not len(starts_P):
        return np.empty(0, np.float32)
    if best_R.dtype == np.float64:
        units_P = np.add.reduceat((best_R * _EXACT_UNIT).astype(np.int64), starts_P)
        return (units_P.astype(np.float64) / _EXACT_UNIT).astype(np.float32)
    return np.add.reduceat(best_R, starts_P, dtype=np.float32)


def search_all(scorer: Scorer, depth: int, first_pass: FirstPass | None = None) -> tuple[Float32Array, Int64Array]:
    """The best `depth` of all passages of the range: (scores_BK, passages_BK), see `_best_of`.

    Memory: (B, 2^14) scores at a time, and the candidates that may still be among the best.

    Args:
        first_pass: `int8` (on a CPU only) or `float32`, which give the same answer; None: the faster one here.
    """
    count = scorer.source.num_passages
    if first_pass is None:
        few = count < _LEAST_PASSAGES * depth or scorer.lengths_B.sum() < _LEAST_ROWS
        first_pass = "float32" if few or scorer.device.type != "cpu" else choose_first_pass()[0]
    best_BK = torch.full((scorer.num_queries, depth), -torch.inf, device=scorer.device)
    kept: list[_Candidates] = []
    for start in range(0, count, _PASSAGES):
        passages = np.arange(start, min(count, start + _PASSAGES))
        found, best, share = _survivors(scorer, passages, best_BK, first_pass)
        if first_pass == "int8" and share > _MOST_KEPT:
            first_pass = "float32"  # the bounds leave too many undecided: all in float32 is cheaper than pairs
            found, best, share = _survivors(scorer, passages, best_BK, first_pass)
        kept.append(found)
        best_BK = best
    none = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.float32))
    query_P, passage_P, low_P, high_P = (np.concatenate(x) for x in zip(none, *kept, strict=True))
    left = high_P >= best_BK[:, -1].cpu().numpy()[query_P]
    return _rank_bounded(scorer, (query_P[left], passage_P[left], low_P[left], high_P[left]), depth)


def _survivors(
    scorer: Scorer, passages: Int64Array, best_BK: Tensor, first_pass: FirstPass
) -> tuple[_Candidates, Tensor, float]:
    """Those of consecutive passages that may be among the best; the K highest lower bounds so far (B, K); and the share
    of pairs that may be."""
    if first_pass == "int8":
        scores_BN, errors_BN = scorer.estimate(passages)
        low_BN, high_BN = scores_BN - errors_BN, scores_BN.add_(errors_BN)
    else:
        scores_BN, error = scorer.dense(passages), error_bound(scorer.query_rows, scorer.dim)
        low_BN, high_BN = scores_BN - error, scores_BN.add_(error)
    depth = best_BK.shape[1]
    top = low_BN.topk(min(depth, len(passages)), dim=1).values
    best_BK = torch.cat([best_BK, top], 1).topk(depth, dim=1).values
    query, passage = (high_BN >= best_BK[:, -1:]).nonzero(as_tuple=True)
    low_P, high_P = low_BN[query, passage].cpu().numpy(), high_BN[query, passage].cpu().numpy()
    found = query.cpu().numpy(), passage.cpu().numpy() + passages[0], low_P, high_P
    return found, best_BK, len(low_P) / max(1, low_BN.numel())


def _rank_bounded(scorer: Scorer, candidates: _Candidates, depth: int) -> tuple[Float32Array, Int64Array]:
    """The best `depth` of candidates; see `_best_of`.

    The `depth` best by lower bound are scored exactly; the least of these scores is the threshold for the others.
    """
    query_P, passage_P, low_P, high_P = candidates
    order = np.lexsort((-low_P, query_P))
    query_P, passage_P, high_P = query_P[order], passage_P[order], high_P[order]
    first = _places(query_P, scorer.num_queries) < depth
    score_P = np.full(len(query_P), -np.inf, np.float32)
    score_P[first] = scorer.pairs(query_P[first], passage_P[first], exact=True)
    edge_B = np.full(scorer.num_queries, np.inf, np.float32)
    np.minimum.at(edge_B, query_P[first], score_P[first])
    rest = np.flatnonzero(~first & (high_P >= edge_B[query_P]))
    score32_P = scorer.pairs(query_P[rest], passage_P[rest]).astype(np.float64)
    rest = rest[score32_P + error_bound(scorer.query_rows, scorer.dim) >= edge_B[query_P[rest]]]
    score_P[rest] = scorer.pairs(query_P[rest], passage_P[rest], exact=True)
    first[rest] = True
    return _best_of(scorer, query_P[first], passage_P[first], score_P[first], depth)


def search_among(scorer: Scorer, candidates: list[Int64Array], depth: int) -> tuple[Float32Array, Int64Array]:
    """The best `depth` of each query's own candidates (positions in the range): (scores_BK, passages_BK)."""
    query_P = np.repeat(np.arange(len(candidates)), [len(c) for c in candidates])
    passage_P = np.concatenate([np.empty(0, np.int64), *candidates]).astype(np.int64)
    score_P = scorer.pairs(query_P, passage_P)
    edge_B = np.full(len(candidates), -np.inf, np.float32)
    ends = np.cumsum([0, *(len(c) for c in candidates)])
    for i, (low, high) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        if high - low > depth:
            edge_B[i] = np.partition(score_P[low:high], high - low - depth)[high - low - depth]
    left = score_P >= edge_B[query_P] - 2 * error_bound(scorer.query_rows, scorer.dim)
    query_P, passage_P = query_P[left], passage_P[left]
    return _best_of(scorer, query_P, passage_P, scorer.pairs(query_P, passage_P, exact=True), depth)


def _best_of(
    scorer: Scorer, query_P: Int64Array, passage_P: Int64Array, score_P: Float32Array, depth: int
) -> tuple[Float32Array, Int64Array]:
    """Pairs with their exact scores as lists, best first: (scores_BK, passages_BK).

    Passages are indices in the whole store; equal scores go by passage index; lists end with -inf and -1.
    """
    order = np.lexsort((passage_P, -score_P, query_P))
    query_P, passage_P, score_P = query_P[order], passage_P[order], score_P[order]
    place = _places(query_P, scorer.num_queries)
    scores_BK = np.full((scorer.num_queries, depth), -np.inf, np.float32)
    passages_BK = np.full((scorer.num_queries, depth), -1, np.int64)
    kept = place < depth
    scores_BK[query_P[kept], place[kept]] = score_P[kept]
    passages_BK[query_P[kept], place[kept]] = passage_P[kept] + scorer.source.first
    return scores_BK, passages_BK


def _places(query_P: Int64Array, num_queries: int) -> Int64Array:
    """(P,) the place, from 0, of each pair among those of its query; pairs of a query are consecutive."""
    return ranges(np.zeros(num_queries, np.int64), np.bincount(query_P, minlength=num_queries))
