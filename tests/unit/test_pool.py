"""Pools are refused with numbers before anything starts, and shards do not depend on who computes them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from ckd_ray.checks import load_config
from ckd_ray.embed.stream import plan_shards
from ckd_ray.errors import UserError
from ckd_ray.pipeline.runner import run_stages
from ckd_ray.progress import duration
from ckd_ray.ray_util.actor_pool import Node, place_pool, plan_pool
from ckd_ray.ray_util.pool_start import StartsInTime
from ckd_ray.runs.fingerprint import fingerprint
from tests.support import overrides, write_collection


def test_one_actor_a_core_leaves_room_for_the_feeders() -> None:
    pool = plan_pool("auto", "auto", limit=100, nodes=[Node(8)])
    assert (pool.actors, pool.threads, pool.gpus_per_actor) == (8, 1, 0)
    assert pool.actors * pool.cpus_per_actor + pool.feeders * pool.feeder_cpus <= 8 + 1e-9
    # What a small task of somebody else takes does not cost an actor; two cores and no share for a feeder do.
    assert plan_pool("auto", "auto", limit=100, nodes=[Node(1.9)]).actors == 2
    assert plan_pool("auto", "auto", limit=100, nodes=[Node(1.8)]).actors == 1


def test_one_actor_a_gpu() -> None:
    pool = plan_pool("auto", "auto", limit=100, nodes=[Node(16, 4)])
    assert (pool.actors, pool.gpus_per_actor, pool.cpus_per_actor) == (4, 1, 1)
    assert (pool.feeders, pool.feeder_cpus) == (12, 1.0)
    assert plan_pool("auto", 0.5, limit=100, nodes=[Node(16, 4)]).actors == 8
    assert (pool.most, plan_pool(2, "auto", limit=100, nodes=[Node(16, 4)]).most) == (100, 2)  # where GPUs come later


def test_no_gpu_is_left_out_for_want_of_cpus() -> None:
    pool = plan_pool("auto", "auto", limit=100, nodes=[Node(4, 4)])
    assert pool.actors == 4 and pool.cpus_per_actor < 1
    assert pool.actors * pool.cpus_per_actor + pool.feeder_cpus <= 4 + 1e-9


def test_an_actor_fits_one_node() -> None:
    """A share of 0.6 fits a GPU once, not 1.67 times."""
    nodes = [Node(8, 3), Node(8, 2), Node(8, 3)]
    assert plan_pool("auto", 1, limit=100, nodes=nodes).actors == 8
    assert plan_pool("auto", 0.6, limit=100, nodes=[Node(16, 3)]).actors == 3
    assert plan_pool("auto", "auto", limit=100, nodes=[Node(0.5), Node(4), Node(0.5)]).actors == 4
    with pytest.raises(
        UserError, match=r"each within one node(.|\n)*3 nodes with 24 CPU and 8 GPU \(at most 8 CPU and 3"
    ):
        plan_pool(9, 1, limit=100, nodes=nodes)


def test_few_shards_need_few_actors() -> None:
    pool = plan_pool("auto", "auto", limit=1, nodes=[Node(4)])
    assert (pool.actors, pool.threads) == (1, 4)


@pytest.mark.parametrize(
    ("actors", "gpus", "node", "room"),
    [(3, "auto", Node(2), 2), (2, 1, Node(8, 1), 1), ("auto", 1, Node(8), 0), (1, "auto", Node(0.5), 0)],
)
def test_what_does_not_fit_is_refused_with_numbers(actors: Any, gpus: Any, node: Node, room: int) -> None:
    with pytest.raises(UserError, match=rf"embed\.actors(.|\n)*at most {room} (.|\n)*1 node with {node.cpus:g} CPU"):
        plan_pool(actors, gpus, limit=100, nodes=[node])


@pytest.mark.parametrize("gpus", [1.5, 2])
def test_more_than_a_gpu_is_refused(gpus: float) -> None:
    with pytest.raises(UserError, match=rf"embed\.gpus_per_actor(.|\n)*{gpus:g}"):
        plan_pool("auto", gpus, limit=1, nodes=[Node(8, 4)])


def test_what_other_jobs_hold_is_waited_for_and_then_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    total = [Node(8)]
    seen = iter([[Node(0)], [Node(0)], [Node(8)]])  # a look at the totals, one that finds nothing free, one that does
    monkeypatch.setattr("ckd_ray.ray_util.actor_pool.cluster_nodes", lambda: (total, next(seen)))
    assert place_pool(8, "auto", limit=100).actors == 8 and next(seen, None) is None
    monkeypatch.setattr("ckd_ray.ray_util.actor_pool.cluster_nodes", lambda: (total, [Node(3)]))
    assert place_pool("auto", "auto", limit=100, patience=0.1).actors == 3
    with pytest.raises(UserError, match=r"other jobs(.|\n)*8 asked for; 1 node with 3 CPU(.|\n)*of 1 node with 8 CPU"):
        place_pool(8, "auto", limit=100, patience=0.1)


def test_more_shards_than_a_plan_holds_are_refused() -> None:
    assert len(plan_shards(140_000_000, "auto")) == 11_506
    with pytest.raises(UserError, match=r"embed\.passages_per_shard(.|\n)*at least 2800, or auto, which is 16384 here"):
        plan_shards(140_000_000, 100)
    with pytest.raises(UserError, match=r"found: 1: 100,000 shards for 100,000 texts(.|\n)*passages_per_shard=512"):
        plan_shards(100_000, 1)
    assert len(plan_shards(100_000, 512)) == 196, "the advice works"


def test_tiny_shards_are_refused_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the collection is read, and without Ray: the teacher's training would be for nothing."""
    write_collection(tmp_path / "in")
    config = load_config(
        None, overrides(tmp_path, "no-such-encoder", str(tmp_path / "in"), "embed.passages_per_shard=1")
    )
    monkeypatch.setattr("ckd_ray.embed.stream._MOST_SHARDS", 50)
    with pytest.raises(UserError, match=r"found: 1: 60 shards for 60 texts"):
        run_stages(config)
    assert not (tmp_path / "tiny" / "teacher").exists() and (tmp_path / "tiny" / "corpus" / "_manifest.json").exists()


