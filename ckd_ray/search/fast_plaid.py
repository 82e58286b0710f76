"""An index of fast-plaid, written from a store shard by shard.

fast-plaid (1.4 to 1.7) stores ColBERTv2's residual codes: the number of a centroid, and a few bits a dimension of the
residual. So the codes of a `residual` store are copied, with the bits of every byte in reverse order. The rows of an
fp16 store are encoded with a codec that is learned from a sample. Files of part i:
`i.codes.npy` (int64), `i.residuals.npy` (uint8), `doclens.i.json`, `i.metadata.json`. Of the whole: `centroids.npy`,
`bucket_cutoffs.npy`, `bucket_weights.npy`, `avg_residual.npy`, `cluster_threshold.npy`, the inverted lists `ivf.npy`
(the passages of each centroid, each once) with `ivf_lengths.npy`, and `metadata.json`. A passage is a number in
fast-plaid; row n of our `passage_ids.parquet` has the id of passage n.

Shapes: T rows, D dimensions, C bytes a row, K centroids, P passages of a part.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ckd_ray.arrays import Int64Array
from ckd_ray.data import Collection
from ckd_ray.errors import UserError
from ckd_ray.files import (
    exists,
    join,
    list_files,
    read_array,
    sha256_of,
    write_array,
    write_atomic,
    write_json_atomic,
)
from ckd_ray.progress import Progress, say
from ckd_ray.retrieve.centroids import CentroidLists
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.codec import CODEC_FILE, RESIDUAL_BITS, Bytes, Residual, load_codec, save_codec
from ckd_ray.store.codec_training import learn_codec, sample_spans

_SEED = 17
# Rows that are encoded, or written, at a time.
_BLOCK = 1 << 16
_REVERSED = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)[:, ::-1], axis=1)[:, 0]


def write_index(target: str, store: EmbeddingStore, collection: Collection, *, bits: int) -> dict[str, Any]:
    """Write the files of `target` that are not there yet. Memory holds one shard, and 8 bytes a centroid.

    Args:
        bits: 1, 2 or 4 a dimension, where the store is fp16; a residual store has its own.

    Returns:
        `bits` and `centroids`.

    Raises:
        UserError: no such bits, or there are no token embeddings.
    """
    codec = _codec(target, store, bits)
    _write_codec(target, store, codec)
    offset, present = 0, set(list_files(target))
    with Progress("export", store.num_passages, "passages") as progress:
        for i, (first, stop) in enumerate(store.spans()):
            tokens = store.shard_tokens(i)
            if not {f"{i}.codes.npy", f"{i}.residuals.npy", f"doclens.{i}.json", f"{i}.metadata.json"} <= present:
                _write_part(target, store, i, codec)
                about = {"num_documents": stop - first, "num_embeddings": tokens, "embedding_offset": offset}
                write_json_atomic(join(target, f"{i}.metadata.json"), about)
            offset += tokens
            progress.reach(stop)
    _write_lists(target, store, codec.num_centroids)
    write_atomic(join(target, "passage_ids.parquet"), partial(_write_ids, collection))
    sizes = {"num_documents": store.num_passages, "num_embeddings": offset, "num_partitions": codec.num_centroids}
    average = offset / max(1, store.num_passages)
    whole = {"num_chunks": store.num_shards, "nbits": codec.bits, **sizes, "avg_doclen": average}
    write_json_atomic(join(target, "plan.json"), {"nbits": codec.bits, "num_chunks": store.num_shards})
    write_json_atomic(join(target, "metadata.json"), whole)
    return {"bits": codec.bits, "centroids": codec.num_centroids}


def _codec(target: str, store: EmbeddingStore, bits: int) -> Residual:
    """That of the store, or one that is learned from a sample of it and kept in `target`."""
    if not store.num_tokens:
        raise UserError("no token embeddings to index", where=store.uri)
    if isinstance(store.codec, Residual):
        return store.codec
    names = {b: name for name, b in RESIDUAL_BITS.items()}
    if bits not in names:
        raise UserError("no such codes", where="--bits", expected="1, 2 or 4", found=str(bits))
    uri = join(target, CODEC_FILE)
    if not exists(uri):
        spans = [np.arange(first, stop) for first, stop in sample_spans(store.num_passages, _SEED)]
        rows_SD = store.gather(np.concatenate(spans)).embeddings_TD
        say(f"export: codes of {bits} bits are learned from {len(rows_SD):,} token embeddings")
        save_codec(learn_codec(names[bits], rows_SD, store.num_tokens, _SEED), target)
    learned = load_codec(names[bits], store.dim, target, sha256_of(uri))
    assert isinstance(learned, Residual)
    return learned


def _write_codec(target: str, store: EmbeddingStore, codec: Residual) -> None:
    """Write centroids and buckets, and figures of the first rows' residuals, by which `update` adds centroids."""
    rows_TD = store.gather(np.arange(min(store.num_passages, 512))).embeddings_TD[:_BLOCK].float()
    left_TD = rows_TD - codec.centroids_KD[codec.nearest_centroids(rows_TD)].float()
    for name, values in {
        "centroids": codec.centroids_KD,
        "bucket_cutoffs": codec.cutoffs,
        "bucket_weights": codec.weights,
        "avg_residual": left_TD.abs().mean(0),
        "cluster_threshold": left_TD.norm(dim=1).quantile(0.75),
    }.items():
        write_array(join(target, f"{name}.npy"), values.numpy())


