"""k-means of many queries at once: a deterministic start, then Lloyd's algorithm until each query has converged.

Source: method.md step 4 ("Collective Relevance Labeling for Passage Retrieval", NAACL 2022, section 3). The
stopping rule and the treatment of empty clusters follow scikit-learn's Lloyd, which the published code calls.

Every operation reads one query's own rows and columns. When a caller pads each query to a size that depends on the
query alone, as `expand` does, the other queries of the batch do not change its result.

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

from ckd_ray.collective import native

TOLERANCE = 1e-4
MAX_ITERATIONS = 300

# Points that iterate together on a CPU. An iteration reads them twice, so they should stay in a cache. With fewer
# points, the overhead of the calls dominates.
_POINTS_CPU = 1 << 14


@lru_cache(maxsize=65536)
def _spread(length: int, slots: int) -> tuple[int, ...]:
    """`slots` evenly spaced positions among `length`, rounded down; distinct when slots <= length."""
    return tuple(np.linspace(0, length - 1, slots).astype(np.int64).tolist())


@lru_cache(maxsize=4096)
def _shares(clusters: int, passages: int) -> tuple[int, ...]:
    """Number of clusters of each passage: the steps of linspace(0, K, P + 1) rounded down."""
    bounds = np.linspace(0, clusters, passages + 1).astype(np.int64).tolist()
    return tuple(high - low for low, high in pairwise(bounds)) if passages else ()


def start_positions(lengths: Sequence[int], clusters: int) -> list[int]:
    """Rows, among the concatenated passages of a query, that seed its clusters (method.md step 4).

    The passages share the K = min(clusters, tokens) clusters evenly, at linspace(0, K, P + 1) rounded down. In each
    passage the seeds are evenly spaced tokens. Empty passages take no part. A passage with fewer tokens than its share
    gets one cluster a token; the rest go, one by one, to the passages with room, best ranked first.

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
    """The result of k-means.

    Attributes:
        centroids_BKD: means of the clusters' points, not re-normalised; an empty cluster's last position.
        labels_BT: int64, the cluster of each point; -1 on padding.
        sizes_BK: int64, points of each cluster; 0 for a masked cluster, and where a query has fewer distinct points
            than clusters.
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
    mask_BK: Tensor | None = None,
    *,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Clusters:
    """Lloyd's algorithm on a padded batch, in the dtype of the points (float32 or float64), on their device.

    A query stops when no label changes, or when the squared shifts of its centroids sum to at most `tolerance` times
    the mean variance of its dimensions. In the second case its points are assigned once more. A cluster that loses all
    its points moves to the point that is farthest from its own centroid. A point at equal distances goes to the first
    cluster.

    Args:
        points_BTD: (B, T, D); padding may hold any finite number.
        mask_BT: bool, true where there is a point; every query has at least one.
        start_BKD: (B, K, D), the first centroids.
        mask_BK: bool, false for clusters that a query does not have (fewer points than K). Such a cluster gets no point
            and keeps its start. None: every query has all K.

    Raises:
        ValueError: shapes do not fit, a query has no point or no cluster, or a point or a start is not finite.
    """
    if mask_BK is None:
        mask_BK = torch.ones(start_BKD.shape[:2], dtype=torch.bool, device=start_BKD.device)
    _check(points_BTD, mask_BT, start_BKD, mask_BK)
    B, T, _ = points_BTD.shape
    K = start_BKD.shape[1]
    out = Clusters(
        start_BKD.clone(memory_format=torch.contiguous_format),  # C fills it row by row
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
    if not bool(torch.isfinite(start_BKD).all()):
        raise ValueError("start_BKD: expected finite numbers, got NaN or infinity")
    if native.available(points_BTD):
        native.kmeans(points_BTD, mask_BT, mask_BK, threshold_B, max_iterations, *vars(out).values())
        return out
    step = B if points_BTD.is_cuda else max(1, _POINTS_CPU // T)
    for first in range(0, B, step):
        part = slice(first, first + step)
        lloyd = _Lloyd(
            points_BTD[part], mask_BT[part], start_BKD[part], mask_BK[part], threshold_B[part], max_iterations
        )
        lloyd.run(Clusters(*(array[part] for array in vars(out).values())))
    return out


class _Lloyd:
    """The queries that have not converged. A query that converges is written out, and the last one takes its place.

    Distances read a copy of the points as (D, T), which is a third faster than its transpose. Sums are kept from one
    iteration to the next, because late iterations move few points.
    """

    def __init__(
        self,
        points_BTD: Tensor,
        mask_BT: Tensor,
        start_BKD: Tensor,
        mask_BK: Tensor,
        threshold_B: Tensor,
        max_iterations: int,
    ) -> None:
        self.points_QTD = points_BTD  # of all queries, in the order of the call
        self.points_BDT = points_BTD.transpose(1, 2).contiguous()
        self.mask, self.centroids, self.cluster_mask = mask_BT.clone(), start_BKD.clone(), mask_BK.clone()
        self.threshold, self.max_iterations = threshold_B.clone(), max_iterations
        self.labels = torch.full_like(mask_BT, -1, dtype=torch.int64)
        self.query = torch.arange(len(points_BTD), device=points_BTD.device)
        self.members: _Members | None = None

    def run(self, out: Clusters) -> None:
        for iteration in range(1, self.max_iterations + 1):
            labels = _assign(self.points_BDT, self.mask, self.centroids, self.cluster_mask)
            centroids = self._update(labels)
            same = (labels == self.labels).all(1)
            shift = (centroids - self.centroids).square().sum((1, 2))
            self.labels, self.centroids = labels, centroids
            done = same | (shift <= self.threshold)
            if iteration == self.max_iterations:
                done = torch.ones_like(done)
            if bool(done.any()):
                self._write(out, done, same, iteration)
                self._close_up(~done)
                if not len(self.query):
                    return

    def _update(self, labels_BT: Tensor) -> Tensor:
        """Means of the clusters' points; `self.centroids` are those by which the labels were assigned."""
        K = self.centroids.shape[1]
        if self.members is None or labels_BT.is_cuda:
            self.members = _Members.count(self.points_BDT, labels_BT, K)
        else:
            self.members.move(self.points_QTD, self.query, self.labels, labels_BT)
        sums_BKD, sizes_BK = self.members.sums_BXD[:, 1:], self.members.sizes_BX[:, 1:]
        empty_BK = (sizes_BK == 0) & self.cluster_mask
        lacking = empty_BK.any(1).nonzero()[:, 0].tolist()
        if lacking:
            sums_BKD, sizes_BK = sums_BKD.clone(), sizes_BK.clone()  # `_relocate` changes these copies, not `members`
        for b in lacking:
            points_TD = self.points_QTD[self.query[b]]
            _relocate(points_TD, labels_BT[b], self.centroids[b], empty_BK[b], sums_BKD[b], sizes_BK[b])
        means_BKD = sums_BKD / sizes_BK.clamp(min=1)[:, :, None]
        return torch.where(sizes_BK[:, :, None] > 0, means_BKD, self.centroids)

    def _write(self, out: Clusters, done: Tensor, same: Tensor, iteration: int) -> None:
        rows = done.nonzero()[:, 0]
        labels, moved = self.labels[rows], rows[~same[rows]]
        if len(moved):
            labels[~same[rows]] = _assign(
                self.points_BDT[moved], self.mask[moved], self.centroids[moved], self.cluster_mask[moved]
            )
        query, K = self.query[rows], self.centroids.shape[1]
        out.centroids_BKD[query] = self.centroids[rows]
        out.labels_BT[query] = labels
        out.sizes_BK[query] = _sizes(labels, K)[:, 1:]
        out.iterations_B[query] = iteration

    def _close_up(self, moving: Tensor) -> None:
        """Move the queries that have not converged to the front, over those that have."""
        count = int(moving.sum())
        holes = (~moving[:count]).nonzero()[:, 0]
        last = moving[count:].nonzero()[:, 0] + count

        def closed(array: Tensor) -> Tensor:
            if len(holes):
                array[holes] = array[last]
            return array[:count]

        self.points_BDT, self.mask = closed(self.points_BDT), closed(self.mask)
        self.centroids, self.cluster_mask, self.labels = (
            closed(self.centroids),
            closed(self.cluster_mask),
            closed(self.labels),
        )
        self.threshold, self.query = closed(self.threshold), closed(self.query)
        if self.members is not None:
            self.members = _Members(closed(self.members.sums_BXD), closed(self.members.sizes_BX))


