"""Search by actors that own a range of shards each: query batches go to all of them, and their top lists are merged.

Shapes: B queries, Q rows, D dimensions, K results, N candidates, C centroids probed, M vectors, k neighbours.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import ray
import torch

from ckd_ray.arrays import Float32Array, Int32Array, Int64Array
from ckd_ray.errors import JobError, UserError
from ckd_ray.progress import say
from ckd_ray.ray_util.machines import alive
from ckd_ray.ray_util.parts import CPUS_OF_WAITING
from ckd_ray.ray_util.processes import actor_device
from ckd_ray.ray_util.waiting import LOOK_S, answer
from ckd_ray.retrieve.answers import arrived
from ckd_ray.retrieve.in_task import TaskSearch
from ckd_ray.retrieve.int8 import choose_first_pass
from ckd_ray.retrieve.merge import merge_neighbours, merge_top
from ckd_ray.retrieve.shard_range import SearchSettings, ShardRange
from ckd_ray.store import EmbeddingStore

Lists = tuple[Float32Array, Int64Array]
T = TypeVar("T")

# A little less than half, so that the servers of several jobs leave something for the tasks that ask them.
_CPUS_A_SERVER = 0.49
# A killed server starts again; one that dies every time (out of memory) fails the job in the end.
_RESTARTS = 20
_START_SECONDS = 300.0


class ShardServer:
    """An actor that searches some shards of a store; `processes` servers share its machine, this one included."""

    def __init__(
        self, store: str, shards: Sequence[int], settings: SearchSettings, threads: int, processes: int = 1
    ) -> None:
        torch.set_num_threads(max(1, min(threads, os.cpu_count() or 1)))
        self._store, self._shards, self._settings, self._processes = store, shards, settings, processes

    @cached_property
    def range(self) -> ShardRange:
        """Loaded by the first call and not by the constructor, whose errors Ray reports without their type."""
        store = EmbeddingStore.open(self._store)
        return ShardRange(store, self._shards, self._settings, actor_device(), self._processes)

    def placed(self) -> int:
        """The process id; returns as soon as the actor runs."""
        return os.getpid()

    def ready(self) -> int:
        """Passages served; returns when the index is built."""
        return self.range.num_passages

    def first_pass(self) -> tuple[str, str]:
        """The first pass of exact search on large ranges, and the reason (`int8.choose_first_pass`)."""
        if torch.device(self.range.device).type != "cpu":
            return "float32", "on a GPU"
        return choose_first_pass()

    def search(self, queries_BQD: Float32Array, depth: int, effort: int = 1) -> Lists:
        """Top `depth` of this range: scores_BK and dense passage indices passages_BK."""
        return self._checked(self.range.search(torch.from_numpy(queries_BQD.copy()), depth, effort))

    def search_exactly(self, queries_BQD: Float32Array, depth: int) -> Lists:
        """The same by exact search, whatever the engine."""
        return self._checked(self.range.search_exactly(torch.from_numpy(queries_BQD.copy()), depth))

    def probes(self, queries_BQD: Float32Array, effort: int = 1) -> tuple[Int32Array, Float32Array]:
        """Engine `centroids`: the centroids that each query row probes (B, Q, C)."""
        return self.range.probes(torch.from_numpy(queries_BQD.copy()), effort)

    def candidates(self, probes: tuple[Int32Array, Float32Array], limit: int) -> Lists:
        """Engine `centroids`: estimates and passages of this range's best candidates (B, N)."""
        return self._checked(self.range.candidates(*probes, limit))

    def score(self, queries_BQD: Float32Array, passages_BN: Int64Array, depth: int) -> Lists:
        """Top `depth` of the given passages that lie in this range."""
        return self._checked(self.range.score(torch.from_numpy(queries_BQD.copy()), passages_BN, depth))

    def nearest_tokens(self, vectors_MD: Float32Array, k: int) -> tuple[Float32Array, Int64Array, Int64Array]:
        """Distances, vocabulary ids and positions of the k nearest token embeddings of this range."""
        return self._checked(self.range.nearest_token_ids(torch.from_numpy(vectors_MD.copy()), k))

    def _checked(self, answer: T) -> T:
        """The answer, if the shards are still the bytes that were verified."""
        self.range.check_unchanged()
        return answer


