"""Exact MaxSim over ragged passages, by grouped matrix products.

Passages of equal length lie together, so that a block of them is one dense product and its maximum a plain reduction:
no padding is multiplied and no index is followed. Scores are sum_i max_j <q_i, d_j> over unit rows, in float32,
whatever the similarity (l2 and cosine rank alike there). Shapes: B queries, Q rows, N passages, L rows a passage, T
rows of all, D dimensions, K results, M vectors.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ckd_ray.retrieve.merge import merge_top

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]

# A query row's score with a passage that has no rows: the least that unit rows can have.
EMPTY_ROW_SCORE = -1.0
# Numbers of a block of similarities: 2 MiB of float32, so that the maximum reads them from the cache.
_BLOCK = 1 << 19
_GPU_BLOCK = 1 << 26


def maxsim_blocks(queries_RD: Tensor, rows_TD: Tensor, length: int, query_rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Scores of consecutive passages of `length` rows each: (slice of passages, scores (passages, B)).

    Args:
        queries_RD: B * query_rows rows, query after query, float32.
        rows_TD: passages * length rows, any float type.
    """
    limit = _GPU_BLOCK if rows_TD.device.type == "cuda" else _BLOCK
    step = max(1, limit // max(1, len(queries_RD) * length))
    for start in range(0, len(rows_TD) // length, step):
        block = rows_TD[start * length : (start + step) * length].float()
        best = (block @ queries_RD.T).view(-1, length, len(queries_RD)).amax(1)
        yield slice(start, start + len(best)), best.view(len(best), -1, query_rows).sum(-1)


class ExactIndex:
    """The passages of a range of shards, grouped by length.

    Args:
        embeddings_TD: rows of all passages, float16 (or float32), passage after passage.
        lengths: (N,) rows of each passage.
        first: dense index of the first passage.
    """

    def __init__(self, embeddings_TD: Tensor, lengths: npt.NDArray[np.integer], first: int = 0) -> None:
        self.first, self.lengths = first, np.asarray(lengths, np.int64)
        offsets = np.concatenate([[0], np.cumsum(self.lengths)])
        order = np.argsort(self.lengths, kind="stable")
        # One copy, grouped by length: the shards' pages are read once here, and never again.
        index = np.concatenate([np.arange(offsets[p], offsets[p + 1]) for p in order]) if len(order) else order
        self.rows_TD = embeddings_TD[torch.from_numpy(index.astype(np.int64))]
        self.order = torch.from_numpy(order.astype(np.int64))
        self._bounds: list[tuple[int, int, int, int]] = []  # length, first and last passage of the order, first row
        row = 0
        for length in np.unique(self.lengths):
            low, high = (int(i) for i in np.searchsorted(self.lengths[order], [length, length + 1]))
            self._bounds.append((int(length), low, high, row))
            row += int(length) * (high - low)

    @property
    def num_passages(self) -> int:
        """N."""
        return len(self.lengths)

    def scores(self, queries_BQD: Tensor) -> Tensor:
        """(B, N) scores of all passages, in the order of the corpus."""
        num_queries, query_rows, dim = queries_BQD.shape
        queries_RD = queries_BQD.reshape(-1, dim).to(self.rows_TD.device, torch.float32)
        out_NB = torch.empty(self.num_passages, num_queries, device=self.rows_TD.device)
        for length, low, high, row in self._bounds:
            if length == 0:
                out_NB[low:high] = EMPTY_ROW_SCORE * query_rows
                continue
            rows = self.rows_TD[row : row + length * (high - low)]
            for part, scores in maxsim_blocks(queries_RD, rows, length, query_rows):
                out_NB[low + part.start : low + part.stop] = scores
        scores_BN = torch.empty(num_queries, self.num_passages, device=out_NB.device)
        scores_BN[:, self.order.to(out_NB.device)] = out_NB.T
        return scores_BN

    def search(self, queries_BQD: Tensor, depth: int) -> tuple[Float32Array, Int64Array]:
        """The best `depth`: (scores_BK, passages_BK), highest first, ties by passage index; -inf and -1 at the end."""
        parts = [
            self._top(queries, depth) for queries in queries_BQD.split(max(1, (1 << 24) // max(1, self.num_passages)))
        ]
        return np.concatenate([s for s, _ in parts]), np.concatenate([p for _, p in parts])

    def _top(self, queries_BQD: Tensor, depth: int) -> tuple[Float32Array, Int64Array]:
        scores_BN = self.scores(queries_BQD)
        kept = min(depth, self.num_passages)
        # topk leaves open which of equal scores it takes at the edge: everything down to the last score is looked at.
        top = scores_BN.topk(kept, dim=1).values if kept else scores_BN
        edge_B = top[:, -1].cpu().numpy() if kept else np.zeros(len(scores_BN), np.float32)
        scores = scores_BN.cpu().numpy()
        rows = []
        for row, edge in zip(scores, edge_B, strict=True):
            at = np.flatnonzero(row >= edge) if kept else np.empty(0, np.int64)
            rows.append(merge_top([(row[at][None], at[None] + self.first)], depth))
        return np.concatenate([s for s, _ in rows]), np.concatenate([p for _, p in rows])


def rerank(
    queries_BQD: Tensor, candidates: list[Int64Array], rows_TD: Tensor, lengths: npt.NDArray[np.integer]
) -> list[Float32Array]:
    """Exact scores of each query's own candidates.

    Args:
        candidates: for each query, positions of passages.
        rows_TD, lengths: all passages, flat; only the candidates' rows are read.

    Returns:
        for each query the scores of its candidates, in their order.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    out = []
    for queries_QD, chosen in zip(queries_BQD.float(), candidates, strict=True):
        scores = np.full(len(chosen), EMPTY_ROW_SCORE * len(queries_QD), np.float32)
        sizes = offsets[chosen + 1] - offsets[chosen]
        filled = np.flatnonzero(sizes)
        if len(filled):
            starts = np.concatenate([[0], np.cumsum(sizes[filled])[:-1]])
            # Consecutive row numbers within each candidate: a running count, shifted to where its rows begin.
            index = np.arange(sizes.sum()) + np.repeat(offsets[chosen[filled]] - starts, sizes[filled])
            similarity_TQ = rows_TD[torch.from_numpy(index)].float() @ queries_QD.to(rows_TD.device).T
            best = np.maximum.reduceat(similarity_TQ.cpu().numpy(), starts, axis=0)
            scores[filled] = best.sum(1)
        out.append(scores)
    return out


def nearest_rows(vectors_MD: Tensor, rows_TD: Tensor, k: int, block: int = 1 << 14) -> tuple[Tensor, Tensor]:
    """The k rows nearest to each vector: (squared distances (M, k), positions (M, k)), nearest first, ties by position.

    Blocked over rows with a running top k; fewer than k rows give +inf and -1.
    """
    vectors = vectors_MD.float().to(rows_TD.device)
    best = torch.full((len(vectors), k), torch.inf, device=vectors.device)
    where = torch.full((len(vectors), k), -1, dtype=torch.int64, device=vectors.device)
    norms_M = vectors.square().sum(1, keepdim=True)
    for start in range(0, len(rows_TD), block):
        rows = rows_TD[start : start + block].float()
        distance = torch.addmm(rows.square().sum(1)[None], vectors, rows.T, alpha=-2.0)
        near, at = distance.topk(min(k, len(rows)), dim=1, largest=False)
        merged = torch.cat([best, near + norms_M], 1)
        positions = torch.cat([where, at + start], 1)
        # Blocks come in order of position, so a stable sort keeps the earlier of two equal distances.
        order = merged.sort(dim=1, stable=True).indices[:, :k]
        best, where = merged.gather(1, order), positions.gather(1, order)
    return best, where
