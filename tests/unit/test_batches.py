"""Batches are a function of (seed, step), and a labelled positive is never a negative."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ckd_ray.config.schema import TrainingConfig
from ckd_ray.data.positives import Positives
from ckd_ray.distill.batches import Batch, BatchPlan, rank_strata, valid_mask
from ckd_ray.distill.dev import mean_reciprocal_rank, top_of_rows
from ckd_ray.distill.inputs import worker_slice
from ckd_ray.distill.placement import parse_workers
from ckd_ray.distill.progress_actor import ProgressActor
from ckd_ray.distill.task import TrainingTask
from ckd_ray.errors import UserError
from ckd_ray.model.length_buckets import even_parts, length_groups


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


def test_a_query_without_a_label_is_in_no_batch() -> None:
    """Whatever the objective: every batch comes from here."""
    for known in (positives([0], [], [3]), positives([], [1], [])):
        p = BatchPlan(known, num_passages=10, batch_size=2, negatives=2, seed=3, rankings=np.zeros((3, 5), np.int32))
        drawn = {query for step in range(20) for query in p.batch(step).queries_B.tolist()}
        assert drawn == set(known.labelled_queries.tolist())


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
        [True, False, False, True, True, True],  # column 1 is query 1's positive again, column 2 its own 30
    ]


def counts(flat: list[int], column: int, own: int) -> bool:
    """Whether a column is the one that counts among those with its passage: the first of the query's own, else the
    first of all."""
    same = [c for c, passage in enumerate(flat) if passage == flat[column]]
    return column == next((c for c in same if own < c < own + 4), same[0])


@pytest.mark.parametrize(("count", "strata"), [(100, 7), (100, 31), (12, 7), (8, 7), (7, 7), (3, 7), (0, 2), (100, 1)])
def test_strata_cover_all_ranks_and_are_narrow_at_the_top(count: int, strata: int) -> None:
    edges = rank_strata(count, strata)
    assert edges[0] == 0 and len(edges) == strata + 1 and edges[-1] == max(count, strata)
    widths = np.diff(edges)
    assert (widths >= 1).all() and (np.diff(widths) >= -1).all() and widths[0] == widths.min()


def test_strata_give_one_candidate_each_best_first() -> None:
    rankings = np.arange(1, 101, dtype=np.int32)[None]
    p = BatchPlan(
        positives([50]), num_passages=200, batch_size=1, negatives=5, seed=1, rankings=rankings, sampling="strata"
    )
    usable = [i for i in range(1, 101) if i != 50]
    edges = rank_strata(len(usable), 5)
    seen = [set() for _ in range(5)]
    for step in range(300):
        row = p.batch(step).passages_BM[0].tolist()
        assert row[0] == 50
        for stratum, passage in enumerate(row[1:]):
            assert edges[stratum] <= usable.index(passage) < edges[stratum + 1]
            seen[stratum].add(passage)
    assert seen[0] == set(usable[: edges[1]]) and len(seen[4]) > 30


def test_strata_of_short_rankings_are_filled_from_the_corpus() -> None:
    p = plan(batch_size=3, negatives=4, sampling="strata", rankings=np.array([[1, 2, -1]] * 3, np.int32))
    for step in range(20):
        batch = p.batch(step)
        for query, row in zip(batch.queries_B.tolist(), batch.passages_BM.tolist(), strict=True):
            assert len(row) == 5 and not set(row[1:]) & set(p.positives.of(query).tolist())


def test_valid_mask_equals_the_literal_version() -> None:
    random = np.random.default_rng(4)
    labels = positives(*[sorted(set(random.integers(0, 30, 1 + q % 4).tolist())) for q in range(12)])
    for _ in range(30):
        queries = random.integers(0, 12, 7)
        rows = [[int(random.choice(labels.of(q))), *random.integers(0, 30, 3).tolist()] for q in queries]
        flat = [passage for row in rows for passage in row]
        literal = [
            [
                column == 4 * i or (flat[column] not in labels.of(query) and counts(flat, column, 4 * i))
                for column in range(len(flat))
            ]
            for i, query in enumerate(queries)
        ]
        assert valid_mask(Batch(queries, np.array(rows)), labels).tolist() == literal


@pytest.mark.parametrize("sampling", ["uniform", "strata"])
@pytest.mark.parametrize("left_out", [[0], [1], [2, 9], [0, 5, 9], [1, 3, 4, 7]])
def test_what_is_left_out_changes_nothing_else(sampling: str, left_out: list[int]) -> None:
    """Passage 1 is the one label of query 1; query 0 has the labels 0 and 9."""
    known, without = plan(batch_size=3, sampling=sampling), plan(batch_size=3, sampling=sampling, left_out=left_out)
    lost = {q for q in range(3) if not set(known.positives.of(q).tolist()) - set(left_out)}
    changed = 0
    for step in range(40):
        before, after = known.batch(step), without.batch(step)
        assert not set(after.passages_BM.reshape(-1).tolist()) & set(left_out)
        if lost & set(before.queries_B.tolist()):
            assert not lost & set(after.queries_B.tolist())
            assert all(row[0] in known.positives.of(q) for q, row in zip(*vars(after).values(), strict=True))
            continue
        assert after.queries_B.tolist() == before.queries_B.tolist()
        for query, old, new in zip(before.queries_B, before.passages_BM.tolist(), after.passages_BM, strict=True):
            others = [p for p in known.positives.of(query).tolist() if p not in left_out]
            positive = old[0] if old[0] not in left_out else others[0]
            assert new.tolist() == [positive, *(positive if p in left_out else p for p in old[1:])]
        again = plan(batch_size=3, sampling=sampling, left_out=left_out).batch(step)
        assert np.array_equal(again.passages_BM, after.passages_BM)
        changed += not np.array_equal(after.passages_BM, before.passages_BM)
        copies = after.passages_BM[:, 1:] == after.passages_BM[:, :1]
        own = np.stack([row[3 * i + 1 : 3 * i + 3] for i, row in enumerate(valid_mask(after, known.positives))])
        assert not (own & copies).any(), "a copy of the positive counts for nothing"
    assert changed or lost


def test_where_all_labels_are_left_out_nothing_can_be_trained() -> None:
    with pytest.raises(UserError, match="no training query has a labelled passage"):
        plan(left_out=[0, 1, 3, 9])


def test_the_queries_of_labelled_passages() -> None:
    known = positives([0, 9], [], [9], [3])
    assert [known.queries_of(p).tolist() for p in ([], [9], [3, 0], [5])] == [[], [0, 2], [0, 3], []]


@pytest.mark.parametrize(
    ("steps", "stuck"),
    [([7, 7], True), ([7, 10], True), ([10, 7], True), ([7, 11], False), ([7], False), ([7, 300, 301], True)],
)
def test_attempts_that_come_no_further(steps: list[int], stuck: bool) -> None:
    actor = ProgressActor()
    for step in steps:
        actor.begin(3)
        actor.report(step, 0.5)
        actor.attempt_failed()
    assert actor.state() | {"loss": 0} == {
        "step": steps[-1], "loss": 0, "cause": None, "stop_requested": False, "failures": len(steps), "stuck": stuck
    }  # fmt: skip
    actor.go_on()
    assert (actor.state()["failures"], actor.state()["stuck"]) == (0, False)
    actor.attempt_failed()
    assert not actor.state()["stuck"], "the first failure after that is no second one"


def test_length_groups_cover_all_and_save_padding() -> None:
    random = np.random.default_rng(0)
    for count in (1, 2, 40, 300):
        lengths = np.minimum(random.integers(5, 300, count), 180)
        groups = length_groups(lengths, overhead=32)
        assert sorted(np.concatenate(groups).tolist()) == list(range(count)) and len(groups) <= 4
        padded = sum(int(lengths[g].max()) * len(g) for g in groups)
        assert padded + 32 * len(groups) <= int(lengths.max()) * count + 32
    # By hand: 3 x 10 + 3 x 100 tokens and two overheads are less than 6 x 100 and one.
    assert [sorted(g.tolist()) for g in length_groups(np.array([100, 10, 100, 10, 100, 10]), 50)] == [
        [1, 3, 5],
        [0, 2, 4],
    ]
    assert len(length_groups(np.array([100, 10, 100, 10, 100, 10]), 300)) == 1
    assert length_groups(np.array([], np.int64)) == []


def test_mean_reciprocal_rank_by_hand() -> None:
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 2.0], [0.0, 1.0, 2.0]], np.float32)
    relevant = np.array([[False, True, False], [False, False, True], [False, False, False]])
    # Second place; second of two equal scores, since the left one is first; nothing relevant.
    assert mean_reciprocal_rank(scores, relevant) == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    eleven = np.arange(11, 0, -1, dtype=np.float32)[None]
    assert mean_reciprocal_rank(eleven, np.arange(11)[None] == 10) == 0.0


def test_the_pool_takes_every_rows_best_first() -> None:
    scores = torch.tensor([[9.0, 8.0, 1.0, 0.0], [9.0, 0.0, 1.0, 8.0]])
    assert top_of_rows(scores, 1).tolist() == [0]
    assert top_of_rows(scores, 3).tolist() == [0, 1, 3]


@pytest.mark.parametrize(("workers", "expected"), [(4, (4, 4)), ("2-8", (2, 8)), ("auto", None)])
def test_workers(workers: int | str, expected: tuple[int, int] | None) -> None:
    assert parse_workers(workers) == expected


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_worker_slices_cover_the_batch_once(world: int) -> None:
    seen = [i for rank in range(world) for i in range(8)[worker_slice(8, rank, world)]]
    assert seen == list(range(8))


def test_learning_rate_warms_up_and_decays() -> None:
    task = TrainingTask("t", "r", "s", "f", 0, TrainingConfig(steps=10, learning_rate=1.0, warmup=0.2))
    rates = [task.learning_rate_at(s) for s in range(10)]
    assert rates == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]


def test_parts_have_as_many_tokens_each_and_none_is_empty() -> None:
    assert [p.tolist() for p in even_parts(np.array([10, 10, 20, 10, 10, 20]), 2)] == [[0, 1, 3, 4], [2, 5]]
    assert [p.tolist() for p in even_parts(np.array([1, 180, 1, 1, 1]), 4)] == [[0, 2], [3], [4], [1]]
    assert [p.tolist() for p in even_parts(np.array([180, 1, 1, 1]), 4)] == [[1], [2], [3], [0]]
    random = np.random.default_rng(3)
    for parts in (1, 2, 8):
        for _ in range(50):
            lengths = random.integers(5, 181, random.integers(parts, 200))
            found = [lengths[part] for part in even_parts(lengths, parts)]
            assert len(found) == parts and all(len(part) for part in found)
            assert np.concatenate(found).tolist() == np.sort(lengths).tolist()
            if len(lengths) > 20 * parts:
                assert max(map(np.sum, found)) - lengths.sum() / parts <= 180
    with pytest.raises(ValueError, match="3 parts of 2 texts"):
        even_parts(np.array([1, 2]), 3)
