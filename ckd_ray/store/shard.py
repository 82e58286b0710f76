"""One shard of token embeddings: an Arrow IPC file, memory-mapped, that describes and checks itself (store.md).

A shard holds a run of consecutive passages. Its single record batch has a row a passage:

    lengths    int32          rows of the passage (kept tokens only: no padding, no dropped punctuation)
    token_ids  list<int32>    the vocabulary id of each row
    embeddings large_binary   lengths * C bytes (see codec.py)
    crc32      uint32         of the passage's token ids and embeddings, so that reading one passage checks it

The buffers of the two ragged columns are flat, so a shard reads as one (T,) and one (T, C) array without a copy. The
schema's metadata holds the fingerprint of the run that wrote it, its place in the store, its document frequencies and
the SHA-256 of all of this. Renaming the file into place is the commit: no second file has to agree with it.
Shapes: P passages, T tokens, C bytes a token, D dimensions.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc as ipc
import torch

from ckd_ray.arrays import Int32Array, Int64Array
from ckd_ray.errors import JobError, first_line
from ckd_ray.files import filesystem_of, is_local, parent, write_atomic
from ckd_ray.files.cache import ShardCache
from ckd_ray.store.codec import Bytes, Codec, bytes_per_token, load_codec

SCHEMA_VERSION = 2
_HEADER, _FREQUENCY_IDS, _FREQUENCY_COUNTS = b"ckd_ray.shard", b"ckd_ray.df_ids", b"ckd_ray.df_counts"

_SCHEMA = pa.schema(
    [
        ("lengths", pa.int32()),
        ("token_ids", pa.large_list(pa.int32())),
        ("embeddings", pa.large_binary()),
        ("crc32", pa.uint32()),
    ]
)

T = TypeVar("T")
# How often a copy may be evicted between its download and its mapping before the cache counts as too small.
_EVICTIONS = 8
# What Arrow, JSON and numpy raise for damaged bytes.
_DAMAGE = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)


class BrokenShardError(JobError):
    """A shard is truncated, altered, or belongs to another run; it must be computed again.

    Attributes:
        uri: of the shard.
    """

    def __init__(self, message: str, uri: str) -> None:
        super().__init__(message, uri)
        self.uri = uri

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class ShardHeader:
    """The metadata of a shard."""

    fingerprint: str
    index: int
    first: int
    passages: int
    tokens: int
    dim: int
    codec: str
    sha256: str
    codec_digest: str = ""
    schema_version: int = SCHEMA_VERSION


def shard_name(index: int) -> str:
    """The file name of shard `index`."""
    return f"shard-{index:06d}.arrow"


def write_shard(
    uri: str,
    *,
    fingerprint: str,
    index: int,
    first: int,
    lengths: Int32Array,
    token_ids: Int32Array,
    embeddings_TD: torch.Tensor,
    codec: Codec,
    device: torch.device | str | None = None,
) -> tuple[ShardHeader, int]:
    """Write one shard atomically under `uri` (a file). Returns its header and its bytes on disk.

    Args:
        first: dense index of the shard's first passage.
        lengths: (P,) kept tokens a passage, summing to T.
        token_ids: (T,) their vocabulary ids, passage after passage.
        embeddings_TD: (T, D) unit rows.
        device: where codes are computed; that of the rows when None.
    """
    assert int(lengths.sum()) == len(token_ids) == len(embeddings_TD)
    codes = codec.encode(embeddings_TD, device)
    ids, counts = document_frequencies(lengths, token_ids)
    sums = _passage_sums(lengths, token_ids, codes)
    header = ShardHeader(
        fingerprint=fingerprint,
        index=index,
        first=first,
        passages=len(lengths),
        tokens=len(token_ids),
        dim=codec.dim,
        codec=codec.name,
        sha256="",
        codec_digest=codec.digest,
    )
    header = replace(header, sha256=_digest(header, lengths, token_ids, codes, sums, ids, counts))
    metadata = {
        _HEADER: json.dumps(asdict(header)).encode(),
        _FREQUENCY_IDS: ids.tobytes(),
        _FREQUENCY_COUNTS: counts.tobytes(),
    }
    batch = _batch(lengths, token_ids, codes, sums)
    schema = batch.schema.with_metadata(metadata)

    def write(stream: pa.NativeFile) -> None:
        with ipc.new_file(stream, schema) as writer:
            writer.write_batch(batch.replace_schema_metadata(metadata))

    return header, write_atomic(uri, write)


def _batch(lengths: Int32Array, token_ids: Int32Array, codes: Bytes, sums: Any) -> pa.RecordBatch:
    token_offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=token_offsets[1:])
    byte_offsets = token_offsets * codes.shape[1]
    ids = pa.LargeListArray.from_arrays(pa.array(token_offsets), pa.array(token_ids, pa.int32()))
    embeddings = pa.Array.from_buffers(
        pa.large_binary(), len(lengths), [None, pa.py_buffer(byte_offsets), pa.py_buffer(codes)]
    )
    columns = [pa.array(lengths, pa.int32()), ids, embeddings, pa.array(sums, pa.uint32())]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _passage_sums(lengths: Int32Array, token_ids: Int32Array, codes: Bytes) -> npt.NDArray[np.uint32]:
    """(P,) CRC-32 of each passage's token ids followed by its codes."""
    stops = np.cumsum(lengths, dtype=np.int64).tolist()
    starts = [0, *stops[:-1]]
    return np.array([_crc(token_ids[a:b], codes[a:b]) for a, b in zip(starts, stops, strict=False)], np.uint32)


