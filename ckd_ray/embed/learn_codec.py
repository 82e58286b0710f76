"""Learning the codec of a store from a sample of the corpus, before the store is written.

The sample goes through the same stream as the corpus into a small fp16 store in a subfolder, so a killed run resumes
here too; the sample is removed once the codec is written.
"""

from __future__ import annotations

import os
from dataclasses import replace

import ray
import torch

from ckd_ray.config import EmbedConfig
from ckd_ray.embed.stream import EmbedJob, embed_texts
from ckd_ray.files import delete, exists, has_digest, join, read_json, write_json_atomic
from ckd_ray.progress import say
from ckd_ray.ray_util.actor_pool import cluster_nodes
from ckd_ray.ray_util.gpus import share_of_gpu
from ckd_ray.ray_util.waiting import answer
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.codec import CODEC_FILE, CODEC_RECORD, RESIDUAL_BITS, save_codec
from ckd_ray.store.codec_training import learn_codec, sample_spans
from ckd_ray.store.spherical import has_gpus

_SAMPLE = "sample"


def with_codec(
    job: EmbedJob,
    num_passages: int,
    settings: EmbedConfig,
    *,
    seed: int,
    stage: str = "embed",
) -> EmbedJob:
    """`job` with the digest of its codec, which is learned first unless an earlier run has done that.

    Args:
        job: of passages.
        num_passages: of the corpus.
        seed: of the sample and of k-means.
    """
    if job.codec not in RESIDUAL_BITS or num_passages == 0:
        return replace(job, codec="fp16" if num_passages == 0 else job.codec)
    record = join(job.out, CODEC_RECORD)
    if exists(record):
        kept = read_json(record)
        learned = join(job.out, CODEC_FILE)
        if kept["fingerprint"] == job.fingerprint:
            if has_digest(learned, kept["digest"]):
                delete(join(job.out, _SAMPLE))
                return replace(job, codec_digest=kept["digest"])
            # On the same kind of machine the same sample gives the same codec, and all shards are kept. Shards that
            # were written with another codec are refused.
            say(f"{stage}: {learned}: missing, or not what the shards were written with; it is learned again")
    spans = sample_spans(num_passages, seed)
    sample = replace(job, out=join(job.out, _SAMPLE), codec="fp16", fingerprint=f"{job.fingerprint}/sample")
    store = embed_texts([(sample, spans)], settings, stage=f"{stage} sample")[0]
    gpus = 1 if has_gpus() and share_of_gpu(settings.gpus_per_actor, cluster_nodes()[0]) else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus)(_learn)
    digest, centroids = answer("learning the codec", task.remote(job, store.uri, num_passages, seed))
    say(f"{stage}: {job.codec} learned from {store.num_tokens:,} token embeddings ({centroids:,} centroids)")
    write_json_atomic(record, {"fingerprint": job.fingerprint, "digest": digest, "centroids": centroids})
    delete(store.uri)
    return replace(job, codec_digest=digest)


def _learn(job: EmbedJob, sample: str, num_passages: int, seed: int) -> tuple[str, int]:
    """Runs in a task, so that the driver stays small, and on all cores, which nothing else needs at this time."""
    torch.set_num_threads(os.cpu_count() or 1)
    store = EmbeddingStore.open(sample)
    rows_SD = torch.cat([store.shard(i).embeddings() for i in range(store.num_shards)])
    tokens = int(store.num_tokens / max(1, store.num_passages) * num_passages)
    codec = learn_codec(job.codec, rows_SD, tokens, seed)
    return save_codec(codec, job.out), codec.num_centroids
