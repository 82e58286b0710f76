"""Batched Lloyd against a literal one in float64, its start, and its edge cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ckd_ray.collective.kmeans import Clusters, kmeans, start_positions

pytestmark = pytest.mark.usefixtures("clustering")


def lloyd(points: np.ndarray, centroids: np.ndarray, tolerance: float = 1e-4) -> tuple[np.ndarray, np.ndarray, int]:
    """One query, by the definition; for data in which no cluster loses all its points."""
    labels, threshold = None, tolerance * points.var(axis=0).mean()
    for iteration in range(1, 301):
        before, labels = labels, ((points[:, None] - centroids[None]) ** 2).sum(2).argmin(1)
        means = np.stack([points[labels == k].mean(0) for k in range(len(centroids))])
        shift, centroids = ((means - centroids) ** 2).sum(), means
        if before is not None and (labels == before).all():
            return centroids, labels, iteration
        if shift <= threshold:
            break
    return centroids, ((points[:, None] - centroids[None]) ** 2).sum(2).argmin(1), iteration


def batch(lengths: list[int], width: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    points = torch.randn(len(lengths), width, dim, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return points, mask


def starts(points: torch.Tensor, lengths: list[int], clusters: int) -> torch.Tensor:
    return torch.stack([points[i, start_positions([n], clusters)] for i, n in enumerate(lengths)])


def test_a_batch_equals_the_literal_version_query_by_query() -> None:
    lengths = [40, 64, 23, 57, 64, 31] * 40
    points, mask = batch(lengths, 64, 12, seed=0)
    start = starts(points, lengths, 6)
    found = kmeans(points, mask, start)
    for i, n in enumerate(lengths):
        centroids, labels, iterations = lloyd(points[i, :n].double().numpy(), start[i].double().numpy())
        assert found.labels_BT[i].tolist() == [*labels.tolist(), *[-1] * (64 - n)]
        assert int(found.iterations_B[i]) == iterations
        np.testing.assert_allclose(found.centroids_BKD[i].numpy(), centroids, atol=1e-5)
        assert found.sizes_BK[i].tolist() == np.bincount(labels, minlength=6).tolist()


def test_a_loose_tolerance_stops_early_and_assigns_once_more() -> None:
    points, mask = batch([60], 60, 4, seed=1)
    start = starts(points, [60], 5)
    strict, loose = kmeans(points, mask, start, tolerance=0.0), kmeans(points, mask, start, tolerance=0.5)
    assert int(loose.iterations_B) < int(strict.iterations_B)
    nearest = torch.cdist(points[0], loose.centroids_BKD[0]).argmin(1)
    assert torch.equal(loose.labels_BT[0], nearest)
    assert int(kmeans(points, mask, start, tolerance=0.0, max_iterations=2).iterations_B) == 2


def test_company_changes_no_bit() -> None:
    lengths = [40, 64, 23, 57] * 30
    points, mask = batch(lengths, 64, 128, seed=2)
    start = starts(points, lengths, 20)
    together = kmeans(points, mask, start)
    for i in (0, 1, 2, 3, 77):
        alone = kmeans(points[i : i + 1], mask[i : i + 1], start[i : i + 1])
        for name in vars(alone):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[i]), name


def test_padding_and_absent_clusters_do_not_count() -> None:
    points, mask = batch([5, 20], 32, 8, seed=3)
    start = torch.zeros(2, 8, 8)
    there = torch.zeros(2, 8, dtype=torch.bool)
    for i, n in enumerate((5, 20)):
        rows = start_positions([n], 8)
        start[i, : len(rows)], there[i, : len(rows)] = points[i, rows], True
    found = kmeans(points, mask, start, there)
    assert torch.equal(found.centroids_BKD[0, :5], points[0, :5])
    assert found.sizes_BK[0].tolist() == [1] * 5 + [0] * 3
    loud = torch.where(mask[:, :, None], points, 1e3)
    again = kmeans(loud, mask, start, there)
    assert all(torch.equal(getattr(found, n), getattr(again, n)) for n in ("centroids_BKD", "labels_BT", "sizes_BK"))


def test_ties_go_to_the_first_cluster() -> None:
    points = torch.tensor([[[0.0], [2.0], [1.0]]])
    found = kmeans(points, torch.ones(1, 3, dtype=torch.bool), torch.tensor([[[0.0], [2.0]]]), max_iterations=1)
    assert found.centroids_BKD.flatten().tolist() == [0.5, 2.0]


def test_a_cluster_that_loses_all_points_takes_the_farthest() -> None:
    # Both centroids start at 0: the second is empty and moves to 10, the point farthest from its centroid.
    points = torch.tensor([[[0.0], [1.0], [10.0]]])
    found = kmeans(points, torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 2, 1))
    assert found.centroids_BKD.flatten().tolist() == [0.5, 10.0]
    assert found.labels_BT.tolist() == [[0, 0, 1]]


def test_fewer_distinct_points_than_clusters_leave_clusters_empty() -> None:
    points = torch.tensor([[[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 2])
    found = kmeans(points, torch.ones(1, 6, dtype=torch.bool), points[:, [0, 1, 4, 5]])
    assert sorted(found.sizes_BK[0].tolist()) == [0, 0, 2, 4]
    filled = found.sizes_BK[0] > 0
    assert {tuple(c) for c in found.centroids_BKD[0, filled].tolist()} == {(1.0, 0.0), (0.0, 1.0)}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    points, mask = batch([6, 6, 6], 8, 4, seed=4)
    points[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"finite.*query 1"):
        kmeans(points, mask, points[:, :2].nan_to_num(0.0, 0.0, 0.0))


def test_a_start_of_any_layout_and_none_that_is_not_finite() -> None:
    points_BTD, mask_BT = torch.randn(2, 9, 3), torch.ones(2, 9, dtype=torch.bool)
    start_BKD = points_BTD[:, :4].clone()
    permuted = start_BKD.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # the same numbers, laid out otherwise
    assert not permuted.is_contiguous()
    one, two = (kmeans(points_BTD, mask_BT, start) for start in (start_BKD, permuted))
    assert torch.equal(one.centroids_BKD, two.centroids_BKD) and torch.equal(one.labels_BT, two.labels_BT)
    start_BKD[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match="start_BKD"):
        kmeans(points_BTD, mask_BT, start_BKD)


def test_wrong_arguments() -> None:
    points, mask = batch([6, 6], 8, 4, seed=5)
    with pytest.raises(ValueError, match="start_BKD"):
        kmeans(points, mask, points[:1, :2])
    with pytest.raises(ValueError, match="mask_BT"):
        kmeans(points, mask[:, :7], points[:, :2])
    with pytest.raises(ValueError, match=r"mask_BT.*query 1"):
        kmeans(points, mask & torch.tensor([[True], [False]]), points[:, :2])
    with pytest.raises(ValueError, match="points_BTD"):
        kmeans(points.half(), mask, points[:, :2].half())
    assert kmeans(points[:0], mask[:0], points[:0, :2]).labels_BT.shape == (0, 8)
    assert isinstance(kmeans(points, mask, points[:, :2]), Clusters)


def test_start_positions_by_hand() -> None:
    # linspace(0, 4, 3) = 0, 2, 4: two clusters a passage, at the first and the last token of each.
    assert start_positions([5, 3], 4) == [0, 4, 5, 7]
    # linspace(0, 7, 4) rounded down = 0, 2, 4, 7.
    assert start_positions([10, 10, 10], 7) == [0, 9, 10, 19, 20, 24, 29]
    assert start_positions([9], 4) == [0, 2, 5, 8]
    assert start_positions([0, 4, 0, 4], 4) == start_positions([4, 4], 4)
    assert start_positions([2, 1], 24) == [0, 1, 2]
    # One token for a share of three: the two left over go to the passages with room, best ranked first.
    assert start_positions([1, 6, 6], 9) == sorted({0, *[1 + r for r in (0, 1, 3, 5)], *[7 + r for r in (0, 1, 3, 5)]})
    assert start_positions([], 24) == start_positions([0, 0], 24) == []


@pytest.mark.parametrize("clusters", [1, 2, 24])
def test_start_positions_are_distinct_and_as_many_as_asked(clusters: int) -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        lengths = random.integers(0, 12, random.integers(1, 5)).tolist()
        rows = start_positions(lengths, clusters)
        assert len(rows) == len(set(rows)) == min(clusters, sum(lengths))
        assert all(0 <= row < sum(lengths) for row in rows)
