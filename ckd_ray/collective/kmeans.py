"""k-means of many queries at once: a deterministic start, then Lloyd's algorithm until each query has converged.

Source: method.md step 4 ("Collective Relevance Labeling for Passage Retrieval", NAACL 2022, section 3). Stopping and the
treatment of empty clusters are those of scikit-learn's Lloyd, which the published code calls.

Every operation is over one query's own rows and columns, and a query's arrays have a size that it alone decides (see
`batches.py`), so its result does not depend on which other queries are in the batch.

Shapes: B queries, T points of a query (padded), K clusters, D dimensions, P passages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TOLERANCE = 1e-4
MAX_ITERATIONS = 300


@lru_cache(maxsize=65536)
def _spread(length: int, slots: int) -> tuple[int, ...]:
    """`slots` evenly spaced positions among `length`, rounded down; distinct when slots <= length."""
    return tuple(np.linspace(0, length - 1, slots).astype(np.int64).tolist())


def start_rows(lengths: Sequence[int], clusters: int) -> list[int]:
    """Rows, among the concatenated passages of a query, that seed its clusters (method.md step 4).

    The clusters are shared out evenly over the passages, at linspace(0, K, P + 1) rounded down, and seeded at evenly spaced
    token positions in each. K = min(clusters, tokens). Empty passages take no part. A passage too short for its share keeps
    one cluster a token and hands the rest, one by one, to the passages that have room, best ranked first: no position is
    used twice, so no cluster starts empty.

    Args:
        lengths: tokens of each feedback passage, in rank order.

    Returns:
        K distinct rows; none when there are no tokens.
    """
    kept = [(first, n) for first, n in zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False) if n > 0]
    K = min(clusters, sum(n for _, n in kept))
    bounds = np.linspace(0, K, len(kept) + 1).astype(np.int64).tolist() if kept else [0]
    wanted = [high - low for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
    slots = [min(w, n) for w, (_, n) in zip(wanted, kept, strict=True)]
    while sum(slots) < K:
        for i, (_, n) in enumerate(kept):
            if slots[i] < n and sum(slots) < K:
                slots[i] += 1
    return [first + row for (first, n), s in zip(kept, slots, strict=True) for row in _spread(n, s)]


@dataclass(frozen=True)
class Clusters:
    """What k-means found.

    Attributes:
        centroids_BKD: means of the clusters' points, not re-normalised; the last position of a cluster that is empty.
        labels_BT: int64, the cluster of each point; -1 on padding.
        sizes_BK: int64, points of each cluster. 0 is possible only with fewer distinct points than clusters.
        iterations_B: int64, Lloyd iterations made.
    """

    centroids_BKD: Tensor
    labels_BT: Tensor
    sizes_BK: Tensor
    iterations_B: Tensor


def kmeans(
    points_BTD: Tensor,
    lengths_B: Tensor | npt.NDArray[np.integer],
    start_BKD: Tensor,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Clusters:
    """Lloyd's algorithm on a padded batch of queries, in the dtype of the points (float32 or float64), on their device.

    A query stops when no label changes, or when the squared shifts of its centroids sum to at most tolerance times the mean
    variance of its dimensions; in the second case its points are assigned once more. A cluster that loses all its points
    moves to the point that lies farthest from its own centroid. A point at equal distance goes to the first cluster.

    Args:
        points_BTD: (B, T, D); rows from lengths_B on are padding and must be finite.
        lengths_B: (B,) points of each query, at least 1.
        start_BKD: (B, K, D) the centroids to start from; K <= every length.

    Raises:
        ValueError: shapes do not fit, lengths are out of range, or a point is not finite (the message names the query).
    """
    lengths_B = torch.as_tensor(lengths_B, device=points_BTD.device).long()
    _check(points_BTD, lengths_B, start_BKD)
    B, T, _ = points_BTD.shape
    K = start_BKD.shape[1]
    out = Clusters(
        start_BKD.clone(),
        torch.full((B, T), -1, dtype=torch.int64, device=points_BTD.device),
        torch.zeros((B, K), dtype=torch.int64, device=points_BTD.device),
        torch.zeros(B, dtype=torch.int64, device=points_BTD.device),
    )
    if not B or not K:
        return out
    valid_BT = torch.arange(T, device=points_BTD.device) < lengths_B[:, None]
    threshold_B = tolerance * _mean_variance(points_BTD, lengths_B, valid_BT)
    if not bool(torch.isfinite(threshold_B).all()):
        bad = (~torch.isfinite(threshold_B)).nonzero()[:, 0].tolist()
        raise ValueError(f"points_BTD: expected finite numbers, got NaN, infinity or overflow in query {bad[0]}")
    _Lloyd(points_BTD, valid_BT, start_BKD, threshold_B, max_iterations).run(out)
    return out


class _Lloyd:
    """The queries that still move. Finished ones are written out at once and dropped when a quarter of the batch has finished."""

    def __init__(
        self, points_BTD: Tensor, valid_BT: Tensor, start_BKD: Tensor, threshold_B: Tensor, max_iterations: int
    ) -> None:
        self.points, self.valid, self.centroids = points_BTD, valid_BT, start_BKD
        self.threshold, self.max_iterations = threshold_B, max_iterations
        self.labels = torch.full_like(valid_BT, -1, dtype=torch.int64)
        self.query = torch.arange(len(points_BTD), device=points_BTD.device)
        self.moving = torch.ones_like(self.query, dtype=torch.bool)

    def run(self, out: Clusters) -> None:
        for iteration in range(1, self.max_iterations + 1):
            labels = _assign(self.points, self.valid, self.centroids)
            centroids = _update(self.points, labels, self.centroids)
            same = (labels == self.labels).all(1)
            shift = (centroids - self.centroids).square().sum((1, 2))
            self.labels, self.centroids = labels, centroids
            done = self.moving & (same | (shift <= self.threshold))
            if iteration == self.max_iterations:
                done = self.moving
            if bool(done.any()):
                self._write(out, done, same, iteration)
                self.moving = self.moving & ~done
                if not bool(self.moving.any()):
                    return
                self._drop_finished()

    def _write(self, out: Clusters, done: Tensor, same: Tensor, iteration: int) -> None:
        rows = done.nonzero()[:, 0]
        labels, moved = self.labels[rows], rows[~same[rows]]
        if len(moved):
            labels[~same[rows]] = _assign(self.points[moved], self.valid[moved], self.centroids[moved])
        query, K = self.query[rows], self.centroids.shape[1]
        out.centroids_BKD[query] = self.centroids[rows]
        out.labels_BT[query] = labels
        out.sizes_BK[query] = _sizes(labels, K)
        out.iterations_B[query] = iteration

    def _drop_finished(self) -> None:
        rows = self.moving.nonzero()[:, 0]
        if 4 * len(rows) > 3 * len(self.moving):
            return
        self.points, self.valid, self.centroids = self.points[rows], self.valid[rows], self.centroids[rows]
        self.labels, self.threshold = self.labels[rows], self.threshold[rows]
        self.query, self.moving = self.query[rows], self.moving[rows]


def _mean_variance(points_BTD: Tensor, lengths_B: Tensor, valid_BT: Tensor) -> Tensor:
    """Variance of each dimension over a query's points, averaged over the dimensions; NaN passes through."""
    points_BTD = points_BTD * valid_BT[:, :, None].to(points_BTD.dtype)
    count_B = lengths_B.to(points_BTD.dtype)
    square_B = points_BTD.square().sum((1, 2)) / count_B
    mean_B = (points_BTD.sum(1) / count_B[:, None]).square().sum(1)
    return (square_B - mean_B).clamp(min=0) / points_BTD.shape[2]