def _crc(token_ids: Int32Array, codes: Bytes) -> int:
    return zlib.crc32(codes.data, zlib.crc32(token_ids.data))


def _digest(header: ShardHeader, *columns: npt.NDArray[Any]) -> str:
    digest = hashlib.sha256(json.dumps(asdict(replace(header, sha256=""))).encode())
    for column in columns:
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def document_frequencies(lengths: Int32Array, token_ids: Int32Array) -> tuple[Int32Array, Int32Array]:
    """Token ids that occur and the number of passages that hold each (df, method.md step 2)."""
    passages = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    pairs = np.unique(passages << 32 | token_ids.astype(np.int64))
    ids, counts = np.unique(pairs & 0xFFFFFFFF, return_counts=True)
    return ids.astype(np.int32), counts.astype(np.int32)


def read_header(uri: str) -> tuple[ShardHeader, Int32Array, Int32Array, Int32Array]:
    """Header, document frequencies (ids, counts) and lengths of a shard; its embeddings are not read.

    Raises:
        BrokenShardError: the file is not a complete Arrow file, or not a shard.
    """
    fs, path = filesystem_of(uri)
    try:
        with fs.open_input_file(path) as source:
            reader = ipc.open_file(source, options=ipc.IpcReadOptions(included_fields=[0]))
            header, ids, counts = _parse_metadata(uri, reader.schema.metadata)
            batch = reader.get_batch(0)
            batch.validate()
            lengths = batch.column(0).to_numpy()
    except _DAMAGE as error:
        raise _broken(uri, error) from error
    if (len(lengths), lengths.dtype) != (header.passages, np.int32):
        raise BrokenShardError(f"{uri}: columns are shorter than the header says", uri)
    return header, ids, counts, lengths


def _broken(uri: str, error: Exception) -> BrokenShardError:
    return BrokenShardError(f"{uri}: not a whole shard ({first_line(error)})", uri)


def _parse_metadata(uri: str, metadata: dict[bytes, bytes] | None) -> tuple[ShardHeader, Int32Array, Int32Array]:
    if not metadata or _HEADER not in metadata:
        raise BrokenShardError(f"{uri}: not a shard of token embeddings", uri)
    values: dict[str, Any] = json.loads(metadata[_HEADER])
    if values.get("schema_version") != SCHEMA_VERSION:
        raise BrokenShardError(f"{uri}: schema version {values.get('schema_version')}, this is {SCHEMA_VERSION}", uri)
    ids = np.frombuffer(metadata[_FREQUENCY_IDS], np.int32)
    counts = np.frombuffer(metadata[_FREQUENCY_COUNTS], np.int32)
    return ShardHeader(**values), ids, counts


