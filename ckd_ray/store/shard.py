"""One shard of token embeddings: an Arrow IPC file, memory-mapped, that describes and checks itself.

A shard holds a run of consecutive passages. Its single record batch has a row a passage:

    lengths    int32          rows of the passage (kept tokens only: no padding, no dropped punctuation)
    token_ids  list<int32>    the vocabulary id of each row
    embeddings large_binary   lengths * C bytes (see codec.py)

The buffers behind the last two columns are flat, so that a shard reads as one (T,) and one (T, C) array without a copy.
The schema's metadata names the run that wrote it (fingerprint), its place in the store, its document frequencies and
the SHA-256 of its columns: renaming the file into place is the commit, and there is no second file to keep in step.
Shapes: P passages, T tokens, C bytes a token, D dimensions.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc as ipc
import torch

from ckd_ray.errors import JobError
from ckd_ray.store.codec import Codec, load_codec
from ckd_ray.store.files import filesystem_of, is_local, write_atomic

SCHEMA_VERSION = 1
_HEADER, _FREQUENCY_IDS, _FREQUENCY_COUNTS = b"ckd_ray.shard", b"ckd_ray.df_ids", b"ckd_ray.df_counts"

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


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
    """What a shard says of itself."""

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
) -> tuple[ShardHeader, int]:
    """Write one shard atomically under `uri` (a file). Returns its header and its bytes on disk.

    Args:
        first: dense index of the shard's first passage.
        lengths: (P,) kept tokens a passage, summing to T.
        token_ids: (T,) their vocabulary ids, passage after passage.
        embeddings_TD: (T, D) unit rows.
    """
    assert int(lengths.sum()) == len(token_ids) == len(embeddings_TD)
    codes = codec.encode(embeddings_TD)
    ids, counts = document_frequencies(lengths, token_ids)
    header = ShardHeader(
        fingerprint=fingerprint,
        index=index,
        first=first,
        passages=len(lengths),
        tokens=len(token_ids),
        dim=codec.dim,
        codec=codec.name,
        sha256=_digest(first, lengths, token_ids, codes, ids, counts),
        codec_digest=codec.digest,
    )
    metadata = {
        _HEADER: json.dumps(asdict(header)).encode(),
        _FREQUENCY_IDS: ids.tobytes(),
        _FREQUENCY_COUNTS: counts.tobytes(),
    }
    batch = _batch(lengths, token_ids, codes)
    schema = batch.schema.with_metadata(metadata)

    def write(stream: pa.NativeFile) -> None:
        with ipc.new_file(stream, schema) as writer:
            writer.write_batch(batch.replace_schema_metadata(metadata))

    return header, write_atomic(uri, write)


def _batch(lengths: Int32Array, token_ids: Int32Array, codes: npt.NDArray[np.uint8]) -> pa.RecordBatch:
    token_offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=token_offsets[1:])
    byte_offsets = token_offsets * codes.shape[1]
    ids = pa.LargeListArray.from_arrays(pa.array(token_offsets), pa.array(token_ids, pa.int32()))
    embeddings = pa.Array.from_buffers(
        pa.large_binary(), len(lengths), [None, pa.py_buffer(byte_offsets), pa.py_buffer(codes)]
    )
    names = ["lengths", "token_ids", "embeddings"]
    return pa.RecordBatch.from_arrays([pa.array(lengths, pa.int32()), ids, embeddings], names=names)


def _digest(first: int, *columns: npt.NDArray[Any]) -> str:
    digest = hashlib.sha256(str(first).encode())
    for column in columns:
        digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def document_frequencies(lengths: Int32Array, token_ids: Int32Array) -> tuple[Int32Array, Int32Array]:
    """Token ids that occur and the number of passages that hold each (df, docs/method.md step 2)."""
    passages = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    pairs = np.unique(passages << 32 | token_ids.astype(np.int64))
    ids, counts = np.unique(pairs & 0xFFFFFFFF, return_counts=True)
    return ids.astype(np.int32), counts.astype(np.int32)


def read_header(uri: str) -> tuple[ShardHeader, Int32Array, Int32Array]:
    """Header and document frequencies (ids, counts) of a shard, without reading its columns.

    Raises:
        BrokenShardError: the file is not a whole Arrow file, or not a shard.
    """
    fs, path = filesystem_of(uri)
    try:
        with fs.open_input_file(path) as source:
            return _parse_metadata(uri, ipc.open_file(source).schema.metadata)
    except (pa.ArrowInvalid, OSError) as error:
        raise BrokenShardError(f"{uri}: not a whole shard ({str(error).splitlines()[0]})", uri) from error


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
        local: a local copy of it to map instead.

    Attributes:
        header: what the shard says of itself.
        first: dense index of its first passage.
        lengths: (P,) int32; offsets: (P + 1,) int64; token_ids: (T,) int32; codes: (T, C) uint8.
    """

    def __init__(self, uri: str, local: str | None = None) -> None:
        self.uri, self._local = uri, local
        try:
            self._open(local or uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise BrokenShardError(f"{uri}: not a whole shard ({str(error).splitlines()[0]})", uri) from error

    def _open(self, where: str) -> None:
        fs, path = filesystem_of(where)
        source = pa.memory_map(path) if is_local(where) else pa.BufferReader(fs.open_input_stream(path).read())
        reader = ipc.open_file(source)
        self.header, self.frequency_ids, self.frequency_counts = _parse_metadata(self.uri, reader.schema.metadata)
        self.first = self.header.first
        folder = self.uri.rpartition("/")[0]
        self.codec = load_codec(self.header.codec, self.header.dim, folder, self.header.codec_digest)
        batch = reader.get_batch(0)
        self.lengths: Int32Array = batch.column("lengths").to_numpy()
        self.offsets: Int64Array = batch.column("token_ids").offsets.to_numpy()
        self.token_ids: Int32Array = batch.column("token_ids").values.to_numpy()
        width = self.codec.bytes_per_token
        flat = batch.column("embeddings").buffers()[2]
        size = self.header.tokens * width
        if len(self.lengths) != self.header.passages or (flat.size if flat else 0) < size:
            raise BrokenShardError(f"{self.uri}: columns are shorter than the header says", self.uri)
        self.codes = np.frombuffer(flat or b"", np.uint8, count=size).reshape(self.header.tokens, width)

    def embeddings(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows (T', D), float16, of the shard's passages [start, stop); a view when the codec is fp16."""
        stop = len(self.lengths) if stop is None else stop
        return self.codec.decode(self.codes[self.offsets[start] : self.offsets[stop]])

    def verify(self) -> None:
        """Read every byte and compare with the checksum. A local copy that differs is removed.

        Raises:
            BrokenShardError: a bit differs.
        """
        columns = (self.lengths, self.token_ids, self.codes, self.frequency_ids, self.frequency_counts)
        if _digest(self.first, *columns) != self.header.sha256:
            if self._local:
                with suppress(FileNotFoundError):
                    os.remove(self._local)
            raise BrokenShardError(f"{self.uri}: its bytes do not match its checksum", self.uri)