def _assign(points_BTD: Tensor, valid_BT: Tensor, centroids_BKD: Tensor) -> Tensor:
    """labels_BT: the nearest centroid by |c|^2 / 2 - <c, x>, the first of equals; -1 on padding."""
    half_BK1 = centroids_BKD.square().sum(2, keepdim=True) / 2
    distances_BKT = half_BK1 - torch.bmm(centroids_BKD, points_BTD.transpose(1, 2))
    return distances_BKT.min(1).indices.masked_fill_(~valid_BT, -1)


def _sizes(labels_BT: Tensor, K: int) -> Tensor:
    """Points of each cluster (B, K); label -1 does not count."""
    sizes_BX = torch.zeros((len(labels_BT), K + 1), dtype=torch.int64, device=labels_BT.device)
    return sizes_BX.scatter_add_(1, labels_BT + 1, torch.ones_like(labels_BT))[:, 1:]


def _update(points_BTD: Tensor, labels_BT: Tensor, centroids_BKD: Tensor) -> Tensor:
    """Means of the clusters' points; `centroids_BKD` are those that the labels were assigned by."""
    sums_BKD, sizes_BK = _sums(points_BTD, labels_BT, centroids_BKD.shape[1]), _sizes(labels_BT, centroids_BKD.shape[1])
    if not bool(sizes_BK.all()):
        for query in (sizes_BK == 0).any(1).nonzero()[:, 0].tolist():
            _relocate(points_BTD[query], labels_BT[query], centroids_BKD[query], sums_BKD[query], sizes_BK[query])
    means_BKD = sums_BKD / sizes_BK.clamp(min=1)[:, :, None]
    return torch.where(sizes_BK[:, :, None] > 0, means_BKD, centroids_BKD)


