"""Exact scores of one query: of a whole store, whose shards are mapped and scored in blocks, or of chosen passages.

Shapes: Q query rows, T rows of a block, P passages of a block, D dimensions, K results.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ckd_ray.arrays import Float32Array, Int64Array
from ckd_ray.retrieve.exact import EMPTY_ROW_SCORE
from ckd_ray.retrieve.merge import merge_top
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.shard import Shard

_BLOCK_ROWS = 1 << 15  # 16 MiB of rows in float32 at 128 dimensions, 4 MiB of similarities
# Of chosen passages, whose rows are in memory: 4 MiB in float32, which a core's cache holds.
_CHOSEN_ROWS = 1 << 13


def scan(store: EmbeddingStore, queries_QD: Tensor, depth: int) -> tuple[Float32Array, Int64Array]:
    """The best `depth` passages of the store: (scores_K, dense indices), highest first, ties by index.

    Memory holds one block and two lists of `depth`. The page cache of a local store makes the next query faster.
    """
    queries = queries_QD.float()
    best = (np.empty((1, 0), np.float32), np.empty((1, 0), np.int64))
    for i in range(store.num_shards):
        shard = store.shard(i)
        for start, stop in _blocks(shard.offsets, _BLOCK_ROWS):
            scores = block_scores(shard, start, stop, queries)
            passages = np.arange(shard.first + start, shard.first + stop)
            best = merge_top([best, (scores[None], passages[None])], depth)
    scores, passages = best[0][0], best[1][0]
    found = passages >= 0
    return scores[found], passages[found]


def score_chosen(
    store: EmbeddingStore, passages_N: Int64Array, queries_QD: Tensor, depth: int
) -> tuple[Float32Array, Int64Array]:
    """`scan` of the passages `passages_N`, ascending, alone. Memory holds their rows."""
    found = store.gather(passages_N)
    offsets = np.concatenate([[0], np.cumsum(found.lengths, dtype=np.int64)])
    queries, scores_N = queries_QD.float(), np.empty(len(passages_N), np.float32)
    for start, stop in _blocks(offsets, _CHOSEN_ROWS):
        first, last = offsets[start], offsets[stop]
        scores_N[start:stop] = _scores(found.embeddings_TD[first:last], offsets[start : stop + 1] - first, queries)
    order = np.lexsort((passages_N, -scores_N))[:depth]
    return scores_N[order], passages_N[order]


def block_scores(shard: Shard, start: int, stop: int, queries_QD: Tensor) -> Float32Array:
    """Scores (P,) of a shard's passages [start, stop): sum_i max_j <q_i, d_j>, as `retrieve` computes them."""
    offsets = shard.offsets[start : stop + 1]
    return _scores(shard.embeddings(start, stop), offsets - offsets[0], queries_QD)


def _scores(rows_TD: Tensor, offsets: Int64Array, queries_QD: Tensor) -> Float32Array:
    """(P,) scores of passages that begin at `offsets` (P + 1,) of `rows_TD`."""
    scores = np.full(len(offsets) - 1, EMPTY_ROW_SCORE * len(queries_QD), np.float32)
    filled = np.flatnonzero(np.diff(offsets))
    if len(filled):
        similarity_QT = (queries_QD @ rows_TD.float().T).numpy()
        scores[filled] = np.maximum.reduceat(similarity_QT, offsets[:-1][filled], axis=1).sum(0)
    return scores


def _blocks(offsets: Int64Array, rows: int) -> list[tuple[int, int]]:
    """(start, stop) of passages with about `rows` rows together; a longer passage is its own block."""
    bounds, start, count = [], 0, len(offsets) - 1
    while start < count:
        stop = int(np.searchsorted(offsets, offsets[start] + rows, side="right")) - 1
        stop = min(count, max(start + 1, stop))
        bounds.append((start, stop))
        start = stop
    return bounds


def winners(rows_LD: Tensor, queries_QD: Tensor) -> tuple[Int64Array, Float32Array]:
    """For each query row the passage row of its maximum (the first of equals) and their similarity: ((Q,), (Q,)).

    A passage without rows gives -1 and `EMPTY_ROW_SCORE`.
    """
    if not len(rows_LD):
        nothing = np.full(len(queries_QD), -1, np.int64)
        return nothing, np.full(len(queries_QD), EMPTY_ROW_SCORE, np.float32)
    similarity, at = torch.max(queries_QD.float() @ rows_LD.float().T, dim=1)
    return at.numpy(), similarity.numpy()
