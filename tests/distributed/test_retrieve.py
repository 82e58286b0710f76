"""Shard servers through real Ray: any number of shards and actors, a killed server, placement, the stage's recall."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from ckd_ray.errors import JobError, UserError
from ckd_ray.ray_util.parts import CPUS_OF_WAITING, run_parts
from ckd_ray.retrieve import answers as waiting
from ckd_ray.retrieve.answers import arrived
from ckd_ray.retrieve.in_task import TaskSearch
from ckd_ray.retrieve.servers import SearchSettings, ServerGroup, plan_servers, serving
from ckd_ray.retrieve.stream import MOST_EFFORT, RecallSample, RetrieveJob
from ckd_ray.store import BrokenShardError, shard_name
from tests.exact_index import ExactIndex
from tests.unit.test_retrieve import clustered, passages, queries, write


def test_shards_and_servers_do_not_change_a_bit(ray_session: None, tmp_path: Path) -> None:
    """Exact and centroids; 1, 4 and 16 shards; 1 and 2 servers."""
    documents, asked = passages(160), queries(6).numpy()
    truth = ExactIndex(torch.cat(documents), np.array([len(d) for d in documents])).search(queries(6), 20)
    found = {"exact": [], "centroids": []}
    for shards, servers in ((1, 1), (4, 2), (16, 1)):
        plain = write(tmp_path / f"fp16-{shards}", documents, shards)
        coded = write(tmp_path / f"coded-{shards}", documents, shards, codec="residual4")
        for store, settings in (
            (plain, SearchSettings("exact")),
            (coded, SearchSettings("centroids", nprobe=4, candidates=40)),
        ):
            with serving(store, settings, servers) as group:
                found[settings.engine].append((*group.search(asked, 20), group.nearest_tokens(asked[0], 6)))
    for answers in found.values():
        for other in answers[1:]:
            assert all(np.array_equal(a, b) for a, b in zip(answers[0], other, strict=True))
    assert np.array_equal(found["exact"][0][0], truth[0]) and np.array_equal(found["exact"][0][1], truth[1])


def test_little_work_is_done_without_servers_to_the_same_bits(ray_session: None, tmp_path: Path) -> None:
    documents, asked = passages(160), queries(6).numpy()
    store = write(tmp_path, documents, 4)
    with (
        serving(store, SearchSettings("exact"), 2) as group,
        serving(store, SearchSettings("exact"), "auto", 96) as own,
    ):
        assert isinstance(own, TaskSearch) and not isinstance(group, TaskSearch)
        for a, b in zip(own.search(asked, 20), group.search(asked, 20), strict=True):
            assert np.array_equal(a, b)
        assert np.array_equal(own.search_exactly(asked, 20)[1], group.search_exactly(asked, 20)[1])
        assert np.array_equal(own.nearest_tokens(asked[0], 6), group.nearest_tokens(asked[0], 6))
    for servers, vectors in ((2, 96), ("auto", 1e13 / (2 * store.num_tokens * store.dim) + 1), ("auto", math.inf)):
        with serving(store, SearchSettings("exact"), servers, vectors) as group:
            assert not isinstance(group, TaskSearch)
    with serving(store, SearchSettings("faiss"), "auto", 96) as group:
        assert not isinstance(group, TaskSearch)
    path, codes = tmp_path / shard_name(3), store.shard(3).codes.tobytes()
    time.sleep(0.05)
    with open(path, "r+b") as file:
        file.seek(path.read_bytes().index(codes) + 1)
        file.write(bytes([codes[1] ^ 0x40]))
    with pytest.raises(BrokenShardError):
        own.search(asked, 10)


def test_a_killed_server_comes_back_and_answers_the_same(ray_session: None, tmp_path: Path) -> None:
    documents, asked = passages(80), queries(4).numpy()
    store = write(tmp_path, documents, 4)
    with serving(store, SearchSettings("exact"), 2) as group:
        before = group.search(asked, 10)
        pid = ray.get(group.actors[1].placed.remote())
        batch = ray.put(asked)
        running = [actor.search.remote(batch, 10) for actor in group.actors]  # on its way when the process dies
        os.kill(pid, signal.SIGKILL)
        after = group.search(asked, 10)
        ray.get(running)
        assert ray.get(group.actors[1].placed.remote()) != pid
    assert np.array_equal(before[0], after[0]) and np.array_equal(before[1], after[1])


def test_a_server_without_a_machine_is_waited_for_with_a_limit(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that lost its GPU waited for another one for ever, as survivors leave none free."""
    monkeypatch.setattr(waiting, "_PLACE_S", 1.5)
    monkeypatch.setattr(waiting, "_LOOK_EVERY_S", 0.2)

    @ray.remote(num_cpus=2, max_restarts=5, max_task_retries=-1)
    class Server:
        def pid(self) -> int:
            return os.getpid()

        def busy(self, seconds: float) -> str:
            time.sleep(seconds)
            return "done"

    server = Server.remote()
    pid = ray.get(server.pid.remote())
    started = time.monotonic()
    assert list(arrived({server.busy.remote(2.5): server}, "2 CPU")) == ["done"], "computing has no limit"
    assert time.monotonic() - started >= 2.5
    given_back = tmp_path / "given-back"

    @ray.remote(num_cpus=1)
    def hold() -> None:
        while not given_back.exists():
            time.sleep(0.05)

    taken = hold.remote()  # takes a CPU as soon as the process has ended
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(JobError, match=r"1 of the servers.*no machine for 2 s.*each needs 2 CPU, 0 GPU") as error:
        list(arrived({server.busy.remote(0): server}, "2 CPU, 0 GPU"))
    assert "the cluster has 2 CPU and 0 GPU" in str(error.value)
    given_back.touch()
    ray.get(taken)
    monkeypatch.setattr(waiting, "_PLACE_S", 60.0)
    assert list(arrived({server.busy.remote(0): server}, "")) == ["done"], "it found a place after all"
    ray.kill(server)
    monkeypatch.setattr(waiting, "_PLACE_S", 1.5)
    # GPUs that are declared and not there.
    absent = Server.options(num_gpus=1).remote()
    with pytest.raises(JobError, match="each needs 1 GPU"):
        list(arrived({absent.pid.remote(): absent}, "1 GPU"))
    ray.kill(absent)


