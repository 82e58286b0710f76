"""Candidates from the centroids of a store's residual codec, without a second index.

The idea is PLAID's (Santhanam et al., CIKM 2022): a row is close to its centroid, so a passage's score can be estimated
from centroids alone. A query row probes its nearest centroids. A passage that has none of them gets the similarity of
the first centroid that was not probed, which is its upper bound. Memory: up to 4 bytes a stored row (its passage in the
inverted lists). `_native.c` computes the same as the code here, 30 times as fast.

An estimate depends on the query, the passage and the codec only, so the best of all ranges together are the same
however the store is cut. Shapes: B queries, Q rows, K centroids, C centroids probed by a row, M vectors, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckd_ray.arrays import Float32Array, Int32Array, Int64Array, IntArray
from ckd_ray.errors import JobError
from ckd_ray.native import LONG, POINTER, in_threads, load_library
from ckd_ray.retrieve.rows import ShardRows
from ckd_ray.store.codec import Residual

# Numbers of a block of similarities to all centroids: 128 MiB of float64.
_BLOCK = 1 << 24
_MOST_PASSAGES = 2**31 - 1


def probe(
    vectors_MD: Tensor, centroids_KD: Tensor, count: int, device: torch.device | str = "cpu"
) -> tuple[Int32Array, Float32Array]:
    """The `count` centroids of greatest inner product: (ids (M, C), similarities (M, C)), greatest first.

    The products are exact in float64 for float16 rows (exact.py), so the choice is the same on every machine.
    """
    count = min(count, len(centroids_KD))
    centroids_DK = centroids_KD.to(device).double().T.contiguous()
    ids = np.empty((len(vectors_MD), count), np.int32)
    similarity = np.empty((len(vectors_MD), count), np.float32)
    step = max(1, _BLOCK // max(1, len(centroids_KD)))
    for start in range(0, len(vectors_MD), step):
        top = (vectors_MD[start : start + step].to(device).double() @ centroids_DK).topk(count, dim=1)
        ids[start : start + step] = top.indices.int().cpu().numpy()
        similarity[start : start + step] = top.values.float().cpu().numpy()
    return ids, similarity


def probes(
    queries_BQD: Tensor, centroids_KD: Tensor, nprobe: int, device: torch.device | str = "cpu"
) -> tuple[Int32Array, Float32Array]:
    """Centroids of every query row and the similarity to each: (B, Q, C), C = nprobe + 1 (or K). The last one is not
    probed; it bounds what a passage without the others can have."""
    flat = queries_BQD.half().reshape(-1, queries_BQD.shape[2])
    ids, similarity = probe(flat, centroids_KD, nprobe + 1, device)
    shape = (*queries_BQD.shape[:2], ids.shape[1])
    return ids.reshape(shape), similarity.reshape(shape)


@lru_cache(maxsize=1)
def _library() -> Any:
    """The built library, or None."""
    return load_library(__file__, {"ckd_ray_candidates": [POINTER] * 4 + [LONG] * 6 + [POINTER] * 2})


class CentroidLists:
    """Inverted lists: centroid -> the passages that have it, ascending, each once.

    Attributes:
        bounds: (K + 1,) int64, where each list begins; passages: int32, the lists one after another.
        num_passages: what the numbers in the lists are below.
    """

    def __init__(self, bounds: Int64Array, passages: Int32Array, num_passages: int) -> None:
        self.bounds, self.passages, self.num_passages = bounds, passages, num_passages

    @classmethod
    def build(
        cls,
        shards: Callable[[], Iterable[IntArray]],
        offsets: Int64Array,
        num_centroids: int,
        room: Callable[[int], Any] | None = None,
    ) -> CentroidLists:
        """From the centroid of every row, shard after shard, read twice. Memory: a shard's and the lists.

        Args:
            offsets: (N + 1,) the first row of each passage. A passage lies in one shard.
            room: makes the array of so many entries that the lists go into; one in memory when None.
        """
        counts = np.zeros(num_centroids, np.int64)
        for centroids, _ in _occurrences(shards(), offsets):
            counts += np.bincount(centroids, minlength=num_centroids)
        bounds = np.concatenate([[0], np.cumsum(counts)])
        passages = room(int(bounds[-1])) if room else np.empty(bounds[-1], np.int32)
        free = bounds[:-1].copy()  # the next place in every list
        for centroids, found in _occurrences(shards(), offsets):
            counts = np.bincount(centroids, minlength=num_centroids)
            starts = np.cumsum(counts) - counts
            passages[(free - starts)[centroids] + np.arange(len(centroids))] = found
            free += counts
        return cls(bounds, passages, len(offsets) - 1)

    def check(self, num_centroids: int) -> None:
        """Raises ValueError for lists that were not made by `build`, such as those of a damaged file."""
        sound = self.bounds.dtype == np.int64 and self.bounds.shape == (num_centroids + 1,)
        sound = sound and self.bounds[0] == 0 and bool((np.diff(self.bounds) >= 0).all())
        sound = sound and self.passages.dtype == np.int32 and self.passages.shape == (self.bounds[-1],)
        if not sound:
            raise ValueError("the bounds are not those of the lists")
        if len(self.passages) and (self.passages.min() < 0 or self.passages.max() >= self.num_passages):
            raise ValueError(f"a list holds passages outside of 0 to {self.num_passages - 1}")

    def candidates(
        self, ids_BQC: Int32Array, similarity_BQC: Float32Array, limit: int
    ) -> tuple[Float32Array, Int64Array]:
        """The `limit` passages with the highest estimates: (estimates, passages) (B, limit), best first.

        Ties are ordered by passage number; lists end with -inf and -1. An estimate is the score of a passage minus that
        of a passage without any probed centroid.
        """
        estimates = np.full((len(ids_BQC), limit), -np.inf, np.float32)
        passages = np.full((len(ids_BQC), limit), -1, np.int64)
        library = _library()
        if library is None:
            for i, (ids_QC, similarity_QC) in enumerate(zip(ids_BQC, similarity_BQC, strict=True)):
                self._candidates(ids_QC, similarity_QC, estimates[i], passages[i])
            return estimates, passages
        (_, Q, C), every = ids_BQC.shape, ids_BQC.shape[2] == len(self.bounds) - 1
        inputs: list[Any] = [np.ascontiguousarray(a) for a in (ids_BQC, similarity_BQC)]

        def part(first: int, count: int) -> int:
            ids, similarity, *outputs = (a[first:].ctypes.data for a in (*inputs, estimates, passages))
            lists = (self.bounds.ctypes.data, self.passages.ctypes.data)
            sizes = (count, Q, C, every, limit, self.num_passages)
            return int(library.ckd_ray_candidates(*lists, ids, similarity, *sizes, *outputs))

        in_threads(part, len(ids_BQC), "candidates")
        return estimates, passages

    def _candidates(
        self, ids_QC: Int32Array, similarity_QC: Float32Array, estimates: Float32Array, passages: Int64Array
    ) -> None:
        """`candidates` of one query, without C; writes to the last two arguments."""
        total = np.zeros(self.num_passages, np.float32)
        every = ids_QC.shape[1] == len(self.bounds) - 1
        for ids_C, similarity_C in zip(ids_QC, similarity_QC, strict=True):
            if not similarity_C.any():
                continue  # a zero row, after the text of a query without augmentation
            # When all centroids are probed, a passage without any of them is empty.
            floor = np.float32(-1.0) if every else similarity_C[-1]
            best = np.zeros(self.num_passages, np.float32)
            for centroid, gain in zip(ids_C.tolist(), similarity_C - floor, strict=True):
                listed = self.passages[self.bounds[centroid] : self.bounds[centroid + 1]]
                best[listed] = np.maximum(best[listed], gain)
            total += best
        found = np.flatnonzero(total)
        order = np.lexsort((found, -total[found]))[: len(estimates)]
        estimates[: len(order)], passages[: len(order)] = total[found[order]], found[order]


def _occurrences(shards: Iterable[IntArray], offsets: Int64Array) -> Iterator[tuple[IntArray, Int64Array]]:
    """(centroids, passages) of every shard: each centroid of a passage once, by centroid and then by passage."""
    first = 0
    for ids in shards:
        by = np.argsort(ids, kind="stable")
        centroids, passages = ids[by], np.searchsorted(offsets, by + first, side="right") - 1
        again = (centroids[1:] == centroids[:-1]) & (passages[1:] == passages[:-1])
        new = np.concatenate([np.ones(min(1, len(ids)), bool), ~again])
        yield centroids[new], passages[new]
        first += len(ids)


class CentroidIndex:
    """The lists of a range of shards, and what a query probes.

    Args:
        rows: of shards whose codec is residual.
        nprobe: centroids probed by a query row.
        device: where products with all centroids are computed.

    Raises:
        JobError: the range has more passages than 32-bit numbers can count.
    """

    def __init__(self, rows: ShardRows, codec: Residual, nprobe: int, device: torch.device | str = "cpu") -> None:
        if rows.num_passages > _MOST_PASSAGES:
            raise JobError(
                f"a range of {rows.num_passages:,} passages is more than one server can list "
                f"({_MOST_PASSAGES:,}); raise retrieve.actors"
            )
        self.rows, self.codec, self.nprobe, self.device = rows, codec, nprobe, device
        self.lists = CentroidLists.build(rows.centroid_ids, rows.offsets, codec.num_centroids)

    def probes(self, queries_BQD: Tensor, effort: int = 1) -> tuple[Int32Array, Float32Array]:
        """Centroids of every query row: ids and similarities (B, Q, C), C = nprobe * effort + 1 (or K)."""
        return probes(queries_BQD, self.codec.centroids_KD, self.nprobe * effort, self.device)

    def candidates(
        self, ids_BQC: Int32Array, similarity_BQC: Float32Array, limit: int
    ) -> tuple[Float32Array, Int64Array]:
        """`CentroidLists.candidates`, with passages as indices in the whole store."""
        estimates, passages = self.lists.candidates(ids_BQC, similarity_BQC, limit)
        return estimates, np.where(passages >= 0, passages + self.rows.first, -1)
