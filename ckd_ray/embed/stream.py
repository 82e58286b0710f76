"""The embed stage: Ray Data streams texts through tokenising tasks into a pool of encoder actors that write shards.

The unit of work is one shard, a run of consecutive texts. Only shard numbers and a line of figures pass the driver: texts are
read where they are tokenised, embeddings are written where they are made. A shard that is already there with this run's
fingerprint is not computed again, whether the actor, its node or the driver has died in between.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray

from ckd_ray.config import EmbedConfig
from ckd_ray.data import Collection
from ckd_ray.embed.pool import Pool, plan_pool
from ckd_ray.progress import Progress, say
from ckd_ray.store import EmbeddingStore, ShardHeader, intact_shards, shard_name, write_manifest, write_shard
from ckd_ray.store.files import delete, exists, join, local_copy, make_folder, read_json, write_json_atomic
from ckd_ray.store.shard import BrokenShardError, read_header

PLAN = "plan.json"


@dataclass(frozen=True)
class EmbedJob:
    """What to encode, with what, and where to put it; the same in every process.

    Attributes:
        run: the run directory, which holds the collection.
        texts: `passages`, or `queries.SPLIT`.
        checkpoint: the folder of the ColBERT model, visible to all workers.
        out: the folder of the store.
        fingerprint: of settings and inputs; shards with another one are not ours.
    """

    run: str
    texts: str
    checkpoint: str
    out: str
    fingerprint: str
    token_budget: int
    precision: Literal["fp32", "bf16"]
    codec: str


def plan_shards(num_texts: int, passages_per_shard: int | Literal["auto"]) -> list[tuple[int, int]]:
    """(first, stop) of every shard. `auto` aims at 256 shards of 256 to 16,384 texts."""
    size = min(16384, max(256, -(-num_texts // 256))) if passages_per_shard == "auto" else passages_per_shard
    return [(first, min(first + size, num_texts)) for first in range(0, num_texts, size)]


def embed_texts(
    job: EmbedJob, settings: EmbedConfig, num_texts: int, *, stage: str = "embed", reason: str = ""
) -> EmbeddingStore:
    """Encode all texts of `job` that are not in its store yet, close the store and open it.

    Raises:
        UserError: the pool of actors does not fit the cluster.
        JobError: an encoder failed.
    """
    make_folder(job.out)
    spans = plan_shards(num_texts, settings.passages_per_shard)
    spans = _agree_on_plan(job, spans)
    done, refused = intact_shards(job.out, job.fingerprint)
    for name, why in refused.items():
        say(f"{stage}: {why}; it is computed again")
        delete(join(job.out, name))
    missing = [i for i in range(len(spans)) if i not in done]
    unit = "passages" if job.texts == "passages" else "queries"
    finished = sum(h.passages for h in done.values())
    if finished:
        say(f"{stage}: {len(done)} of {len(spans)} shards are already there")
    with Progress(stage, num_texts, unit, done=finished) as progress:
        if missing:
            pool = plan_pool(settings.actors, settings.gpus_per_actor, limit=len(missing))
            for row in _stream(job, [(i, *spans[i]) for i in missing], pool):
                progress.advance(row["passages"])
    headers = [read_header(join(job.out, shard_name(i)))[0] for i in range(len(spans))]
    _close(job, headers)
    return EmbeddingStore.open(job.out)


def _agree_on_plan(job: EmbedJob, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """A stopped run keeps its cut into shards, even when the settings would now cut otherwise."""
    plan = join(job.out, PLAN)
    if exists(plan):
        kept = read_json(plan)
        if kept["fingerprint"] == job.fingerprint:
            return [tuple(span) for span in kept["spans"]]
    write_json_atomic(plan, {"fingerprint": job.fingerprint, "spans": spans})
    return spans


def _close(job: EmbedJob, headers: list[ShardHeader]) -> None:
    from ckd_ray.store.files import filesystem_of

    size = 0
    for header in headers:
        fs, path = filesystem_of(join(job.out, shard_name(header.index)))
        size += int(fs.get_file_info(path).size)
    write_manifest(job.out, job.fingerprint, headers, size, precision=job.precision, texts=job.texts)


def _stream(job: EmbedJob, work: Sequence[tuple[int, int, int]], pool: Pool) -> Any:
    """Rows of figures, one a shard, as they are finished."""
    items = [{"shard": i, "first": first, "stop": stop} for i, first, stop in work]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    dataset = dataset.map_batches(
        _tokenise,
        fn_kwargs={"job": job},
        batch_size=1,
        batch_format="numpy",
        num_cpus=pool.feeder_cpus,
        compute=ray.data.TaskPoolStrategy(size=pool.feeders),
    )
    dataset = dataset.map_batches(
        ShardEncoder,
        fn_constructor_kwargs={"job": job, "threads": pool.threads},
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor or None,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=pool.actors, max_tasks_in_flight_per_actor=2),
    )
    return dataset.iter_rows()


@lru_cache(maxsize=4)
def _tokenizer_and_texts(job: EmbedJob) -> tuple[Any, Any]:
    """Loaded once a worker process: the tokenizer alone (no weights) and the source of the texts."""
    from ckd_ray.model.colbert import load_tokenizer

    with local_copy(job.checkpoint) as folder:
        tokenizer = load_tokenizer(folder)
    collection = Collection.open(job.run)
    if job.texts == "passages":
        return tokenizer, collection.iter_passages
    texts = collection.queries(job.texts.removeprefix("queries.")).texts
    return tokenizer, lambda first, stop: texts[first:stop]


def _tokenise(batch: dict[str, Any], job: EmbedJob) -> pa.Table:
    """Read and tokenise the texts of one shard: one row, its token ids flat beside their lengths."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer, texts_of = _tokenizer_and_texts(job)
    shard, first, stop = (int(batch[name][0]) for name in ("shard", "first", "stop"))
    texts = list(texts_of(first, stop))
    row: dict[str, Any] = {"shard": [shard], "first": [first]}
    if job.texts == "passages":
        tokens = tokenizer.passages(texts)
        flat = np.concatenate(tokens) if tokens else np.empty(0, np.int32)
        row["lengths"] = pa.array([np.array([len(t) for t in tokens], np.int32)], pa.large_list(pa.int32()))
        row["token_ids"] = pa.array([flat], pa.large_list(pa.int32()))
    else:
        row["texts"] = [texts]
    return pa.table(row)


