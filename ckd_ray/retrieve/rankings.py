"""Rankings on disk. Shapes: B queries, K = depth results a query.

A part holds the rankings of consecutive queries of a split: `train-000012.parquet` with query_id, passage_id, rank
(from 1), score, and the dense query_index and passage_index. `_rows/train.npy` is written from all parts: int32
(queries, K), passage indices best first, -1 where a ranking ends, for random access in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ckd_ray.arrays import Float32Array, Int32Array, Int64Array
from ckd_ray.files import first_present, join, read_array, read_parquet, write_atomic, write_parquet
from ckd_ray.ray_util.parts import array_file, former_array_file, part_file

# Parts that are read together: an object store takes a tenth of a second for each, whatever else it does.
_READ_AT_ONCE = 32


def write_ranking_part(
    uri: str,
    *,
    first_query: int,
    query_ids: Sequence[str],
    scores_BK: Float32Array,
    passages_BK: Int64Array,
    passage_ids: Sequence[str],
) -> None:
    """Write one part atomically.

    Args:
        first_query: dense index of the part's first query.
        passages_BK: dense passage indices, best first, -1 where a ranking ends.
        passage_ids: the outside ids of `passages_BK[passages_BK >= 0]`, in that order.
    """
    present_BK = passages_BK >= 0
    counts = present_BK.sum(axis=1)
    rows = np.repeat(np.arange(len(query_ids)), counts)
    ranks = np.broadcast_to(np.arange(1, passages_BK.shape[1] + 1, dtype=np.int32), passages_BK.shape)
    table = pa.table(
        {
            "query_id": pa.array(query_ids, pa.string()).take(pa.array(rows)),
            "passage_id": pa.array(passage_ids, pa.string()),
            "rank": pa.array(ranks[present_BK], pa.int32()),
            "score": pa.array(scores_BK[present_BK], pa.float32()),
            "query_index": pa.array((rows + first_query).astype(np.int32)),
            "passage_index": pa.array(passages_BK[present_BK], pa.int64()),
        }
    )
    write_atomic(uri, lambda stream: write_parquet(table, stream))


def read_ranking_part(uri: str, columns: list[str] | None = None) -> pa.Table:
    """One part as a table."""
    return read_parquet(uri, columns)


def part_matrix(table: pa.Table, first_query: int, num_queries: int, depth: int) -> Int32Array:
    """(num_queries, depth) int32 passage indices of a part, -1 where a ranking ends."""
    matrix = np.full((num_queries, depth), -1, np.int32)
    rows = table["query_index"].to_numpy() - first_query
    ranks = table["rank"].to_numpy() - 1
    chosen = ranks < depth
    matrix[rows[chosen], ranks[chosen]] = table["passage_index"].to_numpy()[chosen]
    return matrix


def write_ranking_matrix(folder: str, split: str, spans: Sequence[tuple[int, int]], depth: int) -> None:
    """Write `_rows/SPLIT.npy` from all parts, a few of them in memory at a time; the parts are consecutive."""
    shape = (spans[-1][1] if spans else 0, depth)

    def read(part: int) -> bytes:
        first, stop = spans[part]
        table = read_ranking_part(join(folder, part_file(split, part)), ["query_index", "rank", "passage_index"])
        return part_matrix(table, first, stop - first, depth).tobytes()

    def write(stream: pa.NativeFile) -> None:
        np.lib.format.write_array_header_1_0(stream, {"descr": "<i4", "fortran_order": False, "shape": shape})
        with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
            for start in range(0, len(spans), _READ_AT_ONCE):
                for rows in pool.map(read, range(start, min(len(spans), start + _READ_AT_ONCE))):
                    stream.write(rows)

    write_atomic(array_file(folder, split), write)


def read_ranking_matrix(folder: str, split: str) -> npt.NDArray[Any]:
    """`_rows/SPLIT.npy`, memory-mapped when it is local."""
    return read_array(first_present(array_file(folder, split), former_array_file(folder, split)))