@dataclass(frozen=True)
class _Members:
    """Sums and counts of the points of each label, X = K + 1 labels from -1 (padding) on."""

    sums_BXD: Tensor
    sizes_BX: Tensor

    @classmethod
    def count(cls, points_BDT: Tensor, labels_BT: Tensor, K: int) -> _Members:
        # One-hot labels as a matrix: additions in a fixed order, which index_add on a GPU does not give.
        member_BXT = torch.zeros((len(labels_BT), K + 1, labels_BT.shape[1]), dtype=points_BDT.dtype,
                                 device=points_BDT.device)  # fmt: skip
        member_BXT.scatter_(1, (labels_BT + 1)[:, None], 1.0)
        return cls(torch.bmm(member_BXT, points_BDT.transpose(1, 2)), _sizes(labels_BT, K))

    def move(self, points_QTD: Tensor, query_B: Tensor, before_BT: Tensor, labels_BT: Tensor) -> None:
        """Update in place, on a CPU, point after point: a query's sums do not depend on the other queries."""
        B, width = self.sizes_BX.shape
        place_M, at_M = (before_BT != labels_BT).nonzero(as_tuple=True)
        if not len(at_M):
            return
        points_MD, one_M = points_QTD[query_B[place_M], at_M], torch.ones_like(at_M)
        for labels, sign in ((labels_BT, 1), (before_BT, -1)):
            rows = labels[place_M, at_M] + width * place_M + 1
            self.sums_BXD.view(B * width, -1).index_add_(0, rows, points_MD, alpha=sign)
            self.sizes_BX.view(-1).index_add_(0, rows, one_M, alpha=sign)


