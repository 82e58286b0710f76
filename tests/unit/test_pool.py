"""Pools are refused with numbers before anything starts, and shards do not depend on who computes them."""

from __future__ import annotations

import pytest

from ckd_ray.embed.pool import plan_pool
from ckd_ray.embed.stream import plan_shards
from ckd_ray.errors import UserError
from ckd_ray.pipeline.fingerprint import fingerprint
from ckd_ray.progress import duration


def test_one_actor_a_core_leaves_room_for_the_feeders() -> None:
    pool = plan_pool("auto", "auto", limit=100, resources={"CPU": 8})
    assert (pool.actors, pool.threads, pool.gpus_per_actor) == (8, 1, 0)
    assert pool.actors * (pool.cpus_per_actor + pool.feeder_cpus) <= 8 + 1e-9


def test_one_actor_a_gpu() -> None:
    pool = plan_pool("auto", "auto", limit=100, resources={"CPU": 16, "GPU": 4})
    assert (pool.actors, pool.gpus_per_actor) == (4, 1)
    assert plan_pool("auto", 0.5, limit=100, resources={"CPU": 16, "GPU": 4}).actors == 8


def test_few_shards_need_few_actors() -> None:
    pool = plan_pool("auto", "auto", limit=1, resources={"CPU": 4})
    assert (pool.actors, pool.threads) == (1, 4)


@pytest.mark.parametrize(
    ("actors", "gpus", "resources"), [(3, "auto", {"CPU": 2}), (2, 1, {"CPU": 8, "GPU": 1}), ("auto", 1, {"CPU": 8})]
)
def test_what_does_not_fit_is_refused_with_numbers(actors: int, gpus: float, resources: dict[str, float]) -> None:
    with pytest.raises(UserError, match=rf"embed\.actors(.|\n)*the cluster has {resources['CPU']} CPU"):
        plan_pool(actors, gpus, limit=100, resources=resources)


def test_shards_cover_the_corpus_once() -> None:
    for count, size in ((0, "auto"), (1, "auto"), (17_268, "auto"), (8_841_823, "auto"), (10, 3)):
        spans = plan_shards(count, size)
        assert [f for f, _ in spans] == [0, *[s for _, s in spans[:-1]]][: len(spans)]
        assert (spans[-1][1] if spans else 0) == count
    assert len(plan_shards(8_841_823, "auto")) == 540 and len(plan_shards(17_268, "auto")) == 68


def test_fingerprints_follow_values_and_not_their_order() -> None:
    assert fingerprint(a=1, b={"x": 1, "y": 2}) == fingerprint(b={"y": 2, "x": 1}, a=1)
    assert fingerprint(a=1) != fingerprint(a=1.5) != fingerprint(a="1")


def test_durations() -> None:
    assert [duration(s) for s in (7.26, 245, 7800)] == ["7.3 s", "4 min 05 s", "2 h 10 min"]
