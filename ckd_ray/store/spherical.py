"""Spherical k-means through faiss, for the centroids of codecs and cells. Shapes: S rows, K centroids, D dimensions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def has_gpus() -> bool:
    """Whether the installed faiss is a build for GPUs; faiss-cpu is not."""
    import faiss

    return hasattr(faiss, "StandardGpuResources")


def spherical_kmeans(
    rows_SD: Tensor, count: int, *, iterations: int, points_a_centroid: int, seed: int, gpu: bool = False
) -> Tensor:
    """(K, D) float32 unit centroids of unit rows; K = `count`, at most S.

    Args:
        points_a_centroid: the most rows a centroid that k-means uses; faiss draws a sample of more.
        gpu: use one, where this faiss has any.
    """
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    kmeans = faiss.Kmeans(
        rows_SD.shape[1],
        count,
        niter=iterations,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=points_a_centroid,
        gpu=gpu and torch.cuda.is_available() and faiss.get_num_gpus() > 0,
    )
    kmeans.train(rows_SD.float().numpy())
    return torch.from_numpy(np.array(kmeans.centroids, np.float32).reshape(count, -1))
