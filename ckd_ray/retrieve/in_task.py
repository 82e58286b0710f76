"""Exact search of a small store by the task that asks: no server has to start, which would take longer than the search.

Shapes: B queries, Q rows, D dimensions, K results, M vectors, k neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import ray
import torch

from ckd_ray.arrays import Float32Array, Int64Array
from ckd_ray.files import file_signature, join
from ckd_ray.retrieve.merge import merge_neighbours
from ckd_ray.retrieve.shard_range import SearchSettings, ShardRange
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.embeddings import MANIFEST

# Every process that searches verifies the store first, and more work than this is worth a server on every machine.
_MOST_BYTES = 256 * 2**20
_MOST_OPERATIONS = 1e13


@dataclass(frozen=True)
class TaskSearch:
    """Answers as `ServerGroup` does, in the process that asks; small, so tasks receive a copy.

    Attributes:
        cpus: how many CPUs a task that calls it reserves.
    """

    store: str
    cpus: float = 1.0

    @classmethod
    def suits(cls, store: EmbeddingStore, vectors: float) -> bool:
        """Whether so many query rows are little work over this store, and the cluster has no GPU that would do it."""
        operations = 2.0 * vectors * store.num_tokens * store.dim
        small = 2 * store.num_tokens * store.dim <= _MOST_BYTES and operations <= _MOST_OPERATIONS
        return small and not ray.cluster_resources().get("GPU")

    def search(self, queries_BQD: Float32Array, depth: int) -> tuple[Float32Array, Int64Array]:
        """Top `depth`: scores_BK and dense passage indices passages_BK."""
        opened = self._range()
        found = opened.search(torch.from_numpy(queries_BQD.copy()), depth)
        opened.check_unchanged()
        return found

    def search_exactly(self, queries_BQD: Float32Array, depth: int) -> tuple[Float32Array, Int64Array]:
        """The same."""
        return self.search(queries_BQD, depth)

    def nearest_tokens(self, vectors_MD: Float32Array, k: int) -> Int64Array:
        """Vocabulary ids (M, k) of the nearest token embeddings, nearest first."""
        opened = self._range()
        found = opened.nearest_token_ids(torch.from_numpy(vectors_MD.copy()), k)
        opened.check_unchanged()
        return merge_neighbours([found], k)[1]

    def _range(self) -> ShardRange:
        return _opened(self.store, *file_signature(join(self.store, MANIFEST)))


@lru_cache(maxsize=2)
def _opened(uri: str, size: int, changed: int) -> ShardRange:
    store = EmbeddingStore.open(uri)
    return ShardRange(store, range(store.num_shards), SearchSettings("exact"))
