"""64 accelerators against one: the real stream with an encoder that sleeps 200 ms a batch instead of computing.

Four Ray nodes of 16 logical GPUs each (`ray.cluster_utils`); only the encoder is a stand-in, the stream reads,
tokenises, places actors and writes shards as always. The rate is that of a full pool: the clock runs from when every
accelerator has finished a shard to when the first could run out of work, since 64 processes that import torch on two
real cores say nothing about accelerators.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common import figure, note
from embed_growth import WORDS, write_corpus, write_tiny_model

from ckd_ray.checks import load_config
from ckd_ray.config import EmbedConfig
from ckd_ray.data import build_collection
from ckd_ray.embed.stream import EmbedJob, embed_texts
from ckd_ray.model.encoder import Encoded
from ckd_ray.model.length_buckets import token_budget_batches
from ckd_ray.progress import set_quiet

SECONDS_A_BATCH = 0.2
ACCELERATORS = 64
NODES = 4
SHARD = 400  # passages; some 9,000 tokens
BUDGET = 256  # tokens a batch: about 40 batches, 8 seconds a shard


class SleepingEncoder:
    """Takes 200 ms for every batch of the token budget, and gives rows of zeros."""

    dim = 16

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def passages(self, tokens: Sequence[Any]) -> Encoded:
        """Encode nothing, in real time."""
        lengths = np.array([len(ids) for ids in tokens], np.int32)
        for _ in token_budget_batches(lengths, self.budget):
            time.sleep(SECONDS_A_BATCH)
        return Encoded(lengths, np.concatenate(tokens), torch.zeros(int(lengths.sum()), self.dim, dtype=torch.float16))

    def queries(self, texts: Sequence[str]) -> Encoded:
        """Not asked for here."""
        raise NotImplementedError


def make_sleeping(job: EmbedJob, threads: int) -> SleepingEncoder:
    """The encoder of an actor."""
    torch.set_num_threads(1)
    return SleepingEncoder(BUDGET)


def figures(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """embed_64_simulated_speedup."""
    set_quiet(True)
    rounds = 4 if args.quick else 8
    shards = ACCELERATORS * rounds
    folder = tempfile.mkdtemp(prefix="ckd-ray-accelerators-")
    try:
        write_corpus(f"{folder}/data", shards * SHARD)
        config = load_config(None, ["collection.format=msmarco", f"collection.path={folder}/data"])
        build_collection(config.collection, f"{folder}/run")
        write_tiny_model(f"{folder}/run/teacher")
        one = finished(folder, 1, 3 if args.quick else 5)
        many = finished(folder, ACCELERATORS, shards)
        rate_of_one = (len(one) - 1) / float(one[-1] - one[0])
        # Every accelerator is at work from its own first shard on, until no shard waits any more.
        low, high = full_pool(many)
        rate_of_many = (high - low) / float(many[high] - many[low])
        settings["accelerators"] = {
            "shards": shards,
            "seconds_a_shard": round(1 / rate_of_one, 2),
            "counted_shards": int(high - low),
            "words": len(WORDS),
        }
        note(f"{settings['accelerators']}; {rate_of_one:.3f} and {rate_of_many:.3f} shards a second")
        return {"embed_64_simulated_speedup": figure(rate_of_many / rate_of_one, 58, "higher")}
    finally:
        shutil.rmtree(folder)


def finished(folder: str, accelerators: int, shards: int) -> Any:
    """The times, ascending, at which the shards of a run on so many accelerators were committed."""
    import ray
    from ray.cluster_utils import Cluster

    from ckd_ray.ray_util.session import _quiet_data

    nodes = min(NODES, accelerators)
    each = accelerators // nodes
    resources = {"num_cpus": each + 2, "num_gpus": each, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**resources, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            cluster.add_node(**resources)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        _quiet_data()
        job = EmbedJob(
            run=f"{folder}/run",
            texts="passages",
            checkpoint=f"{folder}/run/teacher",
            out=f"{folder}/out-{accelerators}",
            fingerprint="accelerators",
            token_budget=BUDGET,
            precision="fp32",
        )
        spans = [(i * SHARD, (i + 1) * SHARD) for i in range(shards)]
        embed_texts([(job, spans)], EmbedConfig(), make_encoder=make_sleeping)
    finally:
        ray.shutdown()
        cluster.shutdown()
    return np.sort([entry.stat().st_mtime for entry in os.scandir(job.out) if entry.name.endswith(".arrow")])


def full_pool(times: Any) -> tuple[int, int]:
    """(first, last) shard of the time in which all accelerators were at work.

    Shards take one time each, so the pool is full once 64 are finished, if all actors began together; later ones have
    their first shard within the next 64. The last 64 are the ones in hand when the queue is empty.
    """
    return ACCELERATORS, len(times) - ACCELERATORS - 1
