"""The embed stage: Ray Data streams texts through tokenising tasks into a pool of encoder actors that write shards.

The unit of work is one shard, a run of consecutive texts. Only shard numbers and a line of figures pass the driver:
texts are read where they are tokenised, embeddings are written where they are computed. A shard with this run's
fingerprint is not computed again, whether an actor, its node or the driver has died.

Memory does not grow with the corpus: an actor holds its model, the activations of one batch (`token_budget`) and the
rows of one shard (`passages_per_shard` texts) with their encoded form; the object store holds the token ids of a few
shards an actor; the driver holds three numbers a shard.

A passage on which the encoder fails every time (bad_texts.py) gets no rows. `SHARD.set-aside.json` next to the shard
and the store's manifest name it. More than `max_bad_passages` of them end the stage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import ray

from ckd_ray.config import EmbedConfig
from ckd_ray.data import Collection
from ckd_ray.embed.bad_texts import TRIES, Entry, GuardedEncoder, named, too_many, with_empty_texts
from ckd_ray.embed.survey import check_shards, close_in_tasks
from ckd_ray.errors import JobError, UserError, described
from ckd_ray.files import (
    delete,
    exists,
    join,
    list_files,
    local_copy,
    make_folder,
    read_object,
    with_ending,
    write_json_atomic,
)
from ckd_ray.progress import Progress, say
from ckd_ray.ray_util.actor_pool import Pool, place_pool
from ckd_ray.ray_util.processes import actor_device
from ckd_ray.ray_util.through_pool import through_pool
from ckd_ray.store import EmbeddingStore, ShardHeader, shard_name, write_shard
from ckd_ray.store.codec import load_codec
from ckd_ray.store.shard import BrokenShardError, read_header

if TYPE_CHECKING:
    from ckd_ray.model.encoder import Encoded

PLAN, BAD_PASSAGES = "plan.json", ".set-aside.json"
# Every shard costs a file, a task and a line of the manifest. 140 million texts make 11,506 shards of at most 16,384.
_MOST_SHARDS = 50_000


@dataclass(frozen=True)
class EmbedJob:
    """What to encode, with what, and where to put it; the same in every process.

    Attributes:
        run: the run directory, which holds the collection.
        texts: `passages`, or `queries.SPLIT`.
        checkpoint: the folder of the ColBERT model (of the encoder when `pooled`), visible to all workers.
        out: the folder of the store.
        fingerprint: of settings and inputs; shards with another one are computed again.
        codec: how the store keeps rows; a learned one is in `out` already, with `codec_digest`.
        max_bad: passages that may be left without rows because the encoder fails on them.
        pooled: one row a text, of a pooled encoder (`PooledModel.save`), instead of a row for every token.
    """

    run: str
    texts: str
    checkpoint: str
    out: str
    fingerprint: str
    token_budget: int | Literal["auto"]
    precision: Literal["fp32", "bf16", "fp16", "int8"]
    codec: str = "fp16"
    codec_digest: str = ""
    max_bad: int = 0
    pooled: bool = False

    @property
    def tokenised(self) -> bool:
        """Whether texts reach the actor as token ids; queries of ColBERT reach it as texts."""
        return self.pooled or self.texts == "passages"


class Encoder(Protocol):
    """What an actor needs of a model: `TextEncoder`, `PooledEncoder`, or a stand-in that measures the stream itself."""

    dim: int

    def passages(self, tokens: Sequence[Any]) -> Encoded:
        """Encode tokenised passages."""

    def queries(self, texts: Sequence[str]) -> Encoded:
        """Encode query texts."""


def plan_shards(num_texts: int, passages_per_shard: int | Literal["auto"]) -> list[tuple[int, int]]:
    """(first, stop) of every shard.

    `auto` aims at 256 shards of 512 to 16,384 texts (fewer texts make 8 shards, of at least 128). The last quarter of
    the texts goes into ever smaller ones, down to a quarter of that, so that actors end together.

    Raises:
        UserError: there would be more shards than a plan should hold.
    """
    auto = min(16384, max(512, -(-num_texts // 256)), max(128, -(-num_texts // 8)))
    if passages_per_shard == "auto":
        spans, first = [], 0
        while first < num_texts:
            stop = min(num_texts, first + min(auto, max(auto // 4, 4 * auto * (num_texts - first) // num_texts)))
            spans.append((first, stop))
            first = stop
        return spans
    if -(-num_texts // passages_per_shard) > _MOST_SHARDS:
        raise UserError(
            "so small shards are too many",
            where="embed.passages_per_shard",
            expected=f"at least {-(-num_texts // _MOST_SHARDS)}, or auto, which is {auto} here",
            found=f"{passages_per_shard}: {-(-num_texts // passages_per_shard):,} shards for {num_texts:,} texts",
            fix=f"--set embed.passages_per_shard={auto}",
        )
    return [(first, min(first + passages_per_shard, num_texts)) for first in range(0, num_texts, passages_per_shard)]


def embed_texts(
    jobs: Sequence[tuple[EmbedJob, Sequence[tuple[int, int]]]],
    settings: EmbedConfig,
    *,
    stage: str = "embed",
    make_encoder: Callable[[EmbedJob, int], Encoder] | None = None,
) -> list[EmbeddingStore]:
    """Encode the texts of all jobs that are not in their stores yet, in one stream; close the stores and open them.

    Args:
        jobs: each with the (first, stop) of its shards. They share a checkpoint, so one pool of actors serves all.
        make_encoder: (job, threads) to the encoder of an actor; `load_encoder` when None.

    Raises:
        UserError: the pool of actors does not fit the cluster.
        JobError: an encoder failed, or the actors did not start.
    """
    spans = [_agree_on_plan(job, list(wanted)) for job, wanted in jobs]
    work: list[dict[str, int]] = []
    done = 0
    for number, (job, _) in enumerate(jobs):
        intact = _finished_shards(job, stage)
        done += sum(header.passages for header in intact.values())
        work += [
            {"job": number, "shard": i, "first": first, "stop": stop}
            for i, (first, stop) in enumerate(spans[number])
            if i not in intact
        ]
    total = sum(stop - first for shards in spans for first, stop in shards)
    with Progress(stage, total, "texts", done=done) as progress:
        if work:
            pool = place_pool(settings.actors, settings.gpus_per_actor, limit=len(work))
            try:
                for row in _stream([job for job, _ in jobs], work, pool, make_encoder or load_encoder):
                    progress.advance(row["passages"])
            except JobError as error:  # an actor's, with Ray's traceback around it
                raise getattr(error, "cause", error) from None
    for (job, _), shards in zip(jobs, spans, strict=True):
        bad = bad_passages(job)
        if len(bad) > job.max_bad:  # several actors may each have accepted one that was still allowed
            raise JobError(too_many(job.texts, bad, job.max_bad))
        if bad:
            say(f"{stage}: {len(bad)} passages have no embeddings; the encoder fails on them every time: {named(bad)}")
        extra = {"set_aside": bad} if bad else {}
        close_in_tasks(job.out, job.fingerprint, shards, precision=job.precision, texts=job.texts, **extra)
    return [EmbeddingStore.open(job.out) for job, _ in jobs]


def bad_passages(job: EmbedJob) -> list[Entry]:
    """The passages of a store that could not be encoded."""
    records = [read_object(join(job.out, name)) for name in list_files(job.out, BAD_PASSAGES)]
    entries = [entry for record in records if record["fingerprint"] == job.fingerprint for entry in record["passages"]]
    return sorted(entries, key=lambda entry: int(entry["index"]))


def _finished_shards(job: EmbedJob, stage: str) -> dict[int, ShardHeader]:
    """Intact shards that an earlier run of this job has left; others are named and removed."""
    make_folder(job.out)
    for name in list_files(job.out, TRIES):  # every command counts from the start
        delete(join(job.out, name))
    intact, refused = check_shards(job.out, job.fingerprint, job.codec_digest)
    for name, why in refused.items():
        say(f"{stage}: {why}; it is computed again")
        delete(join(job.out, name))
    for name in list_files(job.out, BAD_PASSAGES):  # a shard that is computed again may have no bad passages this time
        if name.removesuffix(BAD_PASSAGES) not in {shard_name(i) for i in intact}:
            delete(join(job.out, name))
    if intact:
        say(f"{stage}: {job.texts}: {len(intact)} shards are there already")
    return intact


def _agree_on_plan(job: EmbedJob, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The recorded spans of a stopped run, even if the settings would now cut differently; else record `spans`."""
    plan = join(job.out, PLAN)
    if exists(plan):
        kept = read_object(plan)
        if kept.get("fingerprint") == job.fingerprint:
            before = _spans(kept.get("spans"))
            if _texts_of(before) == _texts_of(spans):
                return before
            say(f"{plan}: does not cover the texts that there are; they are cut into shards again")
    write_json_atomic(plan, {"fingerprint": job.fingerprint, "spans": spans})
    return spans


