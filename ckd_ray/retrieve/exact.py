"""Exact MaxSim over ragged passages, by grouped matrix products.

Scores are sum_i max_j <q_i, d_j> over unit rows, whatever the similarity (l2 and cosine rank alike there). Passages of
about equal length are taken together, each filled up by repeating its last row, which no maximum notices: a group is
one dense product, its maxima a plain reduction, and no mask is needed.

A ranking is made in two passes. The first, in float32, scores everything. The second scores again, in float64, what the
error bound of the first leaves in question. Stored rows and queries are float16, so every product is a multiple of
2^-48 and, between unit rows, every partial sum stays below 2: float64 (53 bits) adds them without rounding. Final
scores are therefore *exact* and then rounded once, so that they do not depend on block shapes, threads, the cut into
shards, the number of actors or the processor.

Shapes: B queries, Q rows a query, N passages, L rows a passage, T rows of all, P pairs of query and passage, D
dimensions, K results, M vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ckd_ray.retrieve.rows import FlatRows, RangeRows

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]

# A query row's score with a passage that has no rows: the least that unit rows can have.
EMPTY_ROW_SCORE = -1.0
# Numbers of a block of similarities: 4 MiB of float32 (measured: smaller ones call too often, larger leave the cache).
_BLOCK = 1 << 20
_GPU_BLOCK = 1 << 27
# Query rows of a block: their 1 MiB stays in the second-level cache.
_COLUMNS = 2048
_GPU_COLUMNS = 1 << 15
# Rows that are gathered at a time: 8 MiB of float16 at 128 dimensions. More would be fresh pages each time.
_GATHERED = 1 << 15
_GPU_GATHERED = 1 << 20
# Rows that are converted from float16 at a time: 512 KiB of float32.
_CONVERTED = 1 << 10
# Passages that a block of the dense pass scores for all queries of a batch.
_PASSAGES = 1 << 14
# Vectors whose nearest rows are looked for at a time: 64 MiB of distances to 2^14 rows.
_VECTORS = 1 << 10
# Lengths are rounded up to a multiple of this: 2 % more rows, at most 45 groups of passages up to 180 rows.
_ROUND = 4
_EXACT_UNIT = 2.0**48


@dataclass(frozen=True)
class _Group:
    """`members` (n,) of the passages asked for, all with `length` rows: rows_TD (n * length, D) float16."""

    length: int
    members: Int64Array
    rows_TD: Tensor


def _groups(source: RangeRows, passages: Int64Array, device: torch.device) -> Iterator[_Group]:
    """The passages that have rows, in groups of equal rounded length, at most `_GATHERED` rows at a time."""
    most = _GPU_GATHERED if device.type == "cuda" else _GATHERED
    lengths = source.lengths[passages]
    rounded = -(-lengths // _ROUND) * _ROUND
    order = np.argsort(rounded, kind="stable")
    order = order[np.searchsorted(rounded[order], 1) :]
    ends = np.cumsum(rounded[order])
    start = 0
    while start < len(order):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        chosen = order[start:stop]
        length_n = lengths[chosen]
        within = np.arange(int(rounded[chosen].sum())) - np.repeat(
            np.cumsum(rounded[chosen]) - rounded[chosen], rounded[chosen]
        )
        index = np.repeat(source.offsets[passages[chosen]], rounded[chosen])
        index += np.minimum(within, np.repeat(length_n - 1, rounded[chosen]))
        rows_TD = source.take(index).to(device)
        sizes, counts = np.unique(rounded[chosen], return_counts=True)
        at = row = 0
        for length, count in zip(sizes.tolist(), counts.tolist(), strict=True):
            yield _Group(length, chosen[at : at + count], rows_TD[row : row + count * length])
            at, row = at + count, row + count * length
        start = stop


def error_bound(query_rows: int, dim: int) -> float:
    """How far a float32 score of unit rows can be from the true one: Q sums of D products each, then a sum of Q."""
    return query_rows * (dim + query_rows) * 2.0**-23


class Scorer:
    """MaxSim of a batch of queries with the passages of `source`.

    Args:
        queries_BQD: unit rows; they are rounded to float16, as the store keeps them.
        device: where the products are computed.
    """

    def __init__(self, queries_BQD: Tensor, source: RangeRows, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.queries_BQD = queries_BQD.half().to(self.device)
        self.source = source
        self.num_queries, self.query_rows, self.dim = queries_BQD.shape
        gpu = self.device.type == "cuda"
        self._block, self._columns = (_GPU_BLOCK, _GPU_COLUMNS) if gpu else (_BLOCK, _COLUMNS)
        # All queries with one passage pay where a product is large beside what calling it costs.
        self._by_passage_from = float("inf") if gpu else 3.0

    def dense(self, passages: Int64Array) -> Tensor:
        """(B, N) float32 scores of all queries with all of `passages` (positions in the range)."""
        out_BN = torch.full((self.num_queries, len(passages)), EMPTY_ROW_SCORE * self.query_rows, device=self.device)
        columns_DR = self.queries_BQD.float().reshape(-1, self.dim).T.contiguous()
        width = max(1, self._columns // self.query_rows)

        def score(part: Int64Array) -> None:
            for group in _groups(self.source, passages[part], self.device):
                step = max(1, self._block // (max(1, min(width, self.num_queries)) * self.query_rows * group.length))
                members = torch.from_numpy(part[group.members]).to(self.device)
                for start in range(0, len(members), step):
                    rows = group.rows_TD[start * group.length : (start + step) * group.length].float()
                    for low in range(0, self.num_queries, width):
                        asked = columns_DR[:, low * self.query_rows : (low + width) * self.query_rows]
                        best = torch.mm(rows, asked).view(-1, group.length, asked.shape[1]).amax(1)
                        scores_nb = best.view(len(best), -1, self.query_rows).sum(-1)
                        out_BN[low : low + width, members[start : start + step]] = scores_nb.T

        self._spread(score, len(passages))
        return out_BN

    def _spread(self, work: Callable[[Int64Array], None], count: int) -> None:
        """`work` on all of 0..count, by as many threads as torch may use, each with products of its own.

        Products of one passage are too small to be cut in two: threads that share one wait for each other.
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
            torch.set_num_threads(threads)  # what the pool's threads set counts for threads that are yet to come

    def pairs(self, query_P: Int64Array, passage_P: Int64Array, *, exact: bool = False) -> npt.NDArray[np.float32]:
        """(P,) scores of pairs of a query and a passage (position in the range).

        Args:
            exact: in float64, without rounding but the last; else in float32.
        """
        out_P = np.full(len(query_P), EMPTY_ROW_SCORE * self.query_rows, np.float32)
        passages, inverse = np.unique(passage_P, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        ends = np.cumsum(np.bincount(inverse, minlength=len(passages)))
        dtype = torch.float64 if exact else torch.float32
        queries_BQD = self.queries_BQD.to(dtype)
        by_passage = len(query_P) >= self._by_passage_from * max(1, len(passages))

        def score(part: Int64Array) -> None:
            for group in _groups(self.source, passages[part], self.device):
                members = part[group.members]
                counts = np.diff(ends, prepend=0)[members]
                first = np.repeat(ends[members] - counts - (np.cumsum(counts) - counts), counts)
                at = order[np.arange(counts.sum()) + first]
                if by_passage:
                    self._score_by_passage(group, queries_BQD, query_P[at], counts, at, out_P)
                else:
                    member = np.repeat(np.arange(len(counts)), counts)
                    self._score_by_pair(group, queries_BQD, query_P[at], member, at, out_P)

        self._spread(score, len(passages))
        return out_P

    def _score_by_passage(
        self,
        group: _Group,
        queries_BQD: Tensor,
        query_p: Int64Array,
        counts: Int64Array,
        at_p: Int64Array,
        out_P: Float32Array,
    ) -> None:
        """A product a passage, with the rows of the queries that want it: buffers are reused, so that all of it stays
        in the cache, and nothing but three calls is left in the loop."""
        dtype, most = queries_BQD.dtype, int(counts.max(initial=0)) * self.query_rows
        asked_RD = torch.empty(most, self.dim, dtype=dtype)
        similarity = torch.empty(group.length * most, dtype=dtype)
        wanted = torch.from_numpy(query_p)
        best_PQ = torch.empty(len(at_p), self.query_rows, dtype=dtype)
        low, converted = 0, max(1, _CONVERTED // group.length)
        for i, count in enumerate(counts.tolist()):
            if i % converted == 0:
                rows_TD = group.rows_TD[i * group.length : (i + converted) * group.length].to(dtype)
            row, columns = i % converted * group.length, count * self.query_rows
            asked = asked_RD[:columns]
            torch.index_select(queries_BQD, 0, wanted[low : low + count], out=asked.view(count, self.query_rows, -1))
            block = similarity[: group.length * columns].view(group.length, columns)
            torch.mm(rows_TD[row : row + group.length], asked.T, out=block)
            torch.amax(block, 0, out=best_PQ[low : low + count].view(-1))
            low += count
        out_P[at_p] = _sum_rows(best_PQ)

    def _score_by_pair(
        self,
        group: _Group,
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
            out_P[at_p[part]] = _sum_rows(torch.bmm(rows, asked.transpose(1, 2)).amax(1))


def _sum_rows(best_PQ: Tensor) -> Float32Array:
    """Sums over query rows. float64 is added in whole numbers of 2^-48, whose order of addition cannot matter."""
    if best_PQ.dtype == torch.float64:
        best_PQ = (best_PQ * _EXACT_UNIT).to(torch.int64).sum(1).double() / _EXACT_UNIT
        return best_PQ.float().cpu().numpy()
    return best_PQ.sum(1).cpu().numpy()


def search_all(scorer: Scorer, depth: int) -> tuple[Float32Array, Int64Array]:
    """The best `depth` of all passages of the range: (scores_BK, passages_BK), see `rank`.

    Holds (B, 2^14) scores at a time, and a running list of those that may still be among the best.
    """
    count = scorer.source.num_passages
    margin = 2 * error_bound(scorer.query_rows, scorer.dim)
    best_BK = torch.full((scorer.num_queries, depth), -torch.inf, device=scorer.device)
    kept: list[tuple[Int64Array, Int64Array, Float32Array]] = []
    for start in range(0, count, _PASSAGES):
        passages = np.arange(start, min(count, start + _PASSAGES))
        scores_BN = scorer.dense(passages)
        top = scores_BN.topk(min(depth, len(passages)), dim=1).values
        best_BK = torch.cat([best_BK, top], 1).topk(depth, dim=1).values
        query, passage = (scores_BN >= best_BK[:, -1:] - margin).nonzero(as_tuple=True)
        values = scores_BN[query, passage].cpu().numpy()
        kept.append((query.cpu().numpy(), passage.cpu().numpy() + start, values))
    none = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    query_P, passage_P, score_P = (np.concatenate(x) for x in zip(none, *kept, strict=True))
    left = score_P >= best_BK[:, -1].cpu().numpy()[query_P] - margin
    return rank(scorer, query_P[left], passage_P[left], depth)


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
    return rank(scorer, query_P[left], passage_P[left], depth)


def rank(scorer: Scorer, query_P: Int64Array, passage_P: Int64Array, depth: int) -> tuple[Float32Array, Int64Array]:
    """Exact scores of these pairs, best first: (scores_BK, passages_BK).

    Passages are indices in the whole store; equal scores go by passage index; -inf and -1 behind the end of a list.
    """
    score_P = scorer.pairs(query_P, passage_P, exact=True)
    order = np.lexsort((passage_P, -score_P, query_P))
    query_P, passage_P, score_P = query_P[order], passage_P[order], score_P[order]
    counts = np.bincount(query_P, minlength=scorer.num_queries)
    place = np.arange(len(query_P)) - np.repeat(np.cumsum(counts) - counts, counts)
    scores_BK = np.full((scorer.num_queries, depth), -np.inf, np.float32)
    passages_BK = np.full((scorer.num_queries, depth), -1, np.int64)
    kept = place < depth
    scores_BK[query_P[kept], place[kept]] = score_P[kept]
    passages_BK[query_P[kept], place[kept]] = passage_P[kept] + scorer.source.first
    return scores_BK, passages_BK


class ExactIndex:
    """Exact search over passages held in memory.

    Args:
        embeddings_TD: rows of all passages, float16, passage after passage.
        lengths: (N,) rows of each passage.
        first: dense index of the first passage.
    """

    def __init__(
        self,
        embeddings_TD: Tensor,
        lengths: npt.NDArray[np.integer],
        first: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source, self.device = FlatRows(embeddings_TD, lengths, first), device

    def scores(self, queries_BQD: Tensor) -> Tensor:
        """(B, N) float32 scores of all passages, in the order of the corpus."""
        return Scorer(queries_BQD, self.source, self.device).dense(np.arange(self.source.num_passages))

    def search(self, queries_BQD: Tensor, depth: int) -> tuple[Float32Array, Int64Array]:
        """The best `depth`: (scores_BK, passages_BK), highest first, ties by passage index; -inf and -1 at the end."""
        return search_all(Scorer(queries_BQD, self.source, self.device), depth)


def rerank(
    queries_BQD: Tensor, candidates: list[Int64Array], rows_TD: Tensor, lengths: npt.NDArray[np.integer]
) -> list[Float32Array]:
    """float32 scores of each query's own candidates.

    Args:
        candidates: for each query, positions of passages.
        rows_TD, lengths: all passages, flat; only the candidates' rows are read.

    Returns:
        for each query the scores of its candidates, in their order.
    """
    query_P = np.repeat(np.arange(len(candidates)), [len(c) for c in candidates])
    passage_P = np.concatenate([np.empty(0, np.int64), *candidates]).astype(np.int64)
    scores_P = Scorer(queries_BQD, FlatRows(rows_TD, lengths), rows_TD.device).pairs(query_P, passage_P)
    return np.split(scores_P, np.cumsum([len(c) for c in candidates])[:-1]) if candidates else []


def nearest_rows(vectors_MD: Tensor, source: RangeRows, k: int, block: int = 1 << 14) -> tuple[Tensor, Tensor]:
    """The k rows nearest to each vector: (squared distances (M, k), positions (M, k)), nearest first, ties by position.

    A running top 2 k + 8 in float32, whose distances are then computed again one by one in float64, so that the cut
    into blocks, shards and actors does not decide between near equals. Fewer than k rows give +inf and -1.
    """
    wide = 2 * k + 8
    best = torch.full((len(vectors_MD), wide), torch.inf)
    where = torch.full((len(vectors_MD), wide), -1, dtype=torch.int64)
    for start in range(0, source.num_rows, block):
        rows = source.take(np.arange(start, min(source.num_rows, start + block))).float()
        norms = rows.square().sum(1)[None]
        for low in range(0, len(vectors_MD), _VECTORS):
            part = slice(low, low + _VECTORS)
            distance = torch.addmm(norms, vectors_MD[part].float(), rows.T, alpha=-2.0)
            near, at = distance.topk(min(wide, len(rows)), dim=1, largest=False)
            merged, positions = torch.cat([best[part], near], 1), torch.cat([where[part], at + start], 1)
            best[part], order = merged.topk(wide, dim=1, largest=False)
            where[part] = positions.gather(1, order)
    return sharpen(vectors_MD, source, where, k)


def sharpen(vectors_MD: Tensor, source: RangeRows, where_MC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of some rows each: (squared distances (M, k) float32, positions (M, k)), computed in float64.

    Args:
        where_MC: positions of rows, -1 for none.
    """
    distances, positions = [], []
    step = max(1, (1 << 22) // max(1, where_MC.shape[1] * vectors_MD.shape[1]))
    for vectors, where in zip(vectors_MD.split(step), where_MC.split(step), strict=True):
        absent = where < 0
        rows = source.take(where.clamp(min=0).flatten().numpy()).double().view(*where.shape, -1)
        away = (rows - vectors[:, None].double()).square().sum(-1).float().masked_fill(absent, torch.inf)
        place = where.masked_fill(absent, torch.iinfo(torch.int64).max)
        # Two stable sorts: by position, then by distance.
        first = place.argsort(dim=1, stable=True)
        order = first.gather(1, away.gather(1, first).argsort(dim=1, stable=True))[:, :k]
        distances.append(away.gather(1, order))
        positions.append(where.gather(1, order))
    empty = vectors_MD.new_empty(0, k), torch.empty(0, k, dtype=torch.int64)
    return torch.cat([empty[0], *distances]), torch.cat([empty[1], *positions])
