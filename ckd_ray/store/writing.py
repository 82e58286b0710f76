"""Which shards in a folder are intact, and closing the store when all are.

Ray tasks read the shards, each a range of them (embed/survey.py). The process that closes the store sees lengths,
document frequencies and checksums, never embeddings. Shapes: P passages, V vocabulary ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ckd_ray.arrays import Int64Array
from ckd_ray.errors import JobError
from ckd_ray.files import file_signature, join, list_files, write_atomic, write_json_atomic
from ckd_ray.store.shard import BrokenShardError, Int32Array, Shard, ShardHeader, read_header, shard_name

MANIFEST = "manifest.json"
# Written when a store is closed: rows of every passage (int32), and document frequencies (int64).
LENGTHS, FREQUENCIES = "lengths.int32", "document_frequencies.int64"
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class ShardSummary:
    """What a manifest holds of consecutive shards.

    Attributes:
        entries: first, passages, tokens, bytes and sha256 of each shard.
        shape: dim, codec and codec_digest, which all shards of a store share; None without shards.
        lengths: (P,) rows of all their passages. frequencies: (V,) passages that hold each token id.
    """

    entries: list[dict[str, Any]]
    shape: tuple[int, str, str] | None
    lengths: Int32Array
    frequencies: Int64Array


def summarise_shards(uri: str, fingerprint: str, first: int, stop: int) -> ShardSummary:
    """Read headers and lengths of the shards [first, stop) in `uri`.

    Raises:
        BrokenShardError: one is missing, cannot be read, or is not of this store.
    """
    entries, lengths = [], [np.empty(0, np.int32)]
    frequencies, shape = np.empty(0, np.int64), None
    for i in range(first, stop):
        where = join(uri, shard_name(i))
        header, ids, counts, its_lengths = read_header(where)
        its_shape = (header.dim, header.codec, header.codec_digest)
        if (header.fingerprint, header.index) != (fingerprint, i) or (shape or its_shape) != its_shape:
            raise BrokenShardError(f"{where}: belongs to another store, or another place in it", where)
        shape = its_shape
        sizes = {"first": header.first, "passages": header.passages, "tokens": header.tokens}
        entries.append({**sizes, "bytes": file_signature(where)[0], "sha256": header.sha256})
        lengths.append(its_lengths)
        frequencies = _add(frequencies, np.bincount(ids, counts).astype(np.int64))
    return ShardSummary(entries, shape, np.concatenate(lengths), frequencies)


def _add(a: Int64Array, b: Int64Array) -> Int64Array:
    total = np.zeros(max(len(a), len(b)), np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def close_store(
    uri: str,
    fingerprint: str,
    summaries: Iterable[ShardSummary],
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    **extra: Any,
) -> None:
    """Write lengths, document frequencies and then the manifest of a store whose shards are all there.

    Args:
        summaries: of all shards, in order; one of them is in memory at a time.
        spans: (first, stop) of the passages that each shard must hold, with gaps in a sample; None: each shard begins
            where the one before it ends.
        extra: further entries of the manifest.

    Raises:
        JobError: the shards hold other passages, or differ in codec or dimensions.
    """
    entries: list[dict[str, Any]] = []
    shape: tuple[int, str, str] | None = None
    frequencies, digest = np.empty(0, np.int64), hashlib.sha256()

    def write(stream: pa.NativeFile) -> None:
        nonlocal frequencies, shape
        for part in summaries:
            if part.shape != (shape or part.shape):
                raise JobError(f"{uri}: shards of different codecs or dimensions: {shape}, {part.shape}")
            shape = part.shape
            entries.extend(part.entries)
            frequencies = _add(frequencies, part.frequencies)
            data = np.ascontiguousarray(part.lengths, "<i4").tobytes()
            digest.update(data)
            stream.write(data)

    write_atomic(join(uri, LENGTHS), write)
    counts = frequencies.astype("<i8").tobytes()
    write_atomic(join(uri, FREQUENCIES), lambda stream: stream.write(counts))
    passages = 0
    for i, entry in enumerate(entries):
        held = entry["first"], entry["first"] + entry["passages"]
        expected = (passages, passages + entry["passages"]) if spans is None else tuple(spans[i])
        if held != expected:
            where = join(uri, shard_name(i))
            raise JobError(f"{where}: holds the passages {held[0]} to {held[1]}, not {expected[0]} to {expected[1]}")
        passages += entry["passages"]
    dim, codec, codec_digest = shape or (0, "fp16", "")
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint,
        "passages": passages,
        "tokens": sum(entry["tokens"] for entry in entries),
        "dim": dim,
        "codec": codec,
        "codec_digest": codec_digest,
        "vocabulary": len(frequencies),
        "bytes": sum(entry["bytes"] for entry in entries),
        "sha256": {LENGTHS: digest.hexdigest(), FREQUENCIES: hashlib.sha256(counts).hexdigest()},
        "shards": entries,
        **extra,
    }
    write_json_atomic(join(uri, MANIFEST), manifest)


def write_manifest(uri: str, fingerprint: str, shards: int) -> None:
    """`close_store` of a store of so many shards, all read in this process."""
    close_store(uri, fingerprint, [summarise_shards(uri, fingerprint, 0, shards)])


def intact_shards(
    uri: str, fingerprint: str, names: Iterable[str] | None = None, codec_digest: str | None = None
) -> tuple[dict[int, ShardHeader], dict[str, str]]:
    """Shards with this fingerprint that a stopped stage has left in `uri`, checked byte by byte.

    Args:
        names: of the files to check; all shards when None.
        codec_digest: shards that were written with another codec are refused; None accepts any.

    Returns:
        headers by shard index; and the reason for each file name that is refused.
    """
    good: dict[int, ShardHeader] = {}
    refused: dict[str, str] = {}
    for name in list_files(uri, ".arrow") if names is None else names:
        try:
            shard = Shard(join(uri, name))
            if shard.header.fingerprint != fingerprint or shard_name(shard.header.index) != name:
                refused[name] = f"{join(uri, name)}: written by another run, or for another place"
            elif codec_digest is not None and shard.header.codec_digest != codec_digest:
                refused[name] = f"{join(uri, name)}: written with another codec"
            else:
                shard.verify()
                good[shard.header.index] = shard.header
        except BrokenShardError as error:
            refused[name] = str(error)
    return good, refused