def test_a_server_gives_no_answer_from_a_shard_that_was_changed_under_it(ray_session: None, tmp_path: Path) -> None:
    store = write(tmp_path, passages(80), 4)
    asked = queries(4).numpy()
    with serving(store, SearchSettings("exact"), 2) as group:
        group.search(asked, 10)
        path, codes = tmp_path / shard_name(3), store.shard(3).codes.tobytes()
        time.sleep(0.05)  # the clock of the file system ticks every few milliseconds
        with open(path, "r+b") as file:
            file.seek(path.read_bytes().index(codes) + 1)
            file.write(bytes([codes[1] ^ 0x40]))
        for ask in (group.search, group.search_exactly):
            with pytest.raises(BrokenShardError, match=f"{shard_name(3)}: its bytes do not match its checksum"):
                ask(asked, 10)
        with pytest.raises(BrokenShardError):
            group.nearest_tokens(asked[0], 5)


def test_recall_is_measured_and_not_assumed(ray_session: None, tmp_path: Path) -> None:
    """Rankings that miss a known share of the exact top are reported with that share."""
    from ckd_ray.ray_util.parts import part_file
    from ckd_ray.retrieve.rankings import write_ranking_matrix, write_ranking_part

    documents, asked = clustered(300, 12)
    store = write(tmp_path / "passages", documents, 2)
    write(tmp_path / "queries", list(asked), 1)
    scores, ranked = ExactIndex(torch.cat(documents), np.array([len(d) for d in documents])).search(asked, 20)
    ranked[:, 15:] = np.arange(1000, 1005)  # five of twenty are wrong
    job = RetrieveJob("run", "train", str(tmp_path / "queries"), str(tmp_path / "out"), 20)
    write_ranking_part(
        str(tmp_path / "out" / part_file("train", 0)),
        first_query=0,
        query_ids=[f"q{i}" for i in range(12)],
        scores_BK=scores,
        passages_BK=ranked,
        passage_ids=[str(p) for p in ranked.ravel()],
    )
    write_ranking_matrix(job.out, "train", [(0, 12)], 20)
    with serving(store, SearchSettings("faiss", candidates=64, nprobe=2)) as group:
        sample = RecallSample(job, group, 12, operations=1.0, seed=3)
        assert sample.written() == {"recall_at_20": 0.75, "recall_queries": 12}