@dataclass(frozen=True)
class ServerGroup:
    """Handles of all servers of a store; small, so tasks receive a copy.

    Attributes:
        effort: of approximate search, see `ShardRange.search`.
        cpus: how many CPUs a task that calls it reserves.
    """

    actors: tuple[Any, ...]
    settings: SearchSettings
    needs: str = ""
    effort: int = 1
    cpus: float = CPUS_OF_WAITING

    def _asked(self, method: str, *arguments: Any) -> Iterator[Any]:
        """The answers of all servers, as they arrive."""
        return arrived({getattr(actor, method).remote(*arguments): actor for actor in self.actors}, self.needs)

    def search(self, queries_BQD: Float32Array, depth: int) -> Lists:
        """Top `depth` over all shards.

        Engine `centroids` asks all servers twice, for estimates and then for scores, so that the candidates are the
        best of the whole store and not of each range.
        """
        batch = ray.put(queries_BQD)
        if self.settings.engine != "centroids":
            return _merged(self._asked("search", batch, depth, self.effort), depth)
        # Every server gives the same answer; the choice spreads the work.
        one = self.actors[zlib.crc32(np.ascontiguousarray(queries_BQD).data) % len(self.actors)]
        probes = one.probes.remote(batch, self.effort)
        limit = max(depth, self.settings.candidates * self.effort)
        _, passages_BN = _merged(self._asked("candidates", probes, limit), limit)
        chosen = ray.put(passages_BN)
        return _merged(self._asked("score", batch, chosen, depth), depth)

    def search_exactly(self, queries_BQD: Float32Array, depth: int) -> Lists:
        """Top `depth` over all shards by exact search, to compare with."""
        batch = ray.put(queries_BQD)
        return _merged(self._asked("search_exactly", batch, depth), depth)

    def nearest_tokens(self, vectors_MD: Float32Array, k: int) -> Int64Array:
        """Vocabulary ids (M, k) of the nearest token embeddings of the whole store, nearest first."""
        batch = ray.put(vectors_MD)
        return merge_neighbours(list(self._asked("nearest_tokens", batch, k)), k)[1]


def _merged(answers: Iterable[Lists], depth: int) -> Lists:
    """The best of all answers, merged as they arrive, so that two lists are held at a time."""
    best: Lists | None = None
    for found in answers:
        best = merge_top([found] if best is None else [best, found], depth)
    assert best is not None
    return best


Searcher = ServerGroup | TaskSearch


@dataclass(frozen=True)
class Placement:
    """`servers` actors with these resources each; `threads` each may use."""

    servers: int
    cpus: float
    gpus: float
    memory: int
    threads: int

    @property
    def needs(self) -> str:
        """What a server reserves."""
        return f"{self.cpus:g} CPU, {self.gpus:g} GPU and {self.memory / 2**30:.1f} GiB"


def index_bytes(settings: SearchSettings, tokens: int, passages: int, dim: int) -> int:
    """Memory of the indexes of a whole store, all servers together.

    exact: nothing that grows (rows stay mapped). centroids: a 32-bit number a row, and three a passage. faiss: 16
    bytes of code, 8 of id and 4 of passage a row, and up to two million float32 rows while it is trained.
    """
    if settings.engine == "centroids":
        return 4 * tokens + 12 * passages
    if settings.engine == "faiss":
        return 28 * tokens + 4 * dim * min(tokens, 2_000_000)
    return 0


