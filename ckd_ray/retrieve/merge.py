"""Merging the answers of several ranges of shards.

Shapes: B queries, K results, M vectors, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckd_ray.arrays import Float32Array, Int64Array


def merge_top(parts: Sequence[tuple[Float32Array, Int64Array]], depth: int) -> tuple[Float32Array, Int64Array]:
    """The best `depth` of all parts: (scores_BK, passages_BK), highest score first, equal scores by passage index.

    Args:
        parts: scores (B, K_i) and dense passage indices; lists end with -inf and -1.

    Returns:
        K = depth columns, padded with -inf and -1.
    """
    scores = np.concatenate([np.asarray(s, np.float32) for s, _ in parts], axis=1)
    passages = np.concatenate([np.asarray(p, np.int64) for _, p in parts], axis=1)
    short = depth - scores.shape[1]
    if short > 0:
        scores = np.pad(scores, ((0, 0), (0, short)), constant_values=-np.inf)
        passages = np.pad(passages, ((0, 0), (0, short)), constant_values=-1)
    # -1 becomes the largest number, which sorts behind every passage, also among scores of -inf.
    keys = np.where(passages < 0, np.iinfo(np.int64).max, passages)
    order = np.lexsort((keys, -scores), axis=1)[:, :depth]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(passages, order, 1)


def merge_neighbours(
    parts: Sequence[tuple[Float32Array, Int64Array, Int64Array]], k: int
) -> tuple[Float32Array, Int64Array]:
    """The k nearest of all parts: (distances_Mk, token_ids_Mk), nearest first, ties by position in the store.

    Args:
        parts: distances (M, k_i), token ids and positions (the number of the embedding in the whole store); lists end
            with +inf and -1.
    """
    distances = np.concatenate([d for d, _, _ in parts], axis=1)
    tokens = np.concatenate([t for _, t, _ in parts], axis=1)
    positions = np.concatenate([p for _, _, p in parts], axis=1)
    order = np.lexsort((positions, distances), axis=1)[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(tokens, order, 1)
