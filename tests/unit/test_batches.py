"""Batches are a function of (seed, step), and a labelled positive is never a negative."""

from __future__ import annotations

import numpy as np
import pytest

from ckd_ray.distill.batches import Batch, BatchPlan, Positives, valid_mask
from ckd_ray.distill.inputs import worker_slice
from ckd_ray.distill.task import TrainingTask
from ckd_ray.errors import UserError


def positives(*labels: list[int]) -> Positives:
    queries = np.concatenate([np.full(len(p), q) for q, p in enumerate(labels)]).astype(np.int64)
    passages = np.concatenate([np.array(p, np.int64) for p in labels])
    return Positives.from_qrels(len(labels), queries, passages, np.ones(len(queries), np.int64), 1)


def plan(**changes: object) -> BatchPlan:
    rankings = np.array([[0, 9, 1, 2, -1], [1, 9, 5, 6, 7], [3, 4, 5, 6, 7]], np.int32)
    values = {"num_passages": 10, "batch_size": 2, "negatives": 2, "seed": 3, "rankings": rankings} | changes
    return BatchPlan(positives([0, 9], [1], [3]), **values)


def test_grades_below_the_threshold_are_not_positives() -> None:
    p = Positives.from_qrels(3, np.array([0, 0, 2]), np.array([4, 5, 6]), np.array([0, 2, 1]), 1)
    assert [p.of(q).tolist() for q in range(3)] == [[5], [], [6]]
    assert p.labelled_queries.tolist() == [0, 2]


def test_any_step_can_be_drawn_alone() -> None:
    straight = [plan().batch(0), (p := plan()).batch(0), p.batch(1), p.batch(7)]
    for step in (7, 1, 0):
        again = plan().batch(step)
        expected = straight[{0: 0, 1: 2, 7: 3}[step]]
        assert np.array_equal(again.queries_B, expected.queries_B)
        assert np.array_equal(again.passages_BM, expected.passages_BM)
    assert not np.array_equal(plan(seed=4, batch_size=3).batch(0).passages_BM, plan(batch_size=3).batch(0).passages_BM)


def test_every_query_comes_once_an_epoch() -> None:
    p = plan(batch_size=1)
    for epoch in range(4):
        assert sorted(int(p.batch(3 * epoch + i).queries_B[0]) for i in range(3)) == [0, 1, 2]


def test_hard_negatives_come_from_the_top_and_are_never_labelled() -> None:
    p = plan(batch_size=3, negatives_depth=2)
    allowed = {0: {1, 2}, 1: {9, 5}, 2: {4, 5}}
    for step in range(50):
        batch = p.batch(step)
        for query, row in zip(batch.queries_B.tolist(), batch.passages_BM.tolist(), strict=True):
            assert row[0] in p.positives.of(query)
            assert set(row[1:]) == allowed[query]


def test_short_rankings_are_filled_from_the_corpus() -> None:
    p = plan(batch_size=3, negatives=4, rankings=np.full((3, 2), -1, np.int32))
    for step in range(20):
        batch = p.batch(step)
        for query, row in zip(batch.queries_B.tolist(), batch.passages_BM.tolist(), strict=True):
            assert len(row) == 5 and not set(row[1:]) & set(p.positives.of(query).tolist())


def test_a_corpus_in_which_all_is_labelled_still_gives_batches() -> None:
    p = BatchPlan(positives([0, 1]), num_passages=2, batch_size=1, negatives=1, seed=0)
    batch = p.batch(0)
    assert valid_mask(batch, p.positives).sum() == 1  # the positive alone is left


def test_no_labelled_query_is_refused() -> None:
    with pytest.raises(UserError, match="no training query has a labelled passage"):
        BatchPlan(positives([], []), num_passages=2, batch_size=1, negatives=1, seed=0)


def test_valid_mask_by_hand() -> None:
    labels = positives([10, 11], [20])
    batch = Batch(np.array([0, 1]), np.array([[10, 20, 30], [20, 11, 30]]))
    # columns: 10 20 30 | 20 11 30; query 0's positive is column 0, query 1's is column 3
    assert valid_mask(batch, labels).tolist() == [
        [True, True, True, False, False, False],  # the second 20 and 30 are repeats, 11 is labelled
        [True, False, True, True, True, False],  # column 1 is query 1's positive again
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_worker_slices_cover_the_batch_once(world: int) -> None:
    seen = [i for rank in range(world) for i in range(8)[worker_slice(8, rank, world)]]
    assert seen == list(range(8))


def test_learning_rate_warms_up_and_decays() -> None:
    task = TrainingTask("t", "r", "s", "f", 0, 10, 1, 1.0, warmup=0.2)
    rates = [task.learning_rate_at(s) for s in range(10)]
    assert rates == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