def test_shards_cover_the_corpus_once() -> None:
    for count, size in ((0, "auto"), (1, "auto"), (17_268, "auto"), (8_841_823, "auto"), (10, 3)):
        spans = plan_shards(count, size)
        assert [f for f, _ in spans] == [0, *[s for _, s in spans[:-1]]][: len(spans)]
        assert (spans[-1][1] if spans else 0) == count
    assert len(plan_shards(8_841_823, "auto")) == 727 and len(plan_shards(17_268, "auto")) == 45


def test_the_last_shards_are_smaller_so_that_actors_end_together() -> None:
    sizes = [stop - first for first, stop in plan_shards(17_268, "auto")]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[:25] == [512] * 25 and sum(sizes[26:]) < 17_268 / 4 and set(sizes[-6:-1]) == {128}
    assert [stop - first for first, stop in plan_shards(600, "auto")] == [128, 128, 128, 128, 75, 13]
    assert plan_shards(60, "auto") == [(0, 60)]


def test_fingerprints_follow_values_and_not_their_order() -> None:
    assert fingerprint(a=1, b={"x": 1, "y": 2}) == fingerprint(b={"y": 2, "x": 1}, a=1)
    assert fingerprint(a=1) != fingerprint(a=1.5) != fingerprint(a="1")


def test_durations() -> None:
    assert [duration(s) for s in (7.26, 245, 7800)] == ["7.3 s", "4 min 05 s", "2 h 10 min"]


def test_a_pool_is_given_up_when_no_actor_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def executor(*running: int) -> Any:
        pools = [SimpleNamespace(num_running_actors=lambda count=count: count) for count in running]
        return SimpleNamespace(_topology=[SimpleNamespace(get_autoscaling_actor_pools=lambda: pools)])

    none, late, tasks = StartsInTime(), StartsInTime(), StartsInTime()
    for seconds in (1.0, 899.0):
        now[0] = seconds
        none.on_execution_step(executor(0))
        late.on_execution_step(executor(0 if seconds == 1.0 else 1))
        tasks.on_execution_step(executor())
    now[0] = 901.0
    with pytest.raises(ray.exceptions.GetTimeoutError, match="no actor has started within 900 s"):
        none.on_execution_step(executor(0))
    late.on_execution_step(executor(0))  # it has died since, and Ray starts it again
    tasks.on_execution_step(executor())
