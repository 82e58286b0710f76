"""k-means of many queries at once: a deterministic start, then Lloyd's algorithm until each has converged.

Source: docs/method.md step 4 ("Collective Relevance Labeling for Passage Retrieval", NAACL 2022, section 3). When
to stop and what becomes of empty clusters follow scikit-learn's Lloyd, which the published code calls.

Every operation is over one query's own rows and columns. When a caller pads each query to a size that the
query alone decides, as `expand` does, its result does not depend on which other queries are in the batch.

Shapes: B queries, T points of a query (padded), K clusters, D dimensions, P passages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 1e-4
MAX_ITERATIONS = 300

# Points that iterate together on a CPU. An iteration reads them twice, so they should stay in a cache; of fewer, the
# calls themselves would be what it costs.
_POINTS_CPU = 1 << 14


@lru_cache(maxsize=65536)
def _spread(length: int, slots: int) -> tuple[int, ...]:
    """`slots` evenly spaced positions among `length`, rounded down; distinct when slots <= length."""
    return tuple(np.linspace(0, length - 1, slots).astype(np.int64).tolist())


@lru_cache(maxsize=4096)
def _shares(clusters: int, passages: int) -> tuple[int, ...]:
    """Clusters of each passage: the steps of linspace(0, K, P + 1) rounded down."""
    bounds = np.linspace(0, clusters, passages + 1).astype(np.int64).tolist()
    return tuple(high - low for low, high in pairwise(bounds)) if passages else ()


def start_positions(lengths: Sequence[int], clusters: int) -> list[int]:
    """Rows, among the concatenated passages of a query, that seed its clusters (docs/method.md step 4).

    The clusters are shared out evenly over the passages, at linspace(0, K, P + 1) rounded down, and seeded at
    evenly spaced token positions in each. K = min(clusters, tokens). Empty passages take no part. A passage
    too short for its share keeps one cluster a token and hands the rest, one by one, to the passages with
    room, best ranked first: no position is used twice.

    Args:
        lengths: tokens of each feedback passage, in rank order.

    Returns:
        K distinct rows; none when there are no tokens.
    """
    firsts = list(accumulate(lengths, initial=0))[:-1]
    kept = [(first, n) for first, n in zip(firsts, lengths, strict=True) if n > 0]
    K = min(clusters, sum(n for _, n in kept))
    wanted = _shares(K, len(kept))
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
        centroids_BKD: means of the clusters' points, not re-normalised; an empty cluster's last position.
        labels_BT: int64, the cluster of each point; -1 on padding.
        sizes_BK: int64, points of each cluster; 0 for clusters that are not there, and otherwise only when a
            query has fewer distinct points than clusters.
        iterations_B: int64, Lloyd iterations made.
    """

    centroids_BKD: Tensor
    labels_BT: Tensor
    sizes_BK: Tensor
    iterations_B: Tensor


