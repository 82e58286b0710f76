"""Labels on disk: Parquet for people and other programs, and beside it arrays that training reads at random.

A part holds the labels of consecutive queries of a split: `train-000012.parquet` (columns query_id, feedback_ids,
expansion, idf, token_ids) and `train-000012.npy`, float32 (queries, K, D + 1): the K centroids of highest idf first,
their idf in the last column, zero rows where a query has fewer. Shapes: B queries, K centroids, E kept expansion
embeddings, D dimensions.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ckd_ray.collective.expand import Expansions
from ckd_ray.errors import JobError
from ckd_ray.retrieve.rankings import part_name
from ckd_ray.store.files import filesystem_of, is_local, join, read_json, write_atomic

Int64Array = npt.NDArray[np.int64]

_OPEN_PARTS = 64
_REMOTE_READERS = 16


def write_labels(
    folder: str,
    split: str,
    part: int,
    *,
    query_ids: Sequence[str],
    feedback_ids: Sequence[Sequence[str]],
    expansions: Expansions,
    clusters: int,
) -> None:
    """Write one part; the Parquet file comes last and is what says that the part is there."""
    dim = expansions.embeddings_BKD.shape[2]
    kept = min(clusters, expansions.embeddings_BKD.shape[1])
    table_BKX = np.zeros((len(query_ids), clusters, dim + 1), np.float32)
    table_BKX[:, :kept, :dim] = expansions.embeddings_BKD[:, :kept].cpu().numpy()
    table_BKX[:, :kept, dim] = expansions.idf_BK[:, :kept].cpu().numpy()
    present_BK = np.arange(clusters)[None] < expansions.counts_B.cpu().numpy()[:, None]
    token_ids_BK = np.zeros((len(query_ids), clusters), np.int32)
    token_ids_BK[:, :kept] = expansions.token_ids_BK[:, :kept].cpu().numpy()
    name = part_name(split, part)
    buffer = io.BytesIO()
    np.save(buffer, table_BKX, allow_pickle=False)
    write_atomic(join(folder, f"{name}.npy"), lambda stream: stream.write(buffer.getbuffer()))
    vectors = pa.array(table_BKX[:, :, :dim][present_BK].reshape(-1), pa.float32())
    rows = pa.table(
        {
            "query_id": pa.array(query_ids, pa.string()),
            "feedback_ids": pa.array([list(ids) for ids in feedback_ids], pa.list_(pa.string())),
            "expansion": _lists(pa.FixedSizeListArray.from_arrays(vectors, dim), present_BK),
            "idf": _lists(pa.array(table_BKX[:, :, dim][present_BK], pa.float32()), present_BK),
            "token_ids": _lists(pa.array(token_ids_BK[present_BK], pa.int32()), present_BK),
        }
    )
    write_atomic(join(folder, f"{name}.parquet"), lambda stream: pq.write_table(rows, stream, compression="zstd"))


def _lists(values: pa.Array, present_BK: npt.NDArray[np.bool_]) -> pa.Array:
    """One list a query out of the flat values of all queries."""
    offsets = np.concatenate([[0], np.cumsum(present_BK.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values)


class ExpansionReader:
    """Random access to the expansions of a split, by dense query index; nothing is opened before it is asked for.

    Only the rows asked for are read, also from an object store, and at most `_OPEN_PARTS` files are open: memory and
    file handles do not grow with the number of queries.
    """

    def __init__(self, folder: str, split: str, queries_per_part: int) -> None:
        self.folder, self.split, self.queries_per_part = folder, split, queries_per_part
        self._open: OrderedDict[int, _Part] = OrderedDict()
        # Requests to an object store wait for the network, so they go out together.
        self._readers = None if is_local(folder) else ThreadPoolExecutor(_REMOTE_READERS, "labels")

    @classmethod
    def open(cls, folder: str, split: str) -> ExpansionReader:
        """Open the labels of a finished label stage."""
        manifest: dict[str, Any] = read_json(join(folder, "manifest.json"))
        return cls(folder, split, manifest["queries_per_part"])

    def _part(self, part: int) -> _Part:
        if part in self._open:
            self._open.move_to_end(part)
            return self._open[part]
        self._open[part] = _Part(join(self.folder, part_name(self.split, part) + ".npy"))
        if len(self._open) > _OPEN_PARTS:
            # Not closed here: a request that still runs holds the file until it is done.
            self._open.popitem(last=False)
        return self._open[part]

    def select(self, queries_B: Int64Array, size: int, beta: float = 1.0) -> tuple[Tensor, Tensor]:
        """The `size` centroids of highest idf: (expansions_BED, weights_BE = beta * idf); absent ones weigh 0.
        `expansion_weights` makes other weights of those at beta = 1.

        E = min(size, K). Raises JobError when a file is shorter than its header says.
        """
        asked = [divmod(q, self.queries_per_part) for q in queries_B.tolist()]
        jobs = [(self._part(part), row, size) for part, row in asked]
        rows = [_read(job) for job in jobs] if self._readers is None else list(self._readers.map(_read, jobs))
        if not rows:
            return torch.zeros(0, size, 0), torch.zeros(0, size)
        table_BEX = torch.from_numpy(np.stack(rows))
        return table_BEX[:, :, :-1].contiguous(), beta * table_BEX[:, :, -1]


class _Part:
    """An open .npy file of shape (queries, K, D + 1), float32."""

    def __init__(self, uri: str) -> None:
        fs, path = filesystem_of(uri)
        self.uri, self.file = uri, fs.open_input_file(path)
        version = np.lib.format.read_magic(self.file)
        assert version == (1, 0), f"{uri}: written by another version of numpy"
        self.shape, _, dtype = np.lib.format.read_array_header_1_0(self.file)
        assert dtype == np.float32 and len(self.shape) == 3, f"{uri}: not a part of labels"
        self.start = self.file.tell()


def _read(job: tuple[_Part, int, int]) -> npt.NDArray[np.float32]:
    """The first `size` centroids of a row, (E, D + 1)."""
    part, row, size = job
    queries, clusters, width = part.shape
    if not 0 <= row < queries:
        raise IndexError(f"query {row} of {part.uri}, which has {queries}")
    kept = min(size, clusters)
    wanted = kept * width * 4
    data = part.file.read_at(wanted, part.start + row * clusters * width * 4)
    if len(data) != wanted:
        raise JobError(f"{part.uri}: shorter than its header says; run the label stage again")
    return np.frombuffer(data, np.float32).reshape(kept, width)