def plan_servers(
    settings: SearchSettings,
    wanted: int | str,
    *,
    shards: int,
    tokens: int,
    passages: int,
    dim: int,
    resources: dict[str, float],
    node_memory: float | None = None,
) -> Placement:
    """How many servers of what size: one a GPU, or one a core, at most one a shard; one in all for faiss.

    A faiss index of its own for every range would change the candidates with the number of servers. Its server has no
    GPU, which our index does not use.

    Args:
        resources: of the cluster, `memory` in bytes.
        node_memory: bytes of the node with the most; a server never spans two.

    Raises:
        UserError: what was asked for, or the index, does not fit the cluster.
    """
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    gpus = 0.0 if settings.engine == "faiss" else gpus
    room = int(cpus / _CPUS_A_SERVER) - 1  # the last one leaves room for tokenisers and the like
    natural = int(gpus) if gpus >= 1 else max(1, int(cpus))
    asked = natural if wanted == "auto" else int(wanted)
    needed = index_bytes(settings, tokens, passages, dim)
    if room < 1 or (wanted != "auto" and asked > room):
        raise UserError(
            "the servers of the store do not fit the cluster",
            where="retrieve.actors",
            expected=f"at most {max(0, room)} servers of {_CPUS_A_SERVER:g} CPU",
            found=f"{asked} asked for; the cluster has {cpus:g} CPU",
            fix="set retrieve.actors: auto, or add nodes",
        )
    count = 1 if settings.engine == "faiss" else max(1, min(asked, room, shards))
    for space, used, what in (
        (resources.get("memory"), needed, "the cluster's memory"),
        (node_memory, needed / count, "the memory of one node, which a server of it needs"),
    ):
        if space is not None and used > space:
            raise UserError(
                f"the index of engine {settings.engine} does not fit {what}",
                where="retrieve.engine",
                expected=f"at most {space / 2**30:.1f} GiB",
                found=f"{used / 2**30:.1f} GiB for {tokens:,} token embeddings in {count} servers",
                fix="add nodes (a larger one for faiss, which has one server), or take a residual codec (embed.codec)"
                " and retrieve.engine: centroids",
            )
    # The share of a GPU is one over a whole number of servers: two servers of 2/3 do not fit one GPU.
    share = 1 / math.ceil(count / int(gpus)) if gpus >= 1 else 0.0
    return Placement(count, _CPUS_A_SERVER, share, needed // count, max(1, int(cpus) // count))


class serving:
    """Starts the servers of a store for the length of a `with` block.

    Args:
        servers: how many; `auto` takes one a GPU or core (or as many as there are shards).
        vectors: about how many query rows will be searched with, when that is known: little work over a small store is
            done without servers, where `servers` is `auto` and the search exact.

    Raises:
        UserError: they do not fit the cluster.
        JobError: other jobs hold the cluster's resources.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        settings: SearchSettings,
        servers: int | str = "auto",
        vectors: float = math.inf,
    ) -> None:
        self._in_task = settings.engine == "exact" and servers == "auto" and TaskSearch.suits(store, vectors)
        self._plan = plan_servers(
            settings,
            servers,
            shards=store.num_shards,
            tokens=store.num_tokens,
            passages=store.num_passages,
            dim=store.dim,
            resources=ray.cluster_resources(),
            node_memory=max((node["Resources"].get("memory", math.inf) for node in alive()), default=None),
        )
        self._bounds = np.linspace(0, store.num_shards, self._plan.servers + 1).astype(int)
        self._store, self._settings = store, settings
        self._actors: list[Any] = []

    def __enter__(self) -> Searcher:
        plan = self._plan
        if self._in_task:
            say(f"  {self._store.num_tokens:,} token embeddings, few enough to be searched without servers")
            return TaskSearch(self._store.uri)
        options: dict[str, Any] = {"num_cpus": plan.cpus, "max_restarts": _RESTARTS, "max_task_retries": -1}
        if plan.gpus:
            options["num_gpus"] = plan.gpus
        if plan.memory:
            options["memory"] = plan.memory
        remote = ray.remote(**options)(ShardServer)
        nodes = sum(node["Resources"].get("CPU", 0) > 0 for node in alive())
        processes = math.ceil(plan.servers / max(1, nodes))
        for low, high in zip(self._bounds[:-1], self._bounds[1:], strict=True):
            shards = list(range(int(low), int(high)))
            self._actors.append(remote.remote(self._store.uri, shards, self._settings, plan.threads, processes))
        try:
            self._wait_until_placed()
            task = {"faiss": "an IVF-PQ index over", "centroids": "inverted lists of"}.get(self._settings.engine, "")
            what = f"building {task}" if task else "loading"
            servers = "1 server" if plan.servers == 1 else f"{plan.servers} servers"
            say(f"  {what} {self._store.num_tokens:,} token embeddings ({servers})")
            list(arrived({actor.ready.remote(): actor for actor in self._actors}, plan.needs))
            if self._settings.engine == "exact":
                first, reason = answer("the servers of the store", self._actors[0].first_pass.remote(), LOOK_S)
                say(f"  {first} first pass, exact scores ({reason})")
        except BaseException:
            self.__exit__(None, None, None)  # `with` does not, when entering fails
            raise
        return ServerGroup(tuple(self._actors), self._settings, plan.needs)

    def _wait_until_placed(self) -> None:
        """The servers fit the cluster, but another job may hold what they need; that is an error after a while."""
        calls = [actor.placed.remote() for actor in self._actors]
        done, waiting = ray.wait(calls, num_returns=len(calls), timeout=_START_SECONDS)
        if waiting:
            free = ray.available_resources()
            raise JobError(
                f"only {len(done)} of {len(calls)} servers could be started within {_START_SECONDS:.0f} s: each needs "
                f"{self._plan.needs}; free are "
                f"{free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU and {free.get('memory', 0) / 2**30:.1f} GiB. "
                "Set retrieve.actors lower, or wait until other jobs have ended"
            )
        answer("the servers of the store", done, LOOK_S)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors:
            ray.kill(actor)