def kmeans(
    points_BTD: Tensor,
    mask_BT: Tensor,
    start_BKD: Tensor,
    there_BK: Tensor | None = None,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Clusters:
    """Lloyd's algorithm on a padded batch, in the dtype of the points (float32 or float64), on their device.

    A query stops when no label changes, or when the squared shifts of its centroids sum to `tolerance` times
    the mean variance of its dimensions or less; in the second case its points are assigned once more. A
    cluster that loses all its points moves to the point that lies farthest from its own centroid. A point at
    equal distances goes to the first cluster.

    Args:
        points_BTD: (B, T, D); what stands in padding does not count, as long as it is finite.
        mask_BT: bool, true where there is a point; every query has at least one.
        start_BKD: (B, K, D) the centroids to start from.
        there_BK: bool, false for clusters that a query does not have (fewer points than K); None: all are
            there. Such a cluster gets no point and keeps its start.

    Raises:
        ValueError: shapes do not fit, a query has no point or no cluster, or one of its points is not finite.
    """
    if there_BK is None:
        there_BK = torch.ones(start_BKD.shape[:2], dtype=torch.bool, device=start_BKD.device)
    _check(points_BTD, mask_BT, start_BKD, there_BK)
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
    threshold_B = tolerance * _mean_variance(points_BTD, mask_BT)
    if not bool(torch.isfinite(threshold_B).all()):
        bad = int((~torch.isfinite(threshold_B)).nonzero()[0])
        raise ValueError(f"points_BTD: expected finite numbers, got NaN, infinity or overflow in query {bad}")
    step = B if points_BTD.is_cuda else max(1, _POINTS_CPU // T)
    for first in range(0, B, step):
        part = slice(first, first + step)
        lloyd = _Lloyd(
            points_BTD[part],
            mask_BT[part],
            start_BKD[part],
            there_BK[part],
            threshold_B[part],
            max_iterations,
        )
        lloyd.run(Clusters(*(array[part] for array in vars(out).values())))
    return out


class _Lloyd:
    """The queries that still move. One that stops is written out at once; a quarter stopped, and they go."""

    def __init__(
        self,
        points_BTD: Tensor,
        mask_BT: Tensor,
        start_BKD: Tensor,
        there_BK: Tensor,
        threshold_B: Tensor,
        max_iterations: int,
    ) -> None:
        self.points, self.mask, self.centroids, self.there = points_BTD, mask_BT, start_BKD, there_BK
        self.threshold, self.max_iterations = threshold_B, max_iterations
        self.labels = torch.full_like(mask_BT, -1, dtype=torch.int64)
        self.query = torch.arange(len(points_BTD), device=points_BTD.device)
        self.moving = torch.ones_like(self.query, dtype=torch.bool)

    def run(self, out: Clusters) -> None:
        for iteration in range(1, self.max_iterations + 1):
            labels = _assign(self.points, self.mask, self.centroids, self.there)
            centroids = _update(self.points, labels, self.centroids, self.there)
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
            labels[~same[rows]] = _assign(
                self.points[moved], self.mask[moved], self.centroids[moved], self.there[moved]
            )
        query, K = self.query[rows], self.centroids.shape[1]
        out.centroids_BKD[query] = self.centroids[rows]
        out.labels_BT[query] = labels
        out.sizes_BK[query] = _sizes(labels, K)
        out.iterations_B[query] = iteration

    def _drop_finished(self) -> None:
        rows = self.moving.nonzero()[:, 0]
        if 4 * len(rows) > 3 * len(self.moving):
            return
        self.points, self.mask, self.labels = self.points[rows], self.mask[rows], self.labels[rows]
        self.centroids, self.there = self.centroids[rows], self.there[rows]
        self.threshold = self.threshold[rows]
        self.query, self.moving = self.query[rows], self.moving[rows]


def _mean_variance(points_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Variance of each dimension over a query's points, averaged over the dimensions; NaN passes through."""
    mask_BT = mask_BT.to(points_BTD.dtype)
    count_B = mask_BT.sum(1)
    square_B = (torch.linalg.vector_norm(points_BTD, dim=2).square() * mask_BT).sum(1) / count_B
    mean_BD = torch.bmm(mask_BT[:, None], points_BTD)[:, 0] / count_B[:, None]
    return (square_B - mean_BD.square().sum(1)).clamp(min=0) / points_BTD.shape[2]


def _assign(points_BTD: Tensor, mask_BT: Tensor, centroids_BKD: Tensor, there_BK: Tensor) -> Tensor:
    """labels_BT: the nearest centroid by |c|^2 / 2 - <c, x>, the first of equals; -1 on padding."""
    half_BK = (centroids_BKD.square().sum(2) / 2).masked_fill_(~there_BK, torch.inf)
    distances_BKT = torch.baddbmm(half_BK[:, :, None], centroids_BKD, points_BTD.transpose(1, 2), alpha=-1)
    # The first of the smallest, as `distances_BKT.min(1).indices`, from float operations in place, which a CPU does
    # many at a time (a quarter of the time): zero marks the smallest, the first cluster has the highest rank.
    K = centroids_BKD.shape[1]
    rank_K1 = torch.arange(K, 0, -1, dtype=points_BTD.dtype, device=points_BTD.device)[:, None]
    distances_BKT.sub_(distances_BKT.amin(1, keepdim=True)).eq_(0)
    return (K - distances_BKT.mul_(rank_K1).amax(1).long()).masked_fill_(~mask_BT, -1)


def _sizes(labels_BT: Tensor, K: int) -> Tensor:
    """Points of each cluster (B, K); label -1 does not count."""
    B, width = len(labels_BT), K + 1
    rows_BT = labels_BT + (1 + width * torch.arange(B, device=labels_BT.device))[:, None]
    return torch.bincount(rows_BT.view(-1), minlength=B * width).view(B, width)[:, 1:]


def _update(points_BTD: Tensor, labels_BT: Tensor, centroids_BKD: Tensor, there_BK: Tensor) -> Tensor:
    """Means of the clusters' points; `centroids_BKD` are those that the labels were assigned by."""
    K = centroids_BKD.shape[1]
    sums_BKD, sizes_BK = _sums(points_BTD, labels_BT, K), _sizes(labels_BT, K)
    empty_BK = (sizes_BK == 0) & there_BK
    for b in empty_BK.any(1).nonzero()[:, 0].tolist():
        _relocate(points_BTD[b], labels_BT[b], centroids_BKD[b], empty_BK[b], sums_BKD[b], sizes_BK[b])
    means_BKD = sums_BKD / sizes_BK.clamp(min=1)[:, :, None]
    return torch.where(sizes_BK[:, :, None] > 0, means_BKD, centroids_BKD)


def _sums(points_BTD: Tensor, labels_BT: Tensor, K: int) -> Tensor:
    (B, T, D), width = points_BTD.shape, K + 1
    if points_BTD.is_cuda:
        # One-hot labels as a matrix: additions in a fixed order, which index_add on a GPU does not give.
        member_BXT = torch.zeros((B, width, T), dtype=points_BTD.dtype, device=points_BTD.device)
        return torch.bmm(member_BXT.scatter_(1, (labels_BT + 1)[:, None], 1.0)[:, 1:], points_BTD)
    rows = (labels_BT + 1 + width * torch.arange(B)[:, None]).view(-1)
    sums_XD = torch.zeros((B * width, D), dtype=points_BTD.dtype)
    return sums_XD.index_add_(0, rows, points_BTD.reshape(B * T, D)).view(B, width, D)[:, 1:]


def _relocate(
    points_TD: Tensor,
    labels_T: Tensor,
    centroids_KD: Tensor,
    empty_K: Tensor,
    sums_KD: Tensor,
    sizes_K: Tensor,
) -> None:
    """Move the empty clusters of a query to the points farthest from their centroids, the farthest first."""
    empty = empty_K.nonzero()[:, 0].tolist()
    distances_T = (points_TD - centroids_KD[labels_T.clamp(min=0)]).square().sum(1)
    distances_T = distances_T.masked_fill(labels_T < 0, -1)
    farthest = torch.argsort(distances_T, descending=True, stable=True)[: len(empty)].tolist()
    for cluster, row in zip(empty, farthest, strict=False):
        if distances_T[row] <= 0:
            return  # every point left lies on a centroid: there is nothing to move to
        old = int(labels_T[row])
        sums_KD[old] -= points_TD[row]
        sums_KD[cluster] = points_TD[row]
        sizes_K[old] -= 1
        sizes_K[cluster] = 1


def _check(points_BTD: Tensor, mask_BT: Tensor, start_BKD: Tensor, there_BK: Tensor) -> None:
    if points_BTD.ndim != 3 or points_BTD.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "points_BTD: expected float32 or float64 of 3 dimensions, "
            f"got {points_BTD.dtype} of shape {tuple(points_BTD.shape)}"
        )
    B, T, D = points_BTD.shape
    if start_BKD.ndim != 3 or start_BKD.shape[::2] != (B, D) or start_BKD.dtype != points_BTD.dtype:
        raise ValueError(
            f"start_BKD: expected {points_BTD.dtype} of shape ({B}, K, {D}), "
            f"got {start_BKD.dtype} of shape {tuple(start_BKD.shape)}"
        )
    for name, mask, shape in (("mask_BT", mask_BT, (B, T)), ("there_BK", there_BK, start_BKD.shape[:2])):
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(f"{name}: expected bool of shape {tuple(shape)}, got {mask.dtype} of {tuple(mask.shape)}")
        lacking = (~mask.any(1)).nonzero()[:, 0].tolist()
        if lacking:
            raise ValueError(f"{name}: expected a true value in each row, got none in query {lacking[0]}")
