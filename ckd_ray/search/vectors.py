"""The token embeddings of all passages as Parquet: `id`, `text`, `vectors: list<fixed_size_list<float16>[dim]>`.

A file holds the passages of one shard of the store, in their order. Shapes: T rows of a block, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ckd_ray.data import Collection
from ckd_ray.files import join, list_files, write_atomic
from ckd_ray.progress import Progress
from ckd_ray.store import EmbeddingStore

# Rows of a block, which becomes a row group: 16 MiB at 128 dimensions.
_ROWS_A_BLOCK = 1 << 16


def write_vectors(target: str, store: EmbeddingStore, collection: Collection) -> dict[str, Any]:
    """Write the files of `target` that are not there yet. A passage that could not be embedded has no vectors."""
    present = set(list_files(target, ".parquet"))
    with Progress("export", store.num_passages, "passages") as progress:
        for number, (first, stop) in enumerate(store.spans()):
            name = f"part-{number:06d}.parquet"
            if name not in present:
                write_atomic(join(target, name), partial(_write_part, store, collection, first, stop))
            progress.reach(stop)
    return {}


def _write_part(store: EmbeddingStore, collection: Collection, first: int, stop: int, stream: pa.NativeFile) -> None:
    vectors = pa.list_(pa.list_(pa.float16(), store.dim))
    schema = pa.schema({"id": pa.string(), "text": pa.large_string(), "vectors": vectors})
    with pq.ParquetWriter(stream, schema, compression="zstd", use_dictionary=False) as file:
        for low, high in _blocks(store, first, stop):
            read = store.gather(np.arange(low, high))
            flat = pa.FixedSizeListArray.from_arrays(pa.array(read.embeddings_TD.numpy().reshape(-1)), store.dim)
            offsets = np.concatenate([[0], np.cumsum(read.lengths)]).astype(np.int32)
            columns = [
                pa.array(collection.passage_ids(np.arange(low, high)), pa.string()),
                pa.array(collection.iter_passages(low, high), pa.large_string()),
                pa.ListArray.from_arrays(pa.array(offsets), flat),
            ]
            file.write_table(pa.table(columns, schema=schema))


def _blocks(store: EmbeddingStore, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Consecutive passages of about `_ROWS_A_BLOCK` rows."""
    ends = np.cumsum(store.lengths()[first:stop], dtype=np.int64)
    cuts = np.flatnonzero(np.diff(ends // _ROWS_A_BLOCK)) + 1
    bounds = [first, *(first + cuts).tolist(), stop]
    return pairwise(bounds)
