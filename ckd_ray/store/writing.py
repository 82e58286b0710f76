"""Taking stock of the shards in a folder: which are whole, and closing the store when all are.

What is read here is read once for a store, in as many processes as there are (embed/survey.py): each answers for a
range of shards, and whoever closes the store sees lengths, document frequencies and checksums, never embeddings.
Shapes: P passages, V vocabulary ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ckd_ray.errors import JobError
from ckd_ray.files import filesystem_of, join, list_files, write_atomic, write_json_atomic
from ckd_ray.store.shard import BrokenShardError, Int32Array, Shard, ShardHeader, read_lengths, shard_name

MANIFEST = "manifest.json"
# Made of all shards when a store is closed: rows of every passage (int32), and document frequencies (int64).
LENGTHS, FREQUENCIES = "lengths.int32", "document_frequencies.int64"
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Stock:
    """What a manifest needs to know of consecutive shards.

    Attributes:
        entries: first, passages, tokens, bytes and sha256 of each shard.
        shape: dim, codec and codec_digest, which all shards of a store share; None without shards.
        lengths: (P,) rows of all their passages. frequencies: (V,) passages that hold each token id.
    """

    entries: list[dict[str, Any]]
    shape: tuple[int, str, str] | None
    lengths: Int32Array
    frequencies: npt.NDArray[np.int64]


def take_stock(uri: str, fingerprint: str, first: int, stop: int) -> Stock:
    """Read headers and lengths of the shards [first, stop) in `uri`.

    Raises:
        BrokenShardError: one is missing, cannot be read, or is not of this store.
    """
    entries, lengths = [], [np.empty(0, np.int32)]
    frequencies, shape = np.empty(0, np.int64), None
    for i in range(first, stop):
        where = join(uri, shard_name(i))
        header, ids, counts, its_lengths = read_lengths(where)
        fs, path = filesystem_of(where)
        mine = (header.dim, header.codec, header.codec_digest)
        if (header.fingerprint, header.index) != (fingerprint, i) or (shape or mine) != mine:
            raise BrokenShardError(f"{where}: belongs to another store, or another place in it", where)
        shape = mine
        size = int(fs.get_file_info(path).size)
        known = {"first": header.first, "passages": header.passages, "tokens": header.tokens}
        entries.append({**known, "bytes": size, "sha256": header.sha256})
        lengths.append(its_lengths)
        frequencies = _add(frequencies, np.bincount(ids, counts).astype(np.int64))
    return Stock(entries, shape, np.concatenate(lengths), frequencies)


def _add(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    total = np.zeros(max(len(a), len(b)), np.int64)
    total[: len(a)] += a
    total[: len(b)] += b
    return total


def close_store(
    uri: str,
    fingerprint: str,
    stocks: Iterable[Stock],
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    **extra: Any,
) -> None:
    """All shards are there: put lengths and document frequencies beside them, then the manifest that names all.

    Args:
        stocks: of all shards, in order; each is let go of before the next is asked for.
        spans: (first, stop) of the passages that each shard must hold, with gaps in a sample; None: all passages, so
            that each shard begins where the one before it ends.
        extra: further entries of the manifest.

    Raises:
        JobError: the shards are not those.
    """
    entries: list[dict[str, Any]] = []
    shape: tuple[int, str, str] | None = None
    frequencies, digest = np.empty(0, np.int64), hashlib.sha256()

    def write(stream: pa.NativeFile) -> None:
        nonlocal frequencies, shape
        for stock in stocks:
            if stock.shape != (shape or stock.shape):
                raise JobError(f"{uri}: shards of different codecs or dimensions: {shape}, {stock.shape}")
            shape = stock.shape
            entries.extend(stock.entries)
            frequencies = _add(frequencies, stock.frequencies)
            data = np.ascontiguousarray(stock.lengths, "<i4").tobytes()
            digest.update(data)
            stream.write(data)

    write_atomic(join(uri, LENGTHS), write)
    counts = frequencies.astype("<i8").tobytes()
    write_atomic(join(uri, FREQUENCIES), lambda stream: stream.write(counts))
    passages = 0
    for i, entry in enumerate(entries):
        mine = entry["first"], entry["first"] + entry["passages"]
        asked = (passages, passages + entry["passages"]) if spans is None else tuple(spans[i])
        if mine != asked:
            where = join(uri, shard_name(i))
            raise JobError(f"{where}: holds the passages {mine[0]} to {mine[1]}, not {asked[0]} to {asked[1]}")
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


def write_manifest(uri: str, fingerprint: str, headers: Sequence[ShardHeader], size: int = 0, **extra: Any) -> None:
    """`close_store` for a store whose shards this process has written; `size` counts for nothing."""
    close_store(uri, fingerprint, [take_stock(uri, fingerprint, 0, len(headers))], **extra)


def intact_shards(
    uri: str, fingerprint: str, names: Iterable[str] | None = None, codec_digest: str | None = None
) -> tuple[dict[int, ShardHeader], dict[str, str]]:
    """Shards of this very run that a stopped stage has left in `uri`, checked byte by byte, and what was refused.

    Args:
        names: of the files to look at; all shards when None.
        codec_digest: shards that were written with another codec are refused too; None takes any.

    Returns:
        headers by shard index, and for each file name that is broken or foreign the reason.
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