def _spans(value: Any) -> list[tuple[int, int]]:
    """The pairs of a plan's file; none when it holds anything else."""
    try:
        return [(int(first), int(stop)) for first, stop in value]
    except (TypeError, ValueError):
        return []


def _texts_of(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The runs of consecutive texts that shards cover, whatever the cuts between them."""
    runs: list[tuple[int, int]] = []
    for first, stop in spans:
        if runs and runs[-1][1] == first:
            runs[-1] = (runs[-1][0], stop)
        else:
            runs.append((first, stop))
    return runs


def _stream(jobs: list[EmbedJob], work: list[dict[str, int]], pool: Pool, make_encoder: Any) -> Iterator[Any]:
    """Rows of figures, one a shard, as they are finished."""
    for _ in range(pool.feeders):
        # The processes that will tokenise load their libraries while the actors load the model.
        ray.remote(_load_tokenizer).options(num_cpus=pool.feeder_cpus).remote(jobs[0])
    return through_pool(
        work,
        pool,
        prepare=_tokenise,
        prepare_arguments={"jobs": jobs},
        actor=ShardEncoder,
        actor_arguments={"jobs": jobs, "threads": pool.threads, "make_encoder": make_encoder},
        smaller="If a shard takes that long, lower embed.passages_per_shard",
    )


@lru_cache(maxsize=4)
def _tokenizer_and_texts(job: EmbedJob) -> tuple[Any, Any]:
    """Loaded once a worker process: the tokenizer and the function that reads texts."""
    from ckd_ray.model.colbert import load_tokenizer
    from ckd_ray.model.pooled import load_pooled_tokenizer
    from ckd_ray.model.sources import local_tokenizer

    with local_tokenizer(job.checkpoint) as folder:
        tokenizer = load_pooled_tokenizer(folder) if job.pooled else load_tokenizer(folder)
    collection = Collection.open(job.run)
    if job.texts == "passages":
        return tokenizer, collection.iter_passages
    split = job.texts.removeprefix("queries.")
    return tokenizer, lambda first, stop: collection.queries_between(split, first, stop).texts


def _load_tokenizer(job: EmbedJob) -> None:
    _tokenizer_and_texts(job)


def _tokenise(batch: dict[str, Any], jobs: list[EmbedJob]) -> pa.Table:
    """Read and tokenise the texts of one shard: one row with flat token ids and their lengths.

    Queries of ColBERT stay texts: their rows have one length, and the encoder tokenises them fast enough.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    number, shard, first, stop = (int(batch[name][0]) for name in ("job", "shard", "first", "stop"))
    job = jobs[number]
    tokenizer, texts_of = _tokenizer_and_texts(job)
    texts = list(texts_of(first, stop))
    tokens, failed = _tokens(tokenizer, texts) if job.tokenised else ([], {})
    flat = np.concatenate(tokens) if tokens else np.empty(0, np.int32)
    return pa.table(
        {
            "job": [number],
            "shard": [shard],
            "first": [first],
            "lengths": pa.array([np.array([len(t) for t in tokens], np.int32)], pa.large_list(pa.int32())),
            "token_ids": pa.array([flat], pa.large_list(pa.int32())),
            "queries": pa.array([[] if job.tokenised else texts], pa.large_list(pa.large_string())),
            "failed": pa.array([list(failed)], pa.large_list(pa.int32())),
            "causes": pa.array([list(failed.values())], pa.large_list(pa.large_string())),
        }
    )


def _tokens(tokenizer: Any, texts: list[str]) -> tuple[list[Any], dict[int, str]]:
    """The token ids of every text, and the errors of texts on which the tokenizer fails, which have no ids."""
    try:
        return tokenizer.passages(texts), {}
    except Exception:  # a tokenizer may raise anything on a text; one text at a time shows on which
        tokens, failed = [], {}
        for i, text in enumerate(texts):
            try:
                tokens += tokenizer.passages([text])
            except Exception as error:
                tokens.append(np.empty(0, np.int32))
                failed[i] = described(error)[:300]
        return tokens, failed


class ShardEncoder:
    """An actor: encodes the shards that reach it and writes each to its store. Returns figures, never embeddings."""

    def __init__(self, jobs: list[EmbedJob], threads: int, make_encoder: Callable[[EmbedJob, int], Encoder]) -> None:
        self.jobs = jobs
        self.encoder = make_encoder(jobs[0], threads)
        self.device = actor_device()

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._write(table.slice(i, 1)) for i in range(table.num_rows)])

    def _write(self, row: pa.Table) -> dict[str, int]:
        job = self.jobs[row["job"][0].as_py()]
        index = row["shard"][0].as_py()
        uri = join(job.out, shard_name(index))
        header = _already_there(uri, job, index)
        if header is None:
            encoder = GuardedEncoder(with_ending(uri, TRIES), *self._texts(job, row), shard=uri)
            encoded, bad = encoder.run()
            bad |= dict(zip(row["failed"][0].as_py(), row["causes"][0].as_py(), strict=True))
            if bad:
                _record_bad(job, uri, row["first"][0].as_py(), len(row["lengths"][0]), bad)
                encoded = with_empty_texts(encoded, len(row["lengths"][0]), bad)
            header, _ = write_shard(
                uri,
                fingerprint=job.fingerprint,
                index=index,
                first=row["first"][0].as_py(),
                lengths=encoded.lengths,
                token_ids=encoded.token_ids,
                embeddings_TD=encoded.embeddings_TD,
                codec=load_codec(job.codec, self.encoder.dim, job.out, job.codec_digest),
                device=self.device,
            )
            encoder.done()
        return {"shard": index, "passages": header.passages, "tokens": header.tokens}

    def _texts(self, job: EmbedJob, row: pa.Table) -> tuple[int, Callable[[list[int]], Encoded]]:
        """How many texts a shard has, and the call that encodes some of them."""
        if job.tokenised:
            tokens = _split(row)
            failed = set(row["failed"][0].as_py())
            return len(tokens), lambda some: self.encoder.passages([tokens[i] for i in some if i not in failed])
        texts = row["queries"][0].as_py()
        return len(texts), lambda some: self.encoder.queries([texts[i] for i in some])


