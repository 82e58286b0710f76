"""Learning a residual codec from a sample of token embeddings.

Shapes: S sampled rows, D dimensions, K centroids, G groups of centroids, N groups next to one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ckd_ray.store.codec import RESIDUAL_BITS, Groups, Residual, check_dim
from ckd_ray.store.spherical import spherical_kmeans

# Rows that a centroid should be the mean of; with fewer rows k-means fits the sample instead of the corpus.
SAMPLE_A_CENTROID = 40
# Consecutive passages that are drawn together: few reads, spread over the corpus.
_SPAN = 32
_MOST_CENTROIDS = 1 << 17
_MOST_SAMPLED = 1 << 23
_KMEANS_ITERATIONS = 6
_BUCKET_ITERATIONS = 20
_BUCKET_SAMPLE = 1 << 21
# So many centroids are grouped, and a row is compared with those of the nearest groups alone.
_LEAST_GROUPED = 4096
_NEAR_GROUPS = 12


def choose_centroids(num_tokens: int) -> int:
    """The power of two below 8 sqrt(tokens), from 1 to 2^17, with at least 40 tokens a centroid.

    17,000 passages of 100 tokens get 8,192, 8.8 million of 68 get 131,072.
    """
    wanted = min(8.0 * num_tokens**0.5, num_tokens / SAMPLE_A_CENTROID, _MOST_CENTROIDS)
    return int(2 ** int(np.log2(max(1.0, wanted))))


def sample_size(num_tokens: int) -> int:
    """Rows to train on for a store of about `num_tokens`; bounded (8 million) whatever the corpus."""
    return min(num_tokens, SAMPLE_A_CENTROID * choose_centroids(num_tokens), _MOST_SAMPLED)


def sample_spans(num_passages: int, seed: int) -> list[tuple[int, int]]:
    """(first, stop) of the passages to learn from, ascending: enough for the codec of a corpus of this size.

    Passages count as 64 tokens here; the true number is known, and used, once the sample is embedded.
    """
    wanted = -(-sample_size(64 * num_passages) // 64)
    starts = np.arange(0, num_passages, _SPAN)
    count = min(len(starts), -(-wanted // _SPAN))
    chosen = np.sort(np.random.default_rng(seed).choice(starts, count, replace=False)).tolist()
    return [(first, min(first + _SPAN, num_passages)) for first in chosen]


def learn_codec(name: str, rows_SD: Tensor, num_tokens: int, seed: int = 17) -> Residual:
    """`train_codec` with the centroids that suit a store of `num_tokens`, or fewer where the sample is small."""
    centroids = choose_centroids(num_tokens)
    while centroids * SAMPLE_A_CENTROID > 2 * len(rows_SD) and centroids > 1:
        centroids //= 2
    return train_codec(name, rows_SD, centroids, seed)


def train_codec(name: str, rows_SD: Tensor, num_centroids: int, seed: int = 17) -> Residual:
    """Centroids by spherical k-means, buckets by Lloyd's iteration on the values of the residuals.

    ColBERTv2 cuts the residuals at quantiles. Lloyd's iteration starts there and moves each value to the mean of its
    bucket, which leaves less error at the same size.

    Args:
        rows_SD: unit rows, any float type.
        num_centroids: K; at most S.

    Raises:
        UserError: D dimensions do not fill whole bytes.
        ValueError: there are no rows.
    """
    check_dim(name, rows_SD.shape[1])
    if not len(rows_SD):
        raise ValueError("no rows to train a codec on")
    rows = rows_SD.float().cpu().contiguous()
    centroids_KD, groups = group_centroids(_kmeans(rows, min(num_centroids, len(rows)), seed), seed)
    unit = Residual(name, centroids_KD, *_buckets(torch.zeros(1), RESIDUAL_BITS[name]), groups=groups)
    picked = rows[:: max(1, len(rows) * rows.shape[1] // _BUCKET_SAMPLE)]
    residuals = picked - unit.centroids_KD[unit.nearest_centroids(picked)].float()
    return Residual(name, centroids_KD, *_buckets(residuals.flatten(), RESIDUAL_BITS[name]), groups=groups)


def _kmeans(rows: Tensor, count: int, seed: int) -> Tensor:
    """(count, D) unit centroids of the rows."""
    most = 10 * SAMPLE_A_CENTROID
    return spherical_kmeans(rows, count, iterations=_KMEANS_ITERATIONS, points_a_centroid=most, seed=seed, gpu=True)


def group_centroids(centroids_KD: Tensor, seed: int) -> tuple[Tensor, Groups]:
    """The centroids ordered by group, and their groups: about sqrt(K) of them, and one when there are few centroids.

    A row is then compared with a tenth of 8,192 centroids and a thirtieth of 131,072.
    """
    if len(centroids_KD) < _LEAST_GROUPED:
        return centroids_KD, Groups.one(centroids_KD)
    centers_GD = _kmeans(centroids_KD, 2 ** round(np.log2(len(centroids_KD)) / 2), seed)
    group_K = (centroids_KD @ centers_GD.T).argmax(1)
    used, group_K = group_K.unique(return_inverse=True)  # drops groups without centroids
    centers_GD = centers_GD[used]
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(group_K).cumsum(0)])
    near_GN = (centers_GD @ centers_GD.T).topk(min(_NEAR_GROUPS, len(centers_GD)), dim=1).indices
    return centroids_KD[group_K.argsort(stable=True)], Groups(centers_GD, bounds, near_GN)


def _buckets(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(cutoffs, weights): a one-dimensional quantiser of least squared error (Lloyd), started at quantiles."""
    count = 2**bits
    ordered = values.double().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    middles = (torch.arange(count) + 0.5) / count
    weights = ordered[(middles * (len(ordered) - 1)).round().long()]
    for _ in range(_BUCKET_ITERATIONS):
        edges = torch.searchsorted(ordered, (weights[1:] + weights[:-1]) / 2)
        bounds = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(ordered))])
        sizes = bounds.diff()
        means = (sums[bounds[1:]] - sums[bounds[:-1]]) / sizes.clamp(min=1)
        weights = torch.where(sizes > 0, means, weights)
    return ((weights[1:] + weights[:-1]) / 2).float(), weights.float()