def _mean_variance(points_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Variance of each dimension over a query's points, averaged over the dimensions; NaN passes through."""
    mask_BT = mask_BT.to(points_BTD.dtype)
    count_B = mask_BT.sum(1)
    square_B = (torch.linalg.vector_norm(points_BTD, dim=2).square() * mask_BT).sum(1) / count_B
    mean_BD = torch.bmm(mask_BT[:, None], points_BTD)[:, 0] / count_B[:, None]
    return (square_B - mean_BD.square().sum(1)).clamp(min=0) / points_BTD.shape[2]


def _assign(points_BDT: Tensor, mask_BT: Tensor, centroids_BKD: Tensor, mask_BK: Tensor) -> Tensor:
    """labels_BT: the nearest centroid by |c|^2 / 2 - <c, x>, the first of equals; -1 on padding."""
    half_BK = (centroids_BKD.square().sum(2) / 2).masked_fill_(~mask_BK, torch.inf)
    distances_BKT = torch.baddbmm(half_BK[:, :, None], centroids_BKD, points_BDT, alpha=-1)
    # This is `distances_BKT.min(1).indices` (the first of the smallest) by float operations in place, which a CPU
    # vectorises (a quarter of the time): zero marks the smallest, and the first cluster has the highest rank.
    K = centroids_BKD.shape[1]
    rank_K1 = torch.arange(K, 0, -1, dtype=points_BDT.dtype, device=points_BDT.device)[:, None]
    distances_BKT.sub_(distances_BKT.amin(1, keepdim=True)).eq_(0)
    return (K - distances_BKT.mul_(rank_K1).amax(1).long()).masked_fill_(~mask_BT, -1)


def _sizes(labels_BT: Tensor, K: int) -> Tensor:
    """(B, K + 1) the number of points of each label from -1 on."""
    B, width = len(labels_BT), K + 1
    rows_BT = labels_BT + (1 + width * torch.arange(B, device=labels_BT.device))[:, None]
    return torch.bincount(rows_BT.view(-1), minlength=B * width).view(B, width)


def _relocate(
    points_TD: Tensor, labels_T: Tensor, centroids_KD: Tensor, empty_K: Tensor, sums_KD: Tensor, sizes_K: Tensor
) -> None:
    """Move the empty clusters of a query to the points farthest from their centroids, the farthest first."""
    empty = empty_K.nonzero()[:, 0].tolist()
    distances_T = (points_TD - centroids_KD[labels_T.clamp(min=0)]).square().sum(1)
    distances_T = distances_T.masked_fill(labels_T < 0, -1)
    farthest = torch.argsort(distances_T, descending=True, stable=True)[: len(empty)].tolist()
    for cluster, row in zip(empty, farthest, strict=False):
        if distances_T[row] <= 0:
            return  # every other point lies on a centroid
        old = int(labels_T[row])
        sums_KD[old] -= points_TD[row]
        sums_KD[cluster] = points_TD[row]
        sizes_K[old] -= 1
        sizes_K[cluster] = 1


def _check(points_BTD: Tensor, mask_BT: Tensor, start_BKD: Tensor, mask_BK: Tensor) -> None:
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
    for name, mask, shape in (("mask_BT", mask_BT, (B, T)), ("mask_BK", mask_BK, start_BKD.shape[:2])):
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(f"{name}: expected bool of shape {tuple(shape)}, got {mask.dtype} of {tuple(mask.shape)}")
        lacking = (~mask.any(1)).nonzero()[:, 0].tolist()
        if lacking:
            raise ValueError(f"{name}: expected a true value in each row, got none in query {lacking[0]}")
