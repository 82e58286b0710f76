"""The token that a centroid stands for, and its weight (method.md, step 4).

Shapes: M centroids, V voters (neighbours) a centroid, nearest first.
"""

from __future__ import annotations

import numpy as np

from ckd_ray.arrays import Float64Array, Int64Array, IntArray


def elect_tokens(neighbours_MV: IntArray, special_token_ids: IntArray) -> tuple[Int64Array, Int64Array]:
    """The most frequent token id among each centroid's neighbours, and its votes.

    Special tokens and [unused*] (`special_token_ids`) and -1 (no neighbour) do not count. A tie goes to the token met
    first, nearest first. A centroid for which no vote is left gets token -1 and 0 votes.
    """
    ids_MV = np.asarray(neighbours_MV, np.int64)
    counts_MV = (ids_MV[:, :, None] == ids_MV[:, None, :]).sum(2)
    counts_MV[(ids_MV < 0) | np.isin(ids_MV, special_token_ids)] = 0
    if ids_MV.shape[1] == 0:
        return np.full(len(ids_MV), -1, np.int64), np.zeros(len(ids_MV), np.int64)
    winner_M = counts_MV.argmax(1)  # the first of equals
    rows = np.arange(len(ids_MV))
    votes_M = counts_MV[rows, winner_M].astype(np.int64)
    return np.where(votes_M > 0, ids_MV[rows, winner_M], -1), votes_M


def inverse_document_frequency(token_ids: IntArray, document_frequencies: IntArray, num_passages: int) -> Float64Array:
    """ln((1 + N) / (1 + df(t))), the weight of a token at beta = 1; ids outside the table have df 0."""
    ids = np.asarray(token_ids, np.int64)
    inside = (ids >= 0) & (ids < len(document_frequencies))
    df = np.where(inside, document_frequencies[np.where(inside, ids, 0)] if len(document_frequencies) else 0, 0)
    return np.log((1.0 + num_passages) / (1.0 + df))