def _sums(points_BTD: Tensor, labels_BT: Tensor, K: int) -> Tensor:
    (B, T, D), width = points_BTD.shape, K + 1
    if points_BTD.is_cuda:
        # One-hot labels as a matrix: additions in a fixed order, which index_add on a GPU does not give.
        member_BXT = torch.zeros((B, width, T), dtype=points_BTD.dtype, device=points_BTD.device)
        return torch.bmm(member_BXT.scatter_(1, (labels_BT + 1)[:, None], 1.0)[:, 1:], points_BTD)
    rows = (labels_BT + 1 + width * torch.arange(B)[:, None]).view(-1)
    sums = torch.zeros((B * width, D), dtype=points_BTD.dtype).index_add_(0, rows, points_BTD.reshape(B * T, D))
    return sums.view(B, width, D)[:, 1:]


def _relocate(points_TD: Tensor, labels_T: Tensor, centroids_KD: Tensor, sums_KD: Tensor, sizes_K: Tensor) -> None:
    """Give each empty cluster of one query the point farthest from its centroid, the farthest to the first; in place."""
    empty = (sizes_K == 0).nonzero()[:, 0].tolist()
    distances_T = (points_TD - centroids_KD[labels_T.clamp(min=0)]).square().sum(1).masked_fill(labels_T < 0, -1)
    farthest = torch.argsort(distances_T, descending=True, stable=True)[: len(empty)].tolist()
    for cluster, row in zip(empty, farthest, strict=True):
        if distances_T[row] <= 0:
            return  # every point left lies on a centroid: there is nothing to move to
        old = int(labels_T[row])
        sums_KD[old] -= points_TD[row]
        sums_KD[cluster] = points_TD[row]
        sizes_K[old] -= 1
        sizes_K[cluster] = 1


def _check(points_BTD: Tensor, lengths_B: Tensor, start_BKD: Tensor) -> None:
    if points_BTD.ndim != 3 or points_BTD.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"points_BTD: expected float32 or float64 of 3 dimensions, got {points_BTD.dtype} of shape {tuple(points_BTD.shape)}"
        )
    B, T, D = points_BTD.shape
    if start_BKD.ndim != 3 or start_BKD.shape[0] != B or start_BKD.shape[2] != D or start_BKD.dtype != points_BTD.dtype:
        raise ValueError(
            f"start_BKD: expected {points_BTD.dtype} of shape ({B}, K, {D}), got {start_BKD.dtype} of {tuple(start_BKD.shape)}"
        )
    if lengths_B.shape != (B,):
        raise ValueError(f"lengths_B: expected shape ({B},), got {tuple(lengths_B.shape)}")
    K = start_BKD.shape[1]
    if B and not bool(((lengths_B >= max(1, K)) & (lengths_B <= T)).all()):
        raise ValueError(
            f"lengths_B: expected lengths from {max(1, K)} (the clusters) to {T}, got {int(lengths_B.min())} to "
            f"{int(lengths_B.max())}"
        )
