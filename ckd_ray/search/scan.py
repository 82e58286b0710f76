"""Exact search by one pass over a store: shards are memory-mapped and scored block by block.

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


def scan(store: EmbeddingStore, queries_QD: Tensor, depth: int) -> tuple[Float32Array, Int64Array]:
    """The best `depth` passages of the store: (scores_K, dense indices), highest first, ties by index.

    Memory holds one block and two lists of `depth`. The page cache of a local store makes the next query faster.
    """
    queries = queries_QD.float()
    best = (np.empty((1, 0), np.float32), np.empty((1, 0), np.int64))
    for i in range(store.num_shards):
        shard = store.shard(i)
        for start, stop in _blocks(shard):
            scores = block_scores(shard, start, stop, queries)
            passages = np.arange(shard.first + start, shard.first + stop)
            best = merge_top([best, (scores[None], passages[None])], depth)
    scores, passages = best[0][0], best[1][0]
    found = passages >= 0
    return scores[found], passages[found]


def block_scores(shard: Shard, start: int, stop: int, queries_QD: Tensor) -> Float32Array:
    """Scores (P,) of a shard's passages [start, stop): sum_i max_j <q_i, d_j>, as `retrieve` computes them."""
    offsets = shard.offsets[start : stop + 1]
    scores = np.full(stop - start, EMPTY_ROW_SCORE * len(queries_QD), np.float32)
    filled = np.flatnonzero(np.diff(offsets))
    if len(filled):
        similarity_QT = (queries_QD @ shard.embeddings(start, stop).float().T).numpy()
        starts = offsets[:-1][filled] - offsets[0]
        scores[filled] = np.maximum.reduceat(similarity_QT, starts, axis=1).sum(0)
    return scores


def _blocks(shard: Shard) -> list[tuple[int, int]]:
    """(start, stop) of passages with about `_BLOCK_ROWS` rows together; a longer passage is its own block."""
    bounds, start, count = [], 0, len(shard.lengths)
    while start < count:
        stop = int(np.searchsorted(shard.offsets, shard.offsets[start] + _BLOCK_ROWS, side="right")) - 1
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