class ShardEncoder:
    """An actor: encodes the shards that reach it and writes each to the store. Returns figures, never embeddings."""

    def __init__(self, job: EmbedJob, threads: int) -> None:
        import torch

        from ckd_ray.embed.encoder import TextEncoder
        from ckd_ray.model import ColBERT
        from ckd_ray.store.codec import make_codec

        torch.set_num_threads(min(threads, os.cpu_count() or 1))
        self.job = job
        with local_copy(job.checkpoint) as folder:
            model = ColBERT.from_pretrained(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.encoder = TextEncoder(model, device=device, token_budget=job.token_budget, precision=job.precision)
        self.codec = make_codec(job.codec, model.settings.dim)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = [self._one(row) for row in table.slice(0).to_batches() for row in _rows(row)]
        return pa.Table.from_pylist(rows)

    def _one(self, row: dict[str, Any]) -> dict[str, int]:
        index, first = row["shard"], row["first"]
        uri = join(self.job.out, shard_name(index))
        if exists(uri):
            # A retried task whose first try had come as far as the rename.
            try:
                header, _, _ = read_header(uri)
                if header.fingerprint == self.job.fingerprint and header.index == index:
                    return {"shard": index, "passages": header.passages, "tokens": header.tokens}
            except BrokenShardError:
                delete(uri)
        encoded = self.encoder.queries(row["texts"]) if "texts" in row else self.encoder.passages(_split(row))
        header, _ = write_shard(
            uri,
            fingerprint=self.job.fingerprint,
            index=index,
            first=first,
            lengths=encoded.lengths,
            token_ids=encoded.token_ids,
            embeddings_TD=encoded.embeddings_TD,
            codec=self.codec,
        )
        return {"shard": index, "passages": header.passages, "tokens": header.tokens}


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows of a batch, lists as numpy arrays (no Python object a token)."""
    rows = []
    for i in range(batch.num_rows):
        row: dict[str, Any] = {"shard": batch["shard"][i].as_py(), "first": batch["first"][i].as_py()}
        if "texts" in batch.schema.names:
            row["texts"] = batch["texts"][i].as_py()
        else:
            row["lengths"] = batch["lengths"][i].values.to_numpy()
            row["token_ids"] = batch["token_ids"][i].values.to_numpy()
        rows.append(row)
    return rows


def _split(row: dict[str, Any]) -> list[Any]:
    return np.split(row["token_ids"], np.cumsum(row["lengths"])[:-1]) if len(row["lengths"]) else []
