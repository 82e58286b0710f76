"""Shards stay, queries travel: every actor owns a range of shards, query batches go to all, top lists are merged.

Shapes: B queries, Q rows, D dimensions, K results, M vectors, k neighbours.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import torch

from ckd_ray.progress import say
from ckd_ray.retrieve.merge import merge_neighbours, merge_top
from ckd_ray.retrieve.shard_range import ShardRange
from ckd_ray.store import EmbeddingStore

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SearchSettings:
    """How candidates are found: `engine` is `exact` or `faiss`; the rest counts for faiss only."""

    engine: str
    cells: int | str = "auto"
    nprobe: int = 32
    candidates: int = 1024
    seed: int = 17


class ShardServer:
    """An actor that holds some shards of a store and answers for these."""

    def __init__(self, store: str, shards: Sequence[int], settings: SearchSettings, threads: int) -> None:
        torch.set_num_threads(max(1, threads))
        self._store, self._shards, self._settings = store, shards, settings

    @cached_property
    def range(self) -> ShardRange:
        """Loaded by the first call and not by the constructor, whose errors Ray reports without their type."""
        return ShardRange(
            EmbeddingStore.open(self._store),
            self._shards,
            engine=self._settings.engine,
            cells=self._settings.cells,
            nprobe=self._settings.nprobe,
            candidates=self._settings.candidates,
            seed=self._settings.seed,
        )

    def ready(self) -> int:
        """Passages served; returns when the index stands."""
        return self.range.num_passages

    def search(self, queries_BQD: Float32Array, depth: int) -> tuple[Float32Array, Int64Array]:
        """Top `depth` of this range: scores_BK and dense passage indices passages_BK."""
        return self.range.search(torch.from_numpy(queries_BQD.copy()), depth)

    def nearest_tokens(self, vectors_MD: Float32Array, k: int) -> tuple[Float32Array, Int64Array, Int64Array]:
        """Distances, vocabulary ids and positions of the k nearest token embeddings of this range."""
        return self.range.nearest_token_ids(torch.from_numpy(vectors_MD.copy()), k)


@dataclass(frozen=True)
class ServerGroup:
    """Handles of all servers of a store; small, so it travels to the tasks that ask."""

    actors: tuple[Any, ...]

    def search(self, queries_BQD: Float32Array, depth: int) -> tuple[Float32Array, Int64Array]:
        """Top `depth` over all shards."""
        batch = ray.put(queries_BQD)
        parts = ray.get([actor.search.remote(batch, depth) for actor in self.actors])
        return merge_top(parts, depth)

    def nearest_tokens(self, vectors_MD: Float32Array, k: int) -> Int64Array:
        """Vocabulary ids (M, k) of the nearest token embeddings of the whole store, nearest first."""
        batch = ray.put(vectors_MD)
        parts = ray.get([actor.nearest_tokens.remote(batch, k) for actor in self.actors])
        return merge_neighbours(parts, k)[1]


class serving:
    """Starts the servers of a store for the length of a `with` block.

    Args:
        servers: how many; `auto` takes one a core (or as many as there are shards).
    """

    def __init__(self, store: EmbeddingStore, settings: SearchSettings, servers: int | str = "auto") -> None:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        # A faiss index of its own for every range would change the candidates with the number of servers, so there is
        # one.
        wanted = (1 if settings.engine == "faiss" else cpus) if servers == "auto" else int(servers)
        count = max(1, min(wanted, store.num_shards))
        self._bounds = np.linspace(0, store.num_shards, count + 1).astype(int)
        self._store, self._settings, self._count = store, settings, count
        self._threads = max(1, min(os.cpu_count() or 1, cpus // count))
        self._actors: list[Any] = []

    def __enter__(self) -> ServerGroup:
        remote = ray.remote(num_cpus=0.5, max_restarts=-1, max_task_retries=-1)(ShardServer)
        for low, high in zip(self._bounds[:-1], self._bounds[1:], strict=True):
            shards = list(range(int(low), int(high)))
            self._actors.append(remote.remote(self._store.uri, shards, self._settings, self._threads))
        task = "building an IVF-PQ index over" if self._settings.engine == "faiss" else "loading"
        say(f"  {task} {self._store.num_tokens:,} token embeddings ({self._count} servers)")
        try:
            ray.get([actor.ready.remote() for actor in self._actors])
        except BaseException:
            self.__exit__(None, None, None)  # `with` does not, when entering fails
            raise
        return ServerGroup(tuple(self._actors))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors:
            ray.kill(actor)
