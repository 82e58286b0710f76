"""IVF-PQ over token embeddings, for candidate passages and nearest tokens (method.md, steps 2 to 4).

Shapes: T stored token embeddings, M vectors, k neighbours, B queries, Q rows, D dimensions.
"""

from __future__ import annotations

import os
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ckd_ray.arrays import Float32Array, Int32Array, Int64Array
from ckd_ray.files import has_digest, replace_atomically, sha256_of, write_atomic
from ckd_ray.progress import say
from ckd_ray.retrieve.rows import RangeRows

_TRAINING_POINTS_A_CELL = 64
_MOST_TRAINING_POINTS = 2_000_000
DIGEST = ".sha256"  # the ending of the file with the digest of a kept index
_ADDED = 1 << 17  # rows added at a time


def choose_cells(num_tokens: int) -> int:
    """The power of two next to 2 sqrt(T), from 1 to 2^18, with at least 39 embeddings a cell (what k-means wants).

    8.8 million passages of 68 tokens get 32,768 to 65,536 cells; the paper took 32,768.
    """
    wanted = 2 ** round(np.log2(max(1.0, 2 * np.sqrt(num_tokens))))
    while wanted > 1 and num_tokens / wanted < 39:
        wanted //= 2
    return int(min(wanted, 1 << 18))


def choose_subquantizers(dim: int) -> int:
    """16 as published where D can be cut into 16 parts, else the largest divisor of D below that."""
    return max(m for m in range(1, 17) if dim % m == 0)


class TokenIndex:
    """A trained and filled IVF-PQ index.

    Args:
        rows: of the store; read and converted a block at a time.
        cells: number of inverted lists, `auto` for `choose_cells`.
        seed: of the training sample and of faiss' own k-means.
        kept: a local file, memory-mapped when it is there, else written when the index is built.
    """

    def __init__(
        self,
        rows: RangeRows,
        *,
        cells: int | str = "auto",
        nprobe: int = 32,
        seed: int = 17,
        kept: str | None = None,
    ) -> None:
        import faiss

        self.index: Any = None
        faiss.omp_set_num_threads(torch.get_num_threads())
        if kept and _is_intact(kept):
            self.index = cast(Any, faiss.read_index(kept, faiss.IO_FLAG_MMAP))
            self.cells = int(self.index.nlist)
        else:
            self._build(rows, cells, seed)
            if kept:
                self._keep(kept)
        self.nprobe = nprobe

    def _build(self, rows: RangeRows, cells: int | str, seed: int) -> None:
        import faiss

        count, dim = rows.num_rows, rows.take(np.zeros(1, np.int64)).shape[1]
        self.cells = choose_cells(count) if cells == "auto" else max(1, min(int(cells), count // 39))
        bits = 8 if count >= 256 * 39 // 4 else max(1, min(8, int(np.log2(max(2, count // 10)))))
        quantizer = faiss.IndexFlatL2(dim)
        self.index = faiss.IndexIVFPQ(quantizer, dim, self.cells, choose_subquantizers(dim), bits)
        self._quantizer = quantizer  # faiss keeps a bare pointer to it
        self.index.cp.seed = self.index.pq.cp.seed = seed
        self.index.cp.min_points_per_centroid = self.index.pq.cp.min_points_per_centroid = 1
        size = min(count, max(10_000, self.cells * _TRAINING_POINTS_A_CELL), _MOST_TRAINING_POINTS)
        sample = np.sort(np.random.default_rng(seed).choice(count, size, replace=False))
        self.index.train(rows.take(sample).float().numpy())
        for start in range(0, count, _ADDED):
            self.index.add(rows.take(np.arange(start, min(count, start + _ADDED))).float().numpy())

    def _keep(self, kept: str) -> None:
        """Write the index, then its digest."""
        import faiss

        with replace_atomically(kept) as temporary:
            faiss.write_index(cast(Any, self.index), temporary)
            digest = sha256_of(temporary).encode()
        write_atomic(kept + DIGEST, lambda stream: stream.write(digest))

    def nearest(self, vectors_MD: Tensor, k: int, effort: int = 1) -> tuple[Float32Array, Int64Array]:
        """Approximate squared distances and positions of the k nearest embeddings, nearest first; +inf and -1 behind
        the end. `effort` times as many cells are visited."""
        self.index.nprobe = min(self.nprobe * effort, self.cells)
        distances, positions = self.index.search(vectors_MD.float().contiguous().numpy(), k)
        return np.where(positions < 0, np.inf, distances), positions


def _is_intact(kept: str) -> bool:
    """Whether there is an index with the bytes of its digest."""
    if not (os.path.exists(kept) and os.path.exists(kept + DIGEST)):
        return False
    with open(kept + DIGEST) as file:
        intact = has_digest(kept, file.read())
    if not intact:
        say(f"{kept}: its bytes do not match its checksum; it is built again")
    return intact


def candidate_passages(
    distances_QK: Float32Array, positions_QK: Int64Array, passage_of: Int32Array, limit: int
) -> Int64Array:
    """The `limit` best passages of one query's nearest embeddings, in ascending order.

    Passages are ordered by the sum over query rows of their best approximate similarity. For a row without a neighbour
    of the passage the similarity of the row's farthest neighbour counts, which is its upper bound.

    Args:
        distances_QK, positions_QK: K nearest embeddings of each of the Q query rows.
        passage_of: the passage of every embedding.
    """
    rows_QK = np.broadcast_to(np.arange(len(positions_QK))[:, None], positions_QK.shape)
    met = positions_QK >= 0
    similarity_QK = -distances_QK / 2  # of unit rows: <q, d> - 1
    farthest_Q = np.where(met, similarity_QK, np.inf).min(1)
    gain = similarity_QK[met] - farthest_Q[rows_QK[met]]
    keys = passage_of[positions_QK[met]].astype(np.int64) * len(positions_QK) + rows_QK[met]
    # Rows are nearest first, so the first of equal keys is the passage's best embedding for that query row.
    unique, best = np.unique(keys, return_index=True)
    passages = unique // len(positions_QK)
    starts = np.flatnonzero(np.diff(passages, prepend=-1))
    if len(starts) <= limit:
        return passages[starts]
    total = np.add.reduceat(gain[best], starts)
    return np.sort(passages[starts][np.argpartition(-total, limit)[:limit]])
