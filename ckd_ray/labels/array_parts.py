"""Parts on disk: a Parquet file for people and other programs, and an array beside it that training reads at random.

A part holds consecutive queries of a split: `train-000012.parquet`, and `_rows/train-000012.npy` with a row a query.
Labels and scores of a cross-encoder are kept in this form.

From an object store, parts are copied whole to the cache of the machine where all of them take no more than half of it,
so that later batches send no request; larger ones are read row by row. Shapes: B queries.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ckd_ray.arrays import Int64Array
from ckd_ray.errors import JobError
from ckd_ray.files import exists, filesystem_of, is_local, join, write_atomic, write_parquet
from ckd_ray.files.cache import Copies
from ckd_ray.ray_util.parts import array_file, former_array_file, part_name
from ckd_ray.runs.artifact import manifest_of

Array = npt.NDArray[Any]
Item = TypeVar("Item")
Found = TypeVar("Found")

_OPEN_PARTS = 64
_REMOTE_READERS = 16


def write_part(folder: str, split: str, part: int, array: Array, parquet: bytes | memoryview) -> None:
    """Write one part. The Parquet file comes last and says that the part is complete."""
    name = part_name(split, part)
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomic(array_file(folder, name), lambda stream: stream.write(buffer.getbuffer()))
    write_atomic(join(folder, f"{name}.parquet"), lambda stream: stream.write(parquet))


def parquet_bytes(table: pa.Table, **options: Any) -> memoryview:
    """The table as a Parquet file, compressed unless `options` say otherwise."""
    buffer = io.BytesIO()
    write_parquet(table, buffer, **options)
    return buffer.getbuffer()


class ArrayParts:
    """Random access to the arrays of a split, by dense query index, and to the Parquet files beside them.

    At most `_OPEN_PARTS` files of each kind are open: memory and file handles do not grow with the number of queries.

    Args:
        stage: the stage that writes the parts, for messages.
    """

    def __init__(self, folder: str, split: str, queries_per_part: int, stage: str) -> None:
        self.folder, self.split, self.queries_per_part, self.stage = folder, split, queries_per_part, stage
        self._copies = Copies(folder, [] if is_local(folder) else (manifest_of(folder) or {}).get("files", []))
        self._arrays: OrderedDict[int, _Array] = OrderedDict()
        self._tables: OrderedDict[int, pa.NativeFile] = OrderedDict()
        # Requests to an object store wait for the network, so they are sent together.
        self._readers = None if is_local(folder) else ThreadPoolExecutor(_REMOTE_READERS, stage)

    def read(self, queries_B: Int64Array) -> list[Array]:
        """The row of each query.

        Raises:
            JobError: a file is shorter than its header says.
        """
        return self._together(self._row, [(self._array(part), row) for part, row in self._places(queries_B)])

    def read_tables(self, queries_B: Int64Array, spans: list[tuple[int, int]]) -> list[bytes]:
        """For each query (first byte, bytes) of its Parquet file."""
        files = [self._table(part) for part, _ in self._places(queries_B)]
        return self._together(
            lambda file, start, size: bytes(file.read_at(size, start)) if size else b"",
            [(file, *span) for file, span in zip(files, spans, strict=True)],
        )

    def table_file(self, query: int) -> str:
        """The Parquet file of a query, for messages."""
        return join(self.folder, part_name(self.split, query // self.queries_per_part) + ".parquet")

    def forget_copies(self, query: int) -> bool:
        """Remove this machine's copies of a query's files. False where the files themselves are read."""
        part = query // self.queries_per_part
        self._arrays.pop(part, None)
        self._tables.pop(part, None)
        stem = part_name(self.split, part)
        return all(self._copies.discard(uri) for uri in (array_file(self.folder, stem), self.table_file(query)))

    def _places(self, queries_B: Int64Array) -> Iterable[tuple[int, int]]:
        return (divmod(query, self.queries_per_part) for query in queries_B.tolist())

    def _together(self, work: Callable[..., Found], items: list[tuple[Any, ...]]) -> list[Found]:
        if self._readers is None:
            return [work(*item) for item in items]
        return list(self._readers.map(lambda item: work(*item), items))

    def _array(self, part: int) -> _Array:
        return _kept(self._arrays, part, lambda: self._opened(part_name(self.split, part)))

    def _table(self, part: int) -> pa.NativeFile:
        uri = join(self.folder, part_name(self.split, part) + ".parquet")
        return _kept(self._tables, part, lambda: _open(self._copies.here(uri)))

    def _opened(self, stem: str) -> _Array:
        try:
            return _Array(self._copies.here(array_file(self.folder, stem)))
        except FileNotFoundError:
            if not exists(former := former_array_file(self.folder, stem)):
                raise
            return _Array(self._copies.here(former))

    def _row(self, part: _Array, row: int) -> Array:
        if not 0 <= row < part.shape[0]:
            raise IndexError(f"query {row} of {part.uri}, which has {part.shape[0]}")
        size = part.dtype.itemsize * int(np.prod(part.shape[1:]))
        data = part.file.read_at(size, part.start + row * size)
        if len(data) != size:
            raise JobError(f"{part.uri}: shorter than its header says; run the {self.stage} stage again")
        return np.frombuffer(data, part.dtype).reshape(part.shape[1:])


def _kept(found: OrderedDict[int, Item], part: int, make: Callable[[], Item]) -> Item:
    """`found[part]`, made when it is missing; the one that was not used for longest goes."""
    if part not in found:
        found[part] = make()
    found.move_to_end(part)
    if len(found) > _OPEN_PARTS:
        found.popitem(last=False)  # not closed here: a request that still runs holds the file
    return found[part]


def _open(uri: str) -> pa.NativeFile:
    fs, path = filesystem_of(uri)
    return fs.open_input_file(path)


class _Array:
    """An open .npy file."""

    def __init__(self, uri: str) -> None:
        self.uri, self.file = uri, _open(uri)
        version = np.lib.format.read_magic(self.file)
        assert version == (1, 0), f"{uri}: written by another version of numpy"
        self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(self.file)
        if self.dtype.hasobject:
            raise ValueError(f"{uri}: an array of Python objects")
        self.start = self.file.tell()