def _write_part(target: str, store: EmbeddingStore, i: int, codec: Residual) -> None:
    shard = store.shard(i)
    shard.verify()
    codes_TC = shard.codes if isinstance(store.codec, Residual) else _encoded(codec, shard.codec.decode(shard.codes))
    write_array(join(target, f"{i}.codes.npy"), codec.centroid_ids(codes_TC).astype(np.int64))
    write_array(join(target, f"{i}.residuals.npy"), _REVERSED[codec.packed_buckets(codes_TC)])
    write_atomic(
        join(target, f"doclens.{i}.json"), lambda stream: stream.write(json.dumps(shard.lengths.tolist()).encode())
    )


def _encoded(codec: Residual, rows_TD: torch.Tensor) -> Bytes:
    out = np.empty((len(rows_TD), codec.bytes_per_token), np.uint8)
    for start in range(0, len(rows_TD), _BLOCK):
        out[start : start + _BLOCK] = codec.encode(rows_TD[start : start + _BLOCK])
    return out


def _write_lists(target: str, store: EmbeddingStore, num_centroids: int) -> None:
    """The passages of each centroid, ascending: sorted part by part into a file on this machine, then written."""
    offsets = np.concatenate([[0], np.cumsum(store.lengths(), dtype=np.int64)])
    with tempfile.TemporaryFile() as file:
        lists = CentroidLists.build(
            partial(_codes, target, store),
            offsets,
            num_centroids,
            lambda total: np.memmap(file, np.int64, "w+", shape=(total,)),
        )
        write_array(join(target, "ivf.npy"), lists.passages)
    write_array(join(target, "ivf_lengths.npy"), np.diff(lists.bounds).astype(np.int32))


def _codes(target: str, store: EmbeddingStore) -> Iterator[Int64Array]:
    """The centroid of every row, part after part."""
    return (read_array(join(target, f"{i}.codes.npy")) for i in range(store.num_shards))


def _write_ids(collection: Collection, stream: pa.NativeFile) -> None:
    with pq.ParquetWriter(stream, pa.schema({"id": pa.string()}), compression="zstd") as file:
        for first in range(0, collection.num_passages, _BLOCK):
            passages = np.arange(first, min(first + _BLOCK, collection.num_passages))
            file.write_table(pa.table({"id": pa.array(collection.passage_ids(passages), pa.string())}))
