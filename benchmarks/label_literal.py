"""The published label step (method.md, step 4), a query at a time: what the expansion benchmarks compare with.

Per query: scikit-learn's Lloyd from the published start (numpy where scikit-learn is missing), one faiss call for the
10 neighbours of its centroids, Python dictionaries for the votes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


def clustering() -> str:
    """Which k-means `literal_expansion` calls."""
    try:
        import sklearn

        return f"scikit-learn {sklearn.__version__}"
    except ImportError:
        return "numpy"


def start(lengths: Sequence[int], clusters: int) -> list[int]:
    """Clusters shared out by linspace over the passages, evenly spaced rows in each."""
    rows, offset = [], 0
    bounds = [int(x) for x in np.linspace(0, clusters, len(lengths) + 1)]
    for passage, length in enumerate(lengths):
        count = bounds[passage + 1] - bounds[passage]
        rows += [offset + int(x) for x in np.linspace(0, length - 1, count)]
        offset += length
    return rows


def kmeans(points: FloatArray, centroids: FloatArray) -> FloatArray:
    """Centroids after Lloyd's algorithm."""
    if clustering() == "numpy":
        return _lloyd(points, centroids)
    from sklearn.cluster import KMeans

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct points than clusters
        found = KMeans(n_clusters=len(centroids), init=centroids, n_init=1, tol=1e-4, max_iter=300).fit(points)
    return found.cluster_centers_.astype(np.float32)


def _lloyd(points: FloatArray, centroids: FloatArray) -> FloatArray:
    threshold, labels = 1e-4 * points.var(axis=0).mean(), None
    for _ in range(300):
        before = labels
        labels = ((centroids**2).sum(1) - 2 * points @ centroids.T).argmin(1)
        if before is not None and (labels == before).all():
            break
        means = np.stack([points[labels == k].mean(0) if (labels == k).any() else c for k, c in enumerate(centroids)])
        shift, centroids = ((means - centroids) ** 2).sum(), means
        if shift <= threshold:
            break
    return centroids


def literal_expansion(
    passages: Sequence[FloatArray],
    index: Any,
    token_of: npt.NDArray[np.integer],
    silent: set[int],
    df: npt.NDArray[np.integer],
    num_passages: int,
    *,
    clusters: int = 24,
    voters: int = 10,
    size: int = 10,
) -> list[tuple[float, int, FloatArray]]:
    """(idf, token, centroid) of one query's expansion, heaviest first.

    Args:
        index: a faiss index over all token embeddings; token_of: the token id of each.
    """
    points = np.concatenate(passages).astype(np.float32)
    rows = start([len(p) for p in passages], min(clusters, len(points)))
    centroids = kmeans(points, points[rows])
    _, neighbours = index.search(np.ascontiguousarray(centroids), voters)
    found = []
    for centroid, nearest in zip(centroids, neighbours, strict=True):
        votes: dict[int, int] = {}
        for position in nearest:
            token = int(token_of[position]) if position >= 0 else -1
            if token >= 0 and token not in silent:
                votes[token] = votes.get(token, 0) + 1
        if votes:
            winner = max(votes, key=lambda token: votes[token])
            found.append((math.log((1 + num_passages) / (1 + int(df[winner]))), winner, centroid))
    found.sort(key=lambda entry: -entry[0])
    return found[:size]
