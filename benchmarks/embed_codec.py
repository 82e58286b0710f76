"""2-bit codes against fp16 on the same rows: bytes a token, ranking; and random reads from cold pages.

The rows are those of a finished run's store (`--run`), coded again with a codec that is learned from them, or those of
a collection that is embedded here. Ranking is exact search of the dev queries, MRR@10.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import figure, note
from embed_source import source

from ckd_ray.data import Collection
from ckd_ray.evaluate.measures import measure_run
from ckd_ray.retrieve.exact import Scorer, search_all
from ckd_ray.retrieve.merge import merge_top
from ckd_ray.retrieve.rows import FlatRows
from ckd_ray.store import EmbeddingStore, shard_name, write_manifest, write_shard
from ckd_ray.store.codec import load_codec, save_codec
from ckd_ray.store.codec_training import choose_centroids, sample_size, train_codec

READS = 1000


def figures(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """codec2_bytes_per_token, codec2_mrr_ratio."""
    torch.set_num_threads(os.cpu_count() or 1)
    embedded = _embedded(args.run, args.data, args.quick)
    passages = EmbeddingStore.open(f"{embedded}/embeddings/passages")
    most = 200 if args.quick else 10**9
    with folder() as out:
        started = time.perf_counter()
        coded = code_again(passages, out, "residual2")
        seconds = time.perf_counter() - started
        exact, approximate = (mrr(embedded, store, most) for store in (passages, coded))
        width = sum(coded.shard(i).codes.nbytes for i in range(coded.num_shards)) / coded.num_tokens
        bits = {"passages": passages.num_passages, "tokens": passages.num_tokens, "fp16_mrr10": round(exact, 4)}
        bits |= {"codec2_mrr10": round(approximate, 4), "coding_seconds": round(seconds, 1)}
        settings["codec"] = bits
        note(str(bits))
    return {
        "codec2_bytes_per_token": figure(width, 36, "lower"),
        "codec2_mrr_ratio": figure(approximate / exact, 0.99, "higher"),
    }


def reads(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """cold_reads_per_second, warm_reads_per_second: 1,000 passages at random."""
    embedded = _embedded(args.run, args.data, args.quick)
    with folder() as copy:
        # A copy: nothing else may have these files mapped, or the kernel would keep their pages.
        shutil.copytree(f"{embedded}/embeddings/passages", f"{copy}/passages")
        drop_pages(f"{copy}/passages")
        store = EmbeddingStore.open(f"{copy}/passages")
        chosen = np.random.default_rng(5).integers(0, store.num_passages, READS)
        rates = []
        before = _read_bytes()
        for _ in range(2):
            started = time.perf_counter()
            store.gather(chosen)
            rates.append(READS / (time.perf_counter() - started))
            settings.setdefault("reads", {"store_mib": round(store.manifest["bytes"] / 2**20)})
            settings["reads"].setdefault("cold_read_mib", round((_read_bytes() - before) / 2**20, 1))
        note(f"{settings['reads']}, {rates}")
    return {
        "cold_reads_per_second": figure(rates[0], None, "higher"),
        "warm_reads_per_second": figure(rates[1], None, "higher"),
    }


@lru_cache(maxsize=1)
def _embedded(run: str | None, data: str | None, quick: bool) -> str:
    """A run directory with embeddings of passages and dev queries; `run` itself when it is given."""
    from ckd_ray.config import EmbedConfig
    from ckd_ray.embed.stream import embed_texts, plan_shards
    from ckd_ray.ray_util.session import connected

    at = source(argparse.Namespace(run=run, data=data, quick=quick))
    if run:
        return at.folder
    note("embedding the collection")
    collection = at.collection
    sizes = {"passages": collection.num_passages, "queries.dev": len(collection.queries("dev").ids)}
    jobs = [(at.job(f"{at.folder}/embeddings/{n}", n), plan_shards(size, "auto")) for n, size in sizes.items()]
    with connected("local"):
        embed_texts(jobs, EmbedConfig())
    return at.folder


def code_again(store: EmbeddingStore, out: str, name: str) -> EmbeddingStore:
    """The rows of an fp16 store in another codec, learned from a sample of them, as a store in `out`."""
    wanted = sample_size(store.num_tokens)
    step = max(1, store.num_tokens // wanted)
    sample = torch.cat([store.shard(i).embeddings()[::step] for i in range(store.num_shards)])
    digest = save_codec(train_codec(name, sample, choose_centroids(store.num_tokens)), out)
    codec = load_codec(name, store.dim, out, digest)
    headers, size = [], 0
    for i in range(store.num_shards):
        shard = store.shard(i)
        header, written = write_shard(
            f"{out}/{shard_name(i)}",
            fingerprint="benchmark",
            index=i,
            first=shard.first,
            lengths=shard.lengths,
            token_ids=shard.token_ids,
            embeddings_TD=shard.embeddings(),
            codec=codec,
        )
        headers.append(header)
        size += written
    write_manifest(out, "benchmark", len(headers))
    return EmbeddingStore.open(out)


def mrr(run: str, passages: EmbeddingStore, most_queries: int) -> float:
    """MRR@10 of the first dev queries by exact search, eight shards in memory at a time."""
    collection = Collection.open(run)
    queries = EmbeddingStore.open(f"{run}/embeddings/queries.dev")
    count = min(most_queries, queries.num_passages)
    rows_BQD = queries.gather(np.arange(count)).padded()[0].float()
    parts = []
    for first in range(0, passages.num_shards, 8):
        shards = [passages.shard(i) for i in range(first, min(first + 8, passages.num_shards))]
        rows = torch.cat([shard.embeddings() for shard in shards])
        source = FlatRows(rows, np.concatenate([shard.lengths for shard in shards]), shards[0].first)
        parts.append(search_all(Scorer(rows_BQD, source), 10))
    return measured(collection, merge_top(parts, 10)[1])


def measured(collection: Collection, found_BK: Any) -> float:
    """MRR@10 of rankings (dense passage indices, best first) of the dev queries in their order."""
    asked, labels = collection.queries("dev").ids[: len(found_BK)], collection.qrels("dev")
    depth = found_BK.shape[1]
    run = pd.DataFrame(
        {
            "query_id": np.repeat(asked, depth),
            "doc_id": collection.passage_ids(found_BK.ravel()),
            "rank": np.tile(np.arange(1, depth + 1), len(asked)),
            "score": np.tile(-np.arange(1.0, depth + 1), len(asked)),
        }
    )
    table = {"query_id": labels.query_ids, "doc_id": labels.passage_ids, "relevance": labels.relevance}
    qrels = pd.DataFrame(table)
    return float(measure_run(run, qrels[qrels["query_id"].isin(set(asked))], ["MRR@10"], 1).mean["MRR@10"])


def drop_pages(path: str) -> None:
    """Ask the kernel to forget the files of a folder; they are on the disk first."""
    for entry in os.scandir(path):
        with open(entry.path, "rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_bytes() -> int:
    """Bytes that this process has made the storage deliver."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("read_bytes"))


@contextmanager
def folder() -> Iterator[str]:
    """A temporary folder."""
    path = tempfile.mkdtemp(prefix="ckd-ray-codec-")
    try:
        yield path
    finally:
        shutil.rmtree(path)
