"""An index for searches of a large store: the passages that each of some thousand centroids has.

A row of a query probes its nearest centroids, and the passages of the highest estimates (retrieve/centroids.py) are
scored exactly. The index is made once for a model's store, shard by shard. A store with a residual codec has the
centroids already; those of an fp16 store are learned from a sample, roughly, since they only choose candidates. Memory:
4 bytes for each different centroid of a passage.
Shapes: Q query rows, K centroids, D dimensions, N candidates, T rows of a shard.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ckd_ray.arrays import Int32Array, Int64Array
from ckd_ray.errors import first_line
from ckd_ray.files import delete, join, read_array, write_array
from ckd_ray.progress import Progress, say
from ckd_ray.retrieve.centroids import CentroidLists, probes
from ckd_ray.runs.artifact import is_made, make
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.codec import Residual
from ckd_ray.store.codec_training import group_centroids, sample_spans
from ckd_ray.store.spherical import spherical_kmeans

_NPROBE, _SEED = 32, 17
_MOST_CENTROIDS = 1 << 15
_SAMPLE_A_CENTROID, _ITERATIONS = 16, 3
_FILES = ("centroids", "bounds", "passages")


class SearchIndex:
    """Opened by `SearchIndex.open`, and made by `SearchIndex.make`.

    Attributes:
        centroids_KD: float16; lists: their passages, by dense index.
    """

    def __init__(self, centroids_KD: Tensor, lists: CentroidLists) -> None:
        self.centroids_KD, self.lists = centroids_KD, lists

    @classmethod
    def make(cls, folder: str, store: EmbeddingStore) -> SearchIndex:
        """The index of `store` in `folder`, which is written where it is not there or of another store.

        Raises:
            OSError: it cannot be written. UserError: the dimensions of the rows do not fill whole bytes.
        """
        found = cls.open(folder, store)
        if found is None:
            delete(folder)  # what is damaged, or of another store
            make(folder, _made_of(store), partial(_write, folder, store), digests=False)
            found = cls.open(folder, store)
        assert found is not None
        return found

    @classmethod
    def open(cls, folder: str, store: EmbeddingStore) -> SearchIndex | None:
        """The index in `folder`; None when there is none of this store, or a damaged one, which a line names."""
        if not is_made(folder, _made_of(store)):
            return None
        try:
            centroids_KD, bounds, passages = (read_array(join(folder, f"{name}.npy")) for name in _FILES)
            lists = CentroidLists(bounds, passages, store.num_passages)
            lists.check(len(centroids_KD))
            if centroids_KD.shape[1:] != (store.dim,) or centroids_KD.dtype != np.float16:
                raise ValueError(f"centroids of shape {centroids_KD.shape}")
        except (OSError, ValueError, EOFError) as error:
            why = first_line(error)
            say(f"search: the index in {folder} is damaged ({why}) and is not used; --index makes it again")
            return None
        return cls(torch.from_numpy(np.array(centroids_KD)), lists)

    def candidates(self, queries_QD: Tensor, count: int) -> Int64Array:
        """The `count` passages (N,) with the highest estimates, ascending; fewer where fewer have a probed centroid."""
        _, passages_1N = self.lists.candidates(*probes(queries_QD[None], self.centroids_KD, _NPROBE), count)
        return np.sort(passages_1N[passages_1N >= 0])


def _made_of(store: EmbeddingStore) -> str:
    return f"{store.manifest['fingerprint']}/search/1"


def _write(folder: str, store: EmbeddingStore) -> None:
    say(f"search: making an index of {store.num_tokens:,} token embeddings, once")
    codec = store.codec if isinstance(store.codec, Residual) else _learned(store)
    offsets = np.concatenate([[0], np.cumsum(store.lengths(), dtype=np.int64)])
    with tempfile.TemporaryFile() as file, Progress("index", store.num_passages, "passages") as progress:
        ids_T = np.memmap(file, np.int32, "w+", shape=(max(1, store.num_tokens),))[: store.num_tokens]
        for first, ids in _centroids(store, codec):
            ids_T[first : first + len(ids)] = ids
            progress.reach(int(np.searchsorted(offsets, first + len(ids), side="left")))
        parts = offsets[[first for first, _ in store.spans()][1:]]
        lists = CentroidLists.build(lambda: np.split(ids_T, parts), offsets, codec.num_centroids)
    arrays: list[npt.NDArray[Any]] = [codec.centroids_KD.numpy(), lists.bounds, lists.passages]
    for name, array in zip(_FILES, arrays, strict=True):
        write_array(join(folder, f"{name}.npy"), array)


def _learned(store: EmbeddingStore) -> Residual:
    """Centroids of an fp16 store: a power of two of about 4 sqrt(tokens), learned from a sample."""
    wanted = min(4 * store.num_tokens**0.5, store.num_tokens / _SAMPLE_A_CENTROID, _MOST_CENTROIDS)
    count = 2 ** int(np.log2(max(1.0, wanted)))
    rng, rows = np.random.default_rng(_SEED), list[Tensor]()
    spans = sample_spans(store.num_passages, _SEED)
    for first, stop in (spans[i] for i in rng.permutation(len(spans))):
        rows.append(store.gather(np.arange(first, stop)).embeddings_TD)
        if sum(map(len, rows)) >= count * _SAMPLE_A_CENTROID:
            break
    centroids_KD, groups = group_centroids(
        spherical_kmeans(
            torch.cat(rows), count, iterations=_ITERATIONS, points_a_centroid=2 * _SAMPLE_A_CENTROID, seed=_SEED
        ),
        _SEED,
    )
    # Nothing is encoded with it, so its buckets do not matter.
    return Residual("residual4", centroids_KD, torch.arange(15), torch.arange(16), groups=groups)


def _centroids(store: EmbeddingStore, codec: Residual) -> Iterator[tuple[int, Int32Array]]:
    """(first row, centroids of its rows) of every shard, one after another."""
    first = 0
    for i in range(store.num_shards):
        shard = store.shard(i)
        shard.verify()
        if isinstance(store.codec, Residual):
            yield first, codec.centroid_ids(shard.codes)
        else:
            yield first, codec.nearest_centroids(shard.embeddings()).int().numpy()
        first += len(shard.codes)