@pytest.mark.parametrize("engine", ["faiss", "centroids"])
def test_effort_is_raised_until_the_recall_is_reached(ray_session: None, tmp_path: Path, engine: str) -> None:
    documents, asked = clustered(300, 12)
    store = write(tmp_path / "passages", documents, 2, codec="residual4" if engine == "centroids" else "fp16")
    write(tmp_path / "queries", list(asked), 1)
    job = RetrieveJob("run", "train", str(tmp_path / "queries"), str(tmp_path / "out"), 20)
    with serving(store, SearchSettings(engine, nprobe=1, candidates=20), 1 if engine == "faiss" else 2) as group:
        truth = group.search_exactly(asked.numpy(), 20)[1]

        def recall(effort: int) -> float:
            found = replace(group, effort=effort).search(asked.numpy(), 20)[1]
            return sum(len(np.intersect1d(a, b)) for a, b in zip(truth, found, strict=True)) / truth.size

        first = recall(1)
        assert first < 0.97
        sample = RecallSample(job, group, 12, operations=1.0, seed=3)
        assert sample.effort_for(first) == (1, first)
        effort, reached = sample.effort_for(0.97)
        assert reached >= 0.97 > recall(effort // 2) and effort > 1 and reached == recall(effort)
        # What cannot be reached: the least effort of the highest recall.
        effort, reached = sample.effort_for(1.1)
        tried = {2**i: recall(2**i) for i in range(MOST_EFFORT.bit_length())}
        assert reached == max(tried.values()) and effort == min(e for e, r in tried.items() if r == reached)


def _ask(batch: dict[str, np.ndarray], servers: ServerGroup, asked: np.ndarray) -> pa.Table:
    _, found = servers.search(asked, 5)
    return pa.table({"part": batch["part"], "best": [int(found[0, 0])]})


def test_two_jobs_whose_servers_hold_the_cluster_both_go_on(ray_session: None, tmp_path: Path) -> None:
    """The tasks of both find a place beside four servers on two cores. They waited for one another for ever."""
    documents, asked = passages(80), queries(4).numpy()
    store = write(tmp_path, documents, 4)
    spans = [(i, i + 1) for i in range(6)]
    with serving(store, SearchSettings("exact"), 2) as one, serving(store, SearchSettings("exact"), 2) as other:
        assert ray.available_resources().get("CPU", 0.0) < 0.25
        best = int(one.search(asked, 5)[1][0, 0])
        for group in (one, other):
            arguments = {"servers": group, "asked": asked}
            rows = list(run_parts(list(range(6)), spans, _ask, arguments, CPUS_OF_WAITING))
            assert sorted((row["part"], row["best"]) for row in rows) == [(i, best) for i in range(6)]


def test_placement_is_refused_with_numbers(ray_session: None) -> None:
    sizes = {"shards": 8, "tokens": 10**9, "passages": 10**7, "dim": 128}
    with pytest.raises(UserError, match="do not fit") as error:
        plan_servers(SearchSettings("exact"), 4, resources={"CPU": 2}, **sizes)
    assert "at most 3 servers" in str(error.value) and "4 asked for" in str(error.value)
    with pytest.raises(UserError, match="memory") as error:
        plan_servers(SearchSettings("faiss"), "auto", resources={"CPU": 2, "memory": 2**30}, **sizes)
    assert "at most 1.0 GiB" in str(error.value) and "27.0 GiB" in str(error.value)
    # One server holds the whole index of faiss: two nodes of 16 GiB have the memory, and no room for it.
    large = {"CPU": 16, "GPU": 4, "memory": 32 * 2**30}
    with pytest.raises(UserError, match="does not fit the memory of one node") as error:
        plan_servers(SearchSettings("faiss"), "auto", resources=large, node_memory=16 * 2**30, **sizes)
    assert "at most 16.0 GiB" in str(error.value) and "27.0 GiB" in str(error.value)
    with pytest.raises(UserError, match="does not fit the memory of one node"):
        plan_servers(SearchSettings("centroids"), 1, resources=large, node_memory=2 * 2**30, **sizes)
    assert plan_servers(SearchSettings("centroids"), 4, resources=large, node_memory=2 * 2**30, **sizes).gpus == 1.0
    alone = plan_servers(SearchSettings("faiss"), "auto", resources=large, node_memory=32 * 2**30, **sizes)
    assert (alone.servers, alone.gpus) == (1, 0.0), "faiss-cpu has no use for a GPU"
    plan = plan_servers(SearchSettings("centroids"), "auto", resources={"CPU": 16, "GPU": 4}, **sizes)
    assert (plan.servers, plan.gpus, plan.threads, plan.memory) == (4, 1.0, 4, (4 * 10**9 + 12 * 10**7) // 4)
    assert plan_servers(SearchSettings("exact"), 8, resources={"CPU": 16, "GPU": 4}, **sizes).gpus == 0.5
    for servers, gpus in ((3, 2), (5, 4), (6, 4)):
        share = plan_servers(SearchSettings("exact"), servers, resources={"CPU": 16, "GPU": gpus}, **sizes).gpus
        assert gpus * int(1 / share) >= servers, "each finds a GPU that has so much left"
    assert plan_servers(SearchSettings("faiss"), 2, resources={"CPU": 2}, **sizes).servers == 1
    assert plan_servers(SearchSettings("exact"), "auto", resources={"CPU": 2}, **{**sizes, "shards": 1}).servers == 1
