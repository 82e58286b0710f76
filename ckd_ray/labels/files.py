"""Labels on disk (`array_parts`): a Parquet file a part with columns query_id, feedback_ids, expansion, idf and
token_ids, and an array beside it that says where the vectors of a query lie in that file.

`expansion` holds the kept centroids of a query, highest idf first. Its values are neither compressed nor encoded, and
lie in one page. So training reads the vectors of any query at their byte offset, and no second copy of them is stored.
A row of the array (`_dtype`) has this offset, the number of centroids, their idf, and a CRC-32 of vectors and idf.

Where `label.feedback_passages` lists M depths, the manifest lists them, and the lists of a Parquet row hold the
centroids of all depths, the shallowest depth first. One more column, `depths`, gives the depth of each; feedback_ids
are those of the deepest.

Runs of schema 1 to 3 have the vectors in the array too, float32 (queries, M K, D + 1): K rows a depth, the idf in the
last column, and zero rows where a query has fewer. Shapes: B queries, K centroids a depth, E kept expansion embeddings,
D dimensions.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ckd_ray.arrays import BoolArray, Float32Array, Int32Array, Int64Array
from ckd_ray.collective.expand import Expansions
from ckd_ray.errors import JobError
from ckd_ray.files import read_json
from ckd_ray.labels.array_parts import Array, ArrayParts, parquet_bytes, write_part
from ckd_ray.runs.artifact import manifest_file

_VECTORS = "expansion.list.element.list.element"  # the values of the column, as Parquet names them
_FLOAT = np.dtype("<f4")


def _dtype(depths: int, clusters: int) -> np.dtype[Any]:
    """A query's row of the array: `first`, the byte of the Parquet file at which its vectors begin; `counts`, its
    centroids of each depth; `crc`, of the bytes of its vectors and then of its idf; `dim`; `idf`."""
    fields = [("first", "<i8"), ("counts", "<i4", (depths,)), ("crc", "<u4"), ("dim", "<i4")]
    return np.dtype([*fields, ("idf", _FLOAT, (depths, clusters))])


def write_labels(
    folder: str,
    split: str,
    part: int,
    *,
    query_ids: Sequence[str],
    feedback_ids: Sequence[Sequence[str]],
    expansions: Expansions | Mapping[int, Expansions],
    clusters: int,
) -> None:
    """Write one part.

    Args:
        expansions: those of a single depth, or by depth in ascending order.
        clusters: K.
    """
    by_depth = {0: expansions} if isinstance(expansions, Expansions) else dict(expansions)
    blocks = [_block(found, clusters) for found in by_depth.values()]
    vectors_BKD, idf_BK, token_ids_BK, present_BK = (np.concatenate(a, axis=1) for a in zip(*blocks, strict=True))
    dim = vectors_BKD.shape[2]
    vectors_ND = vectors_BKD[present_BK]
    columns = {
        "query_id": pa.array(query_ids, pa.string()),
        "feedback_ids": pa.array([list(ids) for ids in feedback_ids], pa.list_(pa.string())),
        "expansion": _lists(pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), dim), present_BK),
        "idf": _lists(pa.array(idf_BK[present_BK], pa.float32()), present_BK),
        "token_ids": _lists(pa.array(token_ids_BK[present_BK], pa.int32()), present_BK),
    }
    if len(by_depth) > 1:
        depths_BK = np.broadcast_to(np.repeat(list(by_depth), clusters), present_BK.shape)
        columns["depths"] = _lists(pa.array(depths_BK[present_BK], pa.int32()), present_BK)
    data = _parquet(pa.table(columns), vectors_ND)
    count = len(query_ids)
    rows_B = np.zeros((count, 1), _dtype(len(by_depth), clusters))
    counts_B = present_BK.sum(axis=1)
    row_bytes = dim * _FLOAT.itemsize
    starts_B = np.cumsum([0, *counts_B])
    at = _vectors_at(data, len(vectors_ND) * row_bytes)
    rows_B["first"][:, 0] = at + starts_B[:-1] * row_bytes
    rows_B["counts"][:, 0] = present_BK.reshape(count, len(by_depth), clusters).sum(axis=2)
    rows_B["idf"][:, 0] = idf_BK.reshape(count, len(by_depth), clusters)
    rows_B["dim"] = dim
    for row, start, stop in zip(rows_B[:, 0], starts_B[:-1].tolist(), starts_B[1:].tolist(), strict=True):
        row["crc"] = _crc(vectors_ND[start:stop].tobytes(), row["idf"])
    write_part(folder, split, part, rows_B, data)


def _block(expansions: Expansions, clusters: int) -> tuple[Float32Array, Float32Array, Int32Array, BoolArray]:
    """The centroids of one depth, their idf, their token ids, and which of the K exist."""
    num_queries, found, dim = expansions.embeddings_BKD.shape
    kept = min(clusters, found)
    vectors_BKD = np.zeros((num_queries, clusters, dim), np.float32)
    idf_BK = np.zeros((num_queries, clusters), np.float32)
    token_ids_BK = np.zeros((num_queries, clusters), np.int32)
    vectors_BKD[:, :kept] = expansions.embeddings_BKD[:, :kept].cpu().numpy()
    idf_BK[:, :kept] = expansions.idf_BK[:, :kept].cpu().numpy()
    token_ids_BK[:, :kept] = expansions.token_ids_BK[:, :kept].cpu().numpy()
    present_BK = np.arange(clusters)[None] < expansions.counts_B.cpu().numpy()[:, None]
    return vectors_BKD, np.where(present_BK, idf_BK, np.float32(0)), token_ids_BK, present_BK


def _lists(values: pa.Array, present_BK: BoolArray) -> pa.Array:
    """The flat values of all queries as one list a query."""
    offsets = np.concatenate([[0], np.cumsum(present_BK.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def _parquet(table: pa.Table, vectors_ND: Float32Array) -> memoryview:
    """The file, whose vectors lie in one piece: one row group, and one page of plain values that are not compressed."""
    names = [name for name in table.column_names if name != "expansion"]
    # The paths of leaves inside lists are those that Parquet's format prescribes.
    leaves = [name if name == "query_id" else f"{name}.list.element" for name in names]
    return parquet_bytes(
        table,
        compression={_VECTORS: "none", **dict.fromkeys(leaves, "zstd")},
        use_dictionary=leaves,
        write_statistics=leaves,
        row_group_size=max(1, table.num_rows),
        data_page_size=max(1, 2 * vectors_ND.nbytes + (1 << 20)),
    )


def _vectors_at(data: memoryview, size: int) -> int:
    """The byte of a Parquet file at which the values of its vectors begin: a page ends with its values."""
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    if not size:
        return 0
    columns = map(metadata.row_group(0).column, range(metadata.num_columns))
    column = next(column for column in columns if column.path_in_schema == _VECTORS)
    return int(column.data_page_offset + column.total_compressed_size - size)


def _crc(vectors: bytes, idf_MK: Array) -> int:
    return zlib.crc32(np.ascontiguousarray(idf_MK).tobytes(), zlib.crc32(vectors))


def manifest_of_labels(queries_per_part: int, split: str, depths: Sequence[int]) -> dict[str, Any]:
    """The entries of the manifest that `ExpansionReader.open` reads."""
    several = {"feedback_passages": list(depths)} if len(depths) > 1 else {}
    return {"queries_per_part": queries_per_part, "split": split, **several}


class ExpansionReader:
    """Random access to the expansions of a split, by dense query index (`ArrayParts`).

    Args:
        depths: the depths of feedback when there are several, each of which has a block of centroids; else empty.

    Attributes:
        blocks: M, the number of blocks of a query: the `depths` of `expansion_weights`.
    """

    def __init__(self, folder: str, split: str, queries_per_part: int, depths: Sequence[int] = ()) -> None:
        self.queries_per_part, self.depths, self.blocks = queries_per_part, tuple(depths), max(1, len(depths))
        self._parts = ArrayParts(folder, split, queries_per_part, "label")

    @classmethod
    def open(cls, folder: str, split: str) -> ExpansionReader:
        """Open the labels of a finished label stage."""
        manifest: dict[str, Any] = read_json(manifest_file(folder))
        return cls(folder, split, manifest["queries_per_part"], manifest.get("feedback_passages", ()))

    def select(self, queries_B: Int64Array, size: int, beta: float = 1.0) -> tuple[Tensor, Tensor]:
        """The `size` centroids of highest idf of each depth: (expansions_BED, weights_BE = beta * idf); missing ones
        weigh 0. `expansion_weights` computes other weights from those at beta = 1.

        E = M * min(size, K), the depths one after another.

        Raises:
            JobError: a file is shorter than its header says, or its bytes are not those that were written.
        """
        rows, vectors = self._read(queries_B)
        if not rows:
            return torch.zeros(0, self.blocks * size, 0), torch.zeros(0, self.blocks * size)
        found = [self._centroids(row, data, size) for row, data in zip(rows, vectors, strict=True)]
        expansions_BED, idf_BE = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*found, strict=True))
        return expansions_BED, beta * idf_BE

    def _read(self, queries_B: Int64Array, *, again: bool = True) -> tuple[list[Array], list[bytes]]:
        """The rows of the array and the bytes of the vectors, checked."""
        rows = self._parts.read(queries_B)
        vectors = self._parts.read_tables(queries_B, [_span(row) for row in rows])
        damaged = [
            query
            for query, row, data in zip(queries_B.tolist(), rows, vectors, strict=True)
            if row.dtype.names and (len(data) != _span(row)[1] or _crc(data, row[0]["idf"]) != row[0]["crc"])
        ]
        if damaged and again and all(self._parts.forget_copies(query) for query in damaged):
            return self._read(queries_B, again=False)  # perhaps the copies are damaged, not the files
        if damaged:
            where = self._parts.table_file(damaged[0])
            raise JobError(f"{where}: the labels of a query are not what was written; run the label stage again")
        return rows, vectors

    def _centroids(self, row: Array, data: bytes, size: int) -> tuple[Float32Array, Float32Array]:
        """(vectors_ED, idf_E) of a query."""
        if row.dtype.names is None:  # schema 1 to 3
            table_EX = row.reshape(self.blocks, -1, row.shape[1])[:, :size].reshape(-1, row.shape[1])
            return table_EX[:, :-1], table_EX[:, -1]
        own = row[0]
        depths, clusters = own["idf"].shape
        kept = min(size, clusters)
        vectors_ND = np.frombuffer(data, _FLOAT).reshape(-1, int(own["dim"]))
        out = np.zeros((depths, kept, int(own["dim"])), np.float32)
        start = 0
        for depth, count in enumerate(own["counts"].tolist()):
            some = min(count, kept)
            out[depth, :some] = vectors_ND[start : start + some]
            start += count
        return out.reshape(depths * kept, -1), own["idf"][:, :kept].reshape(-1)


def _span(row: Array) -> tuple[int, int]:
    """(first byte, bytes) of a query's vectors in its Parquet file."""
    if row.dtype.names is None:
        return 0, 0
    own = row[0]
    return int(own["first"]), int(own["counts"].sum()) * int(own["dim"]) * _FLOAT.itemsize