class Shard:
    """A shard opened for reading; local files are memory-mapped.

    Args:
        uri: where the shard is.
        cache: of this machine, for a mapped local copy of a remote shard; a damaged copy is fetched again, once.
            Without a cache a remote shard is read into memory.
        digest: from the manifest; the header must hold the same.

    Attributes:
        header: the shard's metadata.
        first: dense index of its first passage.
        lengths: (P,) int32; offsets: (P + 1,) int64; token_ids: (T,) int32; codes: (T, C) uint8; sums: (P,) uint32.

    Raises:
        FileNotFoundError: there is no such file. BrokenShardError: it is not a whole shard, or another one.
    """

    def __init__(self, uri: str, cache: ShardCache | None = None, digest: str = "") -> None:
        self.uri, self._cache, self._digest = uri, cache, digest
        self._map: pa.MemoryMappedFile | None = None
        self._with_fresh_copy(self._open, opened=False)

    def _open(self) -> None:
        source = self._bytes()
        self._map = source if isinstance(source, pa.MemoryMappedFile) else None
        self._written = self._last_written()
        # The bytes can be read, so errors from here on come from their contents.
        try:
            self._parse(ipc.open_file(source))
        except _DAMAGE as error:
            raise _broken(self.uri, error) from error
        if self._digest and self.header.sha256 != self._digest:
            raise BrokenShardError(f"{self.uri}: not the shard that the manifest names", self.uri)

    def _bytes(self) -> Any:
        if self._cache is None and not is_local(self.uri):
            fs, path = filesystem_of(self.uri)
            return pa.BufferReader(fs.open_input_stream(path).read())
        tries = _EVICTIONS if self._cache else 1
        for left in reversed(range(tries)):
            try:
                path = self._cache.fetch(self.uri, self._digest) if self._cache else filesystem_of(self.uri)[1]
                if os.path.getsize(path) == 0:  # cannot be mapped
                    raise BrokenShardError(f"{self.uri}: empty", self.uri)
                return pa.memory_map(path)
            except FileNotFoundError:  # another process may have evicted the copy
                if not left:
                    raise
        raise AssertionError

    def _parse(self, reader: Any) -> None:
        self.header, self.frequency_ids, self.frequency_counts = _parse_metadata(self.uri, reader.schema.metadata)
        self.first, tokens = self.header.first, self.header.tokens
        if not reader.schema.equals(_SCHEMA):
            raise BrokenShardError(f"{self.uri}: not the columns of a shard", self.uri)
        batch = reader.get_batch(0)
        batch.validate()  # Arrow trusts the sizes in a file: with one wrong bit there reading ends the process
        self.lengths: Int32Array = batch.column("lengths").to_numpy()
        self.offsets: Int64Array = batch.column("token_ids").offsets.to_numpy()
        self.token_ids: Int32Array = batch.column("token_ids").values.to_numpy()
        self.sums: npt.NDArray[np.uint32] = batch.column("crc32").to_numpy()
        flat, width = batch.column("embeddings").buffers()[2], bytes_per_token(self.header.codec, self.header.dim)
        if len(self.lengths) != self.header.passages or len(self.token_ids) != tokens:
            raise BrokenShardError(f"{self.uri}: columns are shorter than the header says", self.uri)
        if self.offsets[0] != 0 or not np.array_equal(np.diff(self.offsets), self.lengths):
            raise BrokenShardError(f"{self.uri}: offsets and lengths differ", self.uri)
        self.codes = np.frombuffer(flat or b"", np.uint8, count=tokens * width).reshape(tokens, width)

    def _with_fresh_copy(self, read: Callable[[], T], *, opened: bool = True) -> T:
        """`read()`, and again on a new copy when the cached one is damaged."""
        try:
            return read()
        except BrokenShardError:
            if self._cache is None:
                raise
            self._cache.discard(self.uri, self._digest)
            if opened:
                self._open()
            return read()

    @cached_property
    def codec(self) -> Codec:
        """What decodes the shard."""
        return load_codec(self.header.codec, self.header.dim, parent(self.uri), self.header.codec_digest)

    def embeddings(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows (T', D), float16, of the shard's passages [start, stop), without a check of their bytes.

        A view of read-only memory when the codec is fp16: writing to it ends the process.
        """
        stop = len(self.lengths) if stop is None else stop
        return self.codec.decode(self.codes[self.offsets[start] : self.offsets[stop]])

    def check_lengths(self, passages: Int64Array, lengths: Int32Array) -> None:
        """Raises BrokenShardError when passages (numbers within the shard) have other lengths than the store says."""
        if not np.array_equal(self.lengths[passages], lengths):
            raise BrokenShardError(f"{self.uri}: passages of other lengths than the store says", self.uri)

    def copy(self, passages: list[int], codes_TC: Bytes, ids_T: Int32Array, at: list[int]) -> None:
        """Put passages (numbers within the shard) into `codes_TC` and `ids_T`, each from its row of `at` on.

        Raises:
            BrokenShardError: the bytes of one differ from its checksum, or do not fit.
        """
        self._with_fresh_copy(lambda: self._copy(passages, codes_TC, ids_T, at))

    def _copy(self, passages: list[int], codes_TC: Bytes, ids_T: Int32Array, at: list[int]) -> None:
        for passage, row in zip(passages, at, strict=True):
            low, high = int(self.offsets[passage]), int(self.offsets[passage + 1])
            codes, ids = self.codes[low:high], self.token_ids[low:high]
            if _crc(ids, codes) != self.sums[passage]:
                what = f"the bytes of passage {self.first + passage} do not match their checksum"
                raise BrokenShardError(f"{self.uri}: {what}", self.uri)
            codes_TC[row : row + high - low] = codes
            ids_T[row : row + high - low] = ids

    def verify(self) -> None:
        """Read every byte; BrokenShardError when they do not match the checksum."""
        self._with_fresh_copy(self._verify)

    def check_unchanged(self) -> None:
        """As `verify`, but bytes are read only if the mapped file was written to since it was opened or last checked.

        Replacing the file changes nothing: the map shows the file that was opened.
        """
        written = self._last_written()
        if written != self._written:
            try:
                self._verify()
            except BrokenShardError:
                if self._cache is not None:
                    self._cache.discard(self.uri, self._digest)
                raise
            self._written = written

    def _last_written(self) -> tuple[int, int] | None:
        """Time of the last write and size of the mapped file."""
        if self._map is None:
            return None
        status = os.fstat(self._map.fileno())
        return status.st_mtime_ns, status.st_size

    def _verify(self) -> None:
        columns = (self.lengths, self.token_ids, self.codes, self.sums, self.frequency_ids, self.frequency_counts)
        if _digest(self.header, *columns) != self.header.sha256:
            raise BrokenShardError(f"{self.uri}: its bytes do not match its checksum", self.uri)
