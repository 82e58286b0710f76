"""Learning a residual codec from a sample of token embeddings. Shapes: S sampled rows, D dimensions, K centroids."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ckd_ray.store.codec import RESIDUAL_BITS, Residual, check_dim

# Rows that a centroid should be the mean of: fewer, and k-means fits the sample instead of the corpus.
SAMPLE_A_CENTROID = 40
_MOST_CENTROIDS = 1 << 17
_MOST_SAMPLED = 1 << 23
_KMEANS_ITERATIONS = 6
_BUCKET_ITERATIONS = 20
_BUCKET_SAMPLE = 1 << 21


def choose_centroids(num_tokens: int) -> int:
    """The power of two below 8 sqrt(tokens), from 1 to 2^17, with at least 40 tokens a centroid.

    17,000 passages of 100 tokens get 8,192, 8.8 million of 68 get 131,072.
    """
    wanted = min(8.0 * num_tokens**0.5, num_tokens / SAMPLE_A_CENTROID, _MOST_CENTROIDS)
    return int(2 ** int(np.log2(max(1.0, wanted))))


def sample_size(num_tokens: int) -> int:
    """Rows to train on for a store of about `num_tokens`; bounded (8 million) whatever the corpus."""
    return min(num_tokens, SAMPLE_A_CENTROID * choose_centroids(num_tokens), _MOST_SAMPLED)


def train_codec(name: str, rows_SD: Tensor, num_centroids: int, seed: int = 17) -> Residual:
    """Centroids by spherical k-means, buckets by Lloyd's iteration on the values of the residuals.

    ColBERTv2 cuts the residuals at quantiles; starting there and moving each value to the mean of its bucket costs
    nothing later and leaves less error.

    Args:
        rows_SD: unit rows, any float type.
        num_centroids: K; at most S.

    Raises:
        UserError: D dimensions do not fill whole bytes.
        ValueError: there are no rows.
    """
    import faiss

    check_dim(name, rows_SD.shape[1])
    if not len(rows_SD):
        raise ValueError("no rows to train a codec on")
    rows = rows_SD.float().cpu().contiguous()
    count = min(num_centroids, len(rows))
    faiss.omp_set_num_threads(torch.get_num_threads())
    kmeans = faiss.Kmeans(
        rows.shape[1],
        count,
        niter=_KMEANS_ITERATIONS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=10 * SAMPLE_A_CENTROID,
        gpu=torch.cuda.is_available() and faiss.get_num_gpus() > 0,
    )
    kmeans.train(rows.numpy())
    centroids_KD = torch.from_numpy(np.array(kmeans.centroids, np.float32).reshape(count, -1))
    flat = Residual(name, centroids_KD, *_buckets(torch.zeros(1), RESIDUAL_BITS[name]))
    picked = rows[:: max(1, len(rows) * rows.shape[1] // _BUCKET_SAMPLE)]
    residuals = picked - flat.centroids_KD[flat.nearest_centroids(picked)].float()
    return Residual(name, centroids_KD, *_buckets(residuals.flatten(), RESIDUAL_BITS[name]))


def _buckets(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(cutoffs, weights): a one-dimensional quantiser of least squared error (Lloyd), started at quantiles."""
    count = 2**bits
    ordered = values.double().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    weights = torch.quantile(values.double()[:: max(1, len(values) // 10**6)], quantiles)
    for _ in range(_BUCKET_ITERATIONS):
        edges = torch.searchsorted(ordered, (weights[1:] + weights[:-1]) / 2)
        bounds = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), len(ordered))])
        sizes = bounds.diff()
        means = (sums[bounds[1:]] - sums[bounds[:-1]]) / sizes.clamp(min=1)
        weights = torch.where(sizes > 0, means, weights)
    return ((weights[1:] + weights[:-1]) / 2).float(), weights.float()
