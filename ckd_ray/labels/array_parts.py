"""Parts on disk: a Parquet file for people and other programs, and an array beside it that training reads at random.

A part holds consecutive queries of a split: `train-000012.parquet`, and `_rows/train-000012.npy` of shape
(queries, K, ...). Labels and scores of a cross-encoder are kept in this form. Shapes: B queries, K entries a query.

The vectors of labels are in both files. From the array a query's 10 heaviest centroids are one read of 5 KB. From
the Parquet file they would be a read of 200 KB in row groups of 16 queries, which takes 7 times as long, and of 3 MB in
one row group a part (log.md).
"""

from __future__ import annotations

import io
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ckd_ray.arrays import Int64Array
from ckd_ray.errors import JobError
from ckd_ray.files import exists, filesystem_of, is_local, join, write_atomic
from ckd_ray.ray_util.parts import array_file, former_array_file, part_name

Array = npt.NDArray[Any]

_OPEN_PARTS = 64
_REMOTE_READERS = 16


def write_part(folder: str, split: str, part: int, array: Array, table: pa.Table) -> None:
    """Write one part. The Parquet file comes last and says that the part is complete."""
    name = part_name(split, part)
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomic(array_file(folder, name), lambda stream: stream.write(buffer.getbuffer()))
    write_atomic(join(folder, f"{name}.parquet"), lambda stream: pq.write_table(table, stream, compression="zstd"))


class ArrayParts:
    """Random access to the arrays of a split, by dense query index.

    Only the requested entries are read, also from an object store, and at most `_OPEN_PARTS` files are open. Memory and
    file handles do not grow with the number of queries.

    Args:
        stage: the stage that writes the parts, for messages.
    """

    def __init__(self, folder: str, split: str, queries_per_part: int, stage: str) -> None:
        self.folder, self.split, self.queries_per_part, self.stage = folder, split, queries_per_part, stage
        self._open: OrderedDict[int, _Part] = OrderedDict()
        # Requests to an object store wait for the network, so they are sent concurrently.
        self._readers = None if is_local(folder) else ThreadPoolExecutor(_REMOTE_READERS, stage)

    def read(self, queries_B: Int64Array, size: int | None = None, blocks: int = 1) -> list[Array]:
        """For each query the first `size` entries (all when None) of each of the `blocks` equal blocks of its row.

        Raises:
            JobError: a file is shorter than its header says.
        """
        requests = []
        for query in queries_B.tolist():
            part, row = divmod(query, self.queries_per_part)
            requests.append((self._part(part), row, size, blocks))
        if self._readers is None:
            return [self._read(*request) for request in requests]
        return list(self._readers.map(lambda request: self._read(*request), requests))

    def _part(self, part: int) -> _Part:
        if part not in self._open:
            self._open[part] = self._opened(part_name(self.split, part))
        self._open.move_to_end(part)
        if len(self._open) > _OPEN_PARTS:
            self._open.popitem(last=False)  # not closed here: a request that still runs holds the file
        return self._open[part]

    def _opened(self, stem: str) -> _Part:
        try:
            return _Part(array_file(self.folder, stem))
        except FileNotFoundError:
            if not exists(former := former_array_file(self.folder, stem)):
                raise
            return _Part(former)

    def _read(self, part: _Part, row: int, size: int | None, blocks: int) -> Array:
        if not 0 <= row < part.shape[0]:
            raise IndexError(f"query {row} of {part.uri}, which has {part.shape[0]}")
        entries, entry_bytes = part.shape[1], part.dtype.itemsize * int(np.prod(part.shape[2:]))
        assert entries % blocks == 0, f"{part.uri}: {entries} entries are not {blocks} blocks of equal size"
        length = entries // blocks
        kept = length if size is None else min(size, length)
        count = (blocks - 1) * length + kept  # one request, which ends inside the last block
        data = part.file.read_at(count * entry_bytes, part.start + row * entries * entry_bytes)
        if len(data) != count * entry_bytes:
            raise JobError(f"{part.uri}: shorter than its header says; run the {self.stage} stage again")
        found = np.frombuffer(data, part.dtype).reshape(count, *part.shape[2:])
        return found if blocks == 1 else np.concatenate([found[i : i + kept] for i in range(0, count, length)])


class _Part:
    """An open .npy file."""

    def __init__(self, uri: str) -> None:
        fs, path = filesystem_of(uri)
        self.uri, self.file = uri, fs.open_input_file(path)
        version = np.lib.format.read_magic(self.file)
        assert version == (1, 0), f"{uri}: written by another version of numpy"
        self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(self.file)
        if self.dtype.hasobject:
            raise ValueError(f"{uri}: an array of Python objects")
        self.start = self.file.tell()
