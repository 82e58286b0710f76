"""How the stages would be placed on a cluster and which ways they would take: asked of the code that will decide it.

What would be refused on the cluster is refused here, in the same words and before it costs anything.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ckd_ray.config import Config
from ckd_ray.distill.placement import place_workers
from ckd_ray.embed.stream import plan_shards
from ckd_ray.errors import UserError
from ckd_ray.pipeline.graph import needed
from ckd_ray.pipeline.labelling import vote_way
from ckd_ray.plan.cluster import PlannedCluster
from ckd_ray.plan.estimate import Layout
from ckd_ray.plan.search_time import Servers
from ckd_ray.plan.sizes import Sizes
from ckd_ray.ray_util.actor_pool import plan_pool
from ckd_ray.retrieve.servers import SearchSettings, plan_servers
from ckd_ray.retrieve.shard_range import choose_engine

# Of a machine's memory Ray hands out about so much.
_RAY_SHARE = 0.7


def lay_out(config: Config, sizes: Sizes, cluster: PlannedCluster) -> Layout:
    """Actors, workers, servers and engines of a run on this cluster.

    Raises:
        UserError: something does not fit, as the stage itself would say.
    """
    nodes = cluster.nodes
    if config.embed.precision == "int8" and cluster.gpus:
        raise UserError(
            "int8 is for CPUs", where="embed.precision", expected="auto, bf16 or fp32 on a GPU", found="int8"
        )
    shards = plan_shards(sizes.passages, config.embed.passages_per_shard)
    queries = sum(len(plan_shards(n, config.embed.passages_per_shard)) for n in sizes.queries.values())
    pool = plan_pool(config.embed.actors, config.embed.gpus_per_actor, limit=len(shards) + queries, nodes=nodes)
    rows, dim = config.model.query_maxlen, config.model.dim
    vectors, train = int(sizes.vectors), sizes.queries.get("train", 0)
    engine = config.retrieve.engine
    if engine == "auto":
        engine = choose_engine(train, rows, vectors, dim, config.embed.codec)  # type: ignore[assignment]
    store: Any = SimpleNamespace(num_tokens=vectors, dim=dim)
    votes = vote_way(config, store, train)
    measured = sum(sizes.queries.get(split, 0) for split in config.evaluate.splits)
    evaluated = "exact"
    if config.evaluate.engine == "retrieve":
        evaluated = config.retrieve.engine
        if evaluated == "auto":
            evaluated = choose_engine(measured, rows, vectors, dim, config.embed.codec)

    def servers(kind: str) -> Servers:
        r = config.retrieve
        placed = plan_servers(
            SearchSettings(kind, r.cells, r.nprobe, r.candidates),
            r.actors,
            shards=len(shards),
            tokens=vectors,
            passages=sizes.passages,
            dim=dim,
            resources={"CPU": cluster.cpus, "GPU": cluster.gpus, "memory": _RAY_SHARE * cluster.memory},
        )
        node = max(node.cpus for node in nodes)
        return Servers(kind, placed.servers, min(placed.threads, max(1, int(node))), placed.gpus, placed.memory)

    workers = [
        place_workers(section.workers, section.batch_size, key, [_resources(node) for node in nodes]).most
        for key, section in (("teacher", config.teacher), ("distill", config.distill))
        if key == "distill" or config.teacher.checkpoint is None
    ]
    return Layout(
        stages=tuple(stage.name for stage in needed(config, "evaluate")),
        cpus=cluster.cpus,
        node_cpus=max(node.cpus for node in nodes),
        gpus=cluster.gpus,
        node_gpus=max(node.gpus for node in nodes),
        nodes=len(nodes),
        shards=len(shards),
        shard_passages=shards[0][1] - shards[0][0],
        last_passages=shards[-1][1] - shards[-1][0],
        actors=pool.actors,
        actor_threads=pool.threads,
        actor_gpus=pool.gpus_per_actor,
        feeders=min(float(pool.feeders), max(0.1, cluster.cpus - pool.actors * pool.cpus_per_actor)),
        retrieve=servers(engine),
        votes=votes,
        vote=servers(votes) if votes in ("exact", "faiss") else None,
        evaluate=servers(evaluated),
        teacher_workers=workers[0],
        distill_workers=workers[-1],
        network_bytes=cluster.network_gbit * 1e9 / 8,
        remote="://" in config.run.storage,
        memory=cluster.memory,
        accelerator=cluster.accelerator,
        smallest_node_gib=min(m.memory_gib for m in cluster.groups if m.cpus or m.gpus),
    )


def _resources(node: Any) -> dict[str, float]:
    return {"CPU": node.cpus, "GPU": node.gpus}
