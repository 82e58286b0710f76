"""Embedding a whole collection with one model, for the teacher, the student and the encoder as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ckd_ray.data import Collection
from ckd_ray.embed.learn_codec import with_codec
from ckd_ray.embed.stream import EmbedJob, embed_texts, plan_shards
from ckd_ray.files import exists, join, last_part, local_copy
from ckd_ray.model import ColBERT
from ckd_ray.model.pooled import PooledModel
from ckd_ray.pipeline.precision import agreed_precision, precision_on_cluster
from ckd_ray.runs.artifact import reopen
from ckd_ray.runs.directory import RunContext, passage_store, query_store
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.writing import MANIFEST


def reopen_for(out: str, splits: Sequence[str]) -> None:
    """Let `make` add the queries of `splits` to finished stores below `out` that were made for other splits."""
    if not all(exists(join(query_store(out, split), MANIFEST)) for split in splits):
        reopen(out)


def embed_all(
    context: RunContext,
    checkpoint: str,
    out: str,
    fingerprint: str,
    *,
    stage: str,
    splits: Sequence[str],
    pooled: bool = False,
    precision: str | None = None,
) -> EmbeddingStore:
    """Embed the corpus and the queries of `splits` into stores below `out`. Returns the store of the passages.

    Args:
        pooled: the checkpoint is a `PooledModel`, which gives one row a text; rows are kept in fp16.
        precision: instead of `embed.precision`.
    """
    config, collection = context.config.embed, Collection.open(context.paths.root)
    model_class: type[ColBERT] | type[PooledModel] = PooledModel if pooled else ColBERT

    def load() -> ColBERT | PooledModel:
        with local_copy(checkpoint) as folder:
            return model_class.from_pretrained(folder)

    asked = precision or config.precision
    agreed = agreed_precision(
        out, stage, lambda: precision_on_cluster(load, asked, config.gpus_per_actor, "embed.precision")
    )

    def job_of(store: str) -> EmbedJob:
        texts = last_part(store)
        return EmbedJob(
            run=context.paths.root,
            texts=texts,
            checkpoint=checkpoint,
            out=store,
            fingerprint=f"{fingerprint}/{texts}",
            token_budget=config.token_budget,
            precision=agreed,
            max_bad=config.max_bad_passages,
            pooled=pooled,
        )

    passages, count = job_of(passage_store(out)), collection.num_passages
    if not pooled:  # queries stay in fp16: they are few, and read in every comparison
        passages = replace(passages, codec=config.codec)
        passages = with_codec(passages, count, config, seed=context.config.run.seed, stage=stage)
    jobs = [(passages, plan_shards(count, config.passages_per_shard))]
    for split in splits:
        shards = plan_shards(collection.num_queries(split), config.passages_per_shard)
        jobs.append((job_of(query_store(out, split)), shards))
    return embed_texts(jobs, config, stage=stage)[0]
