"""Candidates from the centroids of a store's residual codec, without a second index.

The idea is PLAID's (Santhanam et al., CIKM 2022): a row is close to its centroid, so a passage's score can be estimated
from centroids alone. A query row probes its nearest centroids. A passage that has none of them gets the similarity of
the first centroid that was not probed, which is its upper bound. Memory: 4 bytes a stored row (its passage in the
inverted lists).

An estimate depends on the query, the passage and the codec only, so the best of all ranges together are the same
however the store is cut. Shapes: B queries, Q rows, K centroids, C centroids probed by a row, M vectors, D dimensions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ckd_ray.arrays import Float32Array, Int32Array, Int64Array
from ckd_ray.errors import JobError
from ckd_ray.retrieve.rows import ShardRows
from ckd_ray.store.codec import Residual

# Numbers of a block of similarities to all centroids: 128 MiB of float64.
_BLOCK = 1 << 24
_MOST_ROWS = 2**31 - 1


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


class CentroidIndex:
    """Inverted lists of a range of shards: centroid -> the passage of each of its rows.

    Args:
        rows: of shards whose codec is residual.
        nprobe: centroids probed by a query row.
        device: where products with all centroids are computed.

    Raises:
        JobError: the range has more rows than 32-bit numbers can count.
    """

    def __init__(self, rows: ShardRows, codec: Residual, nprobe: int, device: torch.device | str = "cpu") -> None:
        if rows.num_rows > _MOST_ROWS:
            raise JobError(
                f"a range of {rows.num_rows:,} token embeddings is more than one server can list "
                f"({_MOST_ROWS:,}); raise retrieve.actors"
            )
        self.rows, self.codec, self.nprobe, self.device = rows, codec, nprobe, device
        counts = np.zeros(codec.num_centroids, np.int64)
        for ids in rows.centroid_ids():
            counts += np.bincount(ids, minlength=codec.num_centroids)
        self.bounds = np.concatenate([[0], np.cumsum(counts)])
        self.passages = self._lists()
        self._total = np.zeros(rows.num_passages, np.float32)
        self._stamp = np.zeros(rows.num_passages, np.int32)

    def _lists(self) -> Int32Array:
        """The passage of each row, by centroid, and by row within each. Sorted shard by shard, which needs no memory
        but that of the lists."""
        passages = np.empty(self.rows.num_rows, np.int32)
        free, first = self.bounds[:-1].copy(), 0  # the next place in every list; the shard's first row
        for ids in self.rows.centroid_ids():
            by = np.argsort(ids, kind="stable")
            counts = np.bincount(ids, minlength=len(free))
            starts = np.cumsum(counts) - counts
            places = (free - starts)[ids[by]] + np.arange(len(by))
            passages[places] = np.searchsorted(self.rows.offsets, by + first, side="right") - 1
            free += counts
            first += len(ids)
        return passages

    def probes(self, queries_BQD: Tensor) -> tuple[Int32Array, Float32Array]:
        """Centroids of every query row: ids and similarities (B, Q, C), C = nprobe + 1 (or K)."""
        flat = queries_BQD.half().reshape(-1, queries_BQD.shape[2])
        ids, similarity = probe(flat, self.codec.centroids_KD, self.nprobe + 1, self.device)
        shape = (*queries_BQD.shape[:2], ids.shape[1])
        return ids.reshape(shape), similarity.reshape(shape)

    def candidates(
        self, ids_BQC: Int32Array, similarity_BQC: Float32Array, limit: int
    ) -> tuple[Float32Array, Int64Array]:
        """The `limit` passages of this range with the highest estimates: (estimates, passages) (B, limit), best first.

        Passages are indices in the whole store; ties go by index; lists end with -inf and -1.
        """
        estimates = np.full((len(ids_BQC), limit), -np.inf, np.float32)
        passages = np.full((len(ids_BQC), limit), -1, np.int64)
        for i, (ids_QC, similarity_QC) in enumerate(zip(ids_BQC, similarity_BQC, strict=True)):
            found, gain = self._gains(ids_QC, similarity_QC)
            if len(found) > limit:
                edge = np.partition(gain, len(gain) - limit)[len(gain) - limit]
                kept = gain >= edge
                found, gain = found[kept], gain[kept]
            best = np.lexsort((found, -gain))[:limit]
            estimates[i, : len(best)] = gain[best]
            passages[i, : len(best)] = found[best] + self.rows.first
        return estimates, passages

    def _gains(self, ids_QC: Int32Array, similarity_QC: Float32Array) -> tuple[Int64Array, Float32Array]:
        """Passages that have a probed centroid, and by how much their estimate exceeds that of all others."""
        total, stamp = self._total, self._stamp
        total[:] = 0
        every = ids_QC.shape[1] == self.codec.num_centroids
        for ids_C, similarity_C in zip(ids_QC, similarity_QC, strict=True):
            if not similarity_C.any():
                continue  # a zero row, after the text of a query without augmentation
            # When all centroids are probed, a passage without any of them is empty.
            floor = np.float32(-1.0) if every else similarity_C[-1]
            # In ascending order the last entry of a passage is its best one, and that one is kept.
            ids = ids_C[::-1] if every else ids_C[-2::-1]
            gains = (similarity_C[::-1] if every else similarity_C[-2::-1]) - floor
            lows, highs = self.bounds[ids], self.bounds[ids + 1]
            listed = np.concatenate([self.passages[a:b] for a, b in zip(lows.tolist(), highs.tolist(), strict=True)])
            number = np.arange(len(listed), dtype=np.int32)
            stamp[listed] = number
            last = np.flatnonzero(stamp[listed] == number)
            total[listed[last]] += np.repeat(gains, highs - lows)[last]
        found = np.flatnonzero(total)
        return found, total[found]