def _record_bad(job: EmbedJob, uri: str, first: int, count: int, bad: dict[int, str]) -> None:
    """Record the bad texts of the shard `uri`, whose first text is `first`.

    Raises:
        JobError: they are queries, or there are too many; names them.
    """
    causes = {first + i: cause for i, cause in sorted(bad.items())}
    collection = Collection.open(job.run)
    if job.texts == "passages":
        ids = collection.passage_ids(list(causes))
    else:
        split = job.texts.removeprefix("queries.")
        ids = [collection.queries_between(split, i, i + 1).ids[0] for i in causes]
    entries = [
        {"index": i, "passage_id": name, "cause": cause} for (i, cause), name in zip(causes.items(), ids, strict=True)
    ]
    others = [entry for entry in bad_passages(job) if not first <= entry["index"] < first + count]
    allowed = job.max_bad if job.texts == "passages" else 0
    if len(others) + len(entries) > allowed:
        raise JobError(too_many(job.texts, others + entries, allowed))
    write_json_atomic(with_ending(uri, BAD_PASSAGES), {"fingerprint": job.fingerprint, "passages": entries})


def load_encoder(job: EmbedJob, threads: int) -> Encoder:
    """The model of a job's checkpoint on the actor's device."""
    import torch

    from ckd_ray.model import ColBERT
    from ckd_ray.model.encoder import PooledEncoder, TextEncoder
    from ckd_ray.model.pooled import PooledModel

    torch.set_num_threads(min(threads, os.cpu_count() or 1))
    options: dict[str, Any] = {"device": actor_device(), "token_budget": job.token_budget, "precision": job.precision}
    with local_copy(job.checkpoint) as folder:
        if job.pooled:
            return PooledEncoder(PooledModel.from_pretrained(folder), **options)
        return TextEncoder(ColBERT.from_pretrained(folder), **options)


def _already_there(uri: str, job: EmbedJob, index: int) -> ShardHeader | None:
    """The header of a shard that an actor finished before it died."""
    try:
        header = read_header(uri)[0]
    except BrokenShardError:  # or there is none
        return None
    return header if header.fingerprint == job.fingerprint and header.index == index else None


def _split(row: pa.Table) -> list[Any]:
    """The token ids of each passage, as views of one flat array."""
    lengths = row["lengths"][0].values.to_numpy()
    flat = row["token_ids"][0].values.to_numpy()
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []
