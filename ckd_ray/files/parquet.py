"""Parquet files whose pages have checksums: a bit that turns in one is found whenever the page is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ckd_ray.errors import JobError, first_line
from ckd_ray.files.paths import filesystem_of

# pyarrow reports damaged bytes by errors of its own (a damaged footer raises many kinds), or by an OSError without an
# errno.
_OWN = (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, pa.ArrowKeyError, pa.ArrowSerializationError)
_DAMAGE = ("page integrity", "decompress", "thrift", "orrupt", "magic bytes", "nexpected end of stream")


def write_parquet(table: pa.Table, where: Any, **options: Any) -> None:
    """Write a table to a path or a stream, compressed unless `options` of pyarrow say otherwise."""
    pq.write_table(table, where, **{"compression": "zstd", "write_page_checksum": True, **options})


def parquet_writer(where: Any, schema: pa.Schema, **options: Any) -> pq.ParquetWriter:
    """Writes tables one after another, as `write_parquet` does."""
    return pq.ParquetWriter(where, schema, **{"compression": "zstd", "write_page_checksum": True, **options})


class ParquetFile:
    """An open file.

    Args:
        path: where the file is read, when that is not `uri`: a copy of it.
        options: of pyarrow's ParquetFile.

    Raises:
        JobError: when it is opened or read, its bytes are not those that were written.
    """

    def __init__(self, uri: str, path: str | None = None, **options: Any) -> None:
        self.uri = uri
        fs, place = filesystem_of(path or uri)
        with _damage_of(uri):
            self._file = pq.ParquetFile(place, filesystem=fs, page_checksum_verification=True, **options)

    @property
    def metadata(self) -> pq.FileMetaData:
        """Its footer."""
        return self._file.metadata

    def read_row_groups(
        self, groups: Sequence[int], columns: Sequence[str] | None = None, use_threads: bool = True
    ) -> pa.Table:
        """The rows of some row groups."""
        with _damage_of(self.uri):
            return self._file.read_row_groups(groups, columns=columns, use_threads=use_threads)


def read_parquet(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A whole file, or some of its columns.

    Raises:
        JobError: its bytes are not those that were written.
    """
    fs, path = filesystem_of(uri)
    with _damage_of(uri), pq.ParquetFile(path, filesystem=fs, page_checksum_verification=True) as file:
        return file.read(columns)


@contextmanager
def _damage_of(uri: str) -> Iterator[None]:
    try:
        yield
    except (OSError, *_OWN) as error:
        if not isinstance(error, _OWN) and not any(word in str(error) for word in _DAMAGE):
            raise
        raise JobError(
            f"{uri}: the file is not what was written ({first_line(error)}); give the same command again, which"
            " verifies the files of each stage and makes those again that are damaged"
        ) from error
