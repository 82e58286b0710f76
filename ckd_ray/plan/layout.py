"""How the stages would be placed on a cluster, and which engines they would use, by the code that decides it in a run.

What would be refused on the cluster is refused here, in the same words and before it costs anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from ckd_ray.config import Config
from ckd_ray.distill.placement import place_workers
from ckd_ray.embed.stream import plan_shards
from ckd_ray.model.encoder import configured_precision
from ckd_ray.pipeline.graph import needed
from ckd_ray.pipeline.labelling import vote_way
from ckd_ray.plan.cluster import GIB, PlannedCluster
from ckd_ray.plan.sizes import Sizes
from ckd_ray.ray_util.actor_pool import Pool, plan_pool
from ckd_ray.ray_util.gpus import share_of_gpu
from ckd_ray.retrieve.servers import Placement, SearchSettings, plan_servers
from ckd_ray.retrieve.shard_range import choose_engine

# Of a machine's memory Ray hands out about so much.
_RAY_SHARE = 0.7


@dataclass(frozen=True)
class Layout:
    """What each stage has to work with.

    Attributes:
        stages: those that run, in order.
        pool: the encoders. shard_passages: of the largest shard that one of them holds.
        engine, evaluate_engine: of the searches for training and for evaluation.
        votes: `feedback`, `exact`, `faiss` or `estimate`.
        servers: of each engine that the run uses.
        workers: of the trainings, `teacher` and `distill`.
        remote: the run's storage is a URI.
    """

    stages: tuple[str, ...]
    cluster: PlannedCluster
    pool: Pool
    shard_passages: int
    engine: str
    evaluate_engine: str
    votes: str
    servers: dict[str, Placement]
    workers: dict[str, int]
    remote: bool

    def lanes(self, kind: str) -> float:
        """Devices that share the work of a kind (`work.Unit.lanes`): GPUs where the work runs on them, else cores."""
        cluster, pool = self.cluster, self.pool
        if kind == "cores":
            return cluster.cpus
        if kind == "encode":
            on_gpus = pool.actors * min(1.0, pool.gpus_per_actor)
            return on_gpus or min(cluster.cpus, float(pool.actors * pool.threads))
        if kind in ("teacher", "distill"):
            workers, nodes = self.workers.get(kind, 1), cluster.nodes
            each = max(1.0, max(node.cpus for node in nodes) // -(-workers // len(nodes)))
            return workers if cluster.gpus else workers * each
        servers = self.servers[kind]
        if servers.gpus and kind == "exact":
            return servers.gpus * servers.servers
        return min(cluster.cpus, float(servers.servers * servers.threads))

    def to_dict(self) -> dict[str, Any]:
        """As JSON, but for the cluster."""
        values = {name: value for name, value in vars(self).items() if name != "cluster"}
        return values | {"pool": vars(self.pool), "servers": {k: vars(s) for k, s in self.servers.items()}}


def lay_out(config: Config, sizes: Sizes, cluster: PlannedCluster) -> Layout:
    """Actors, workers, servers and engines of a run on this cluster.

    Raises:
        UserError: something does not fit, as the stage itself would say.
    """
    nodes, r = cluster.nodes, config.retrieve
    configured_precision(config.embed.precision, "cuda" if share_of_gpu(config.embed.gpus_per_actor, nodes) else "cpu")
    shards = plan_shards(sizes.passages, config.embed.passages_per_shard)
    queries = sum(len(plan_shards(n, config.embed.passages_per_shard)) for n in sizes.queries.values())
    engine, evaluate_engine, votes = engines(config, sizes)

    def servers(engine: str) -> Placement:
        placed = plan_servers(
            SearchSettings(engine, r.cells, r.nprobe, r.candidates),
            r.actors,
            shards=len(shards),
            tokens=int(sizes.vectors),
            passages=sizes.passages,
            dim=config.model.dim,
            resources={"CPU": cluster.cpus, "GPU": cluster.gpus, "memory": _RAY_SHARE * cluster.memory},
            node_memory=_RAY_SHARE * cluster.largest_gib * GIB,
        )
        return replace(placed, threads=min(placed.threads, max(1, int(max(node.cpus for node in nodes)))))

    resources = [{"CPU": node.cpus, "GPU": node.gpus} for node in nodes]
    return Layout(
        stages=tuple(stage.name for stage in needed(config, "evaluate")),
        cluster=cluster,
        pool=plan_pool(config.embed.actors, config.embed.gpus_per_actor, limit=len(shards) + queries, nodes=nodes),
        shard_passages=shards[0][1] - shards[0][0],
        engine=engine,
        evaluate_engine=evaluate_engine,
        votes=votes,
        # Exact search stands in every layout: the calibration measures it.
        servers={name: servers(name) for name in {engine, evaluate_engine, votes, "exact"} - {"feedback", "estimate"}},
        workers={
            key: place_workers(section.workers, section.batch_size, key, resources).most
            for key, section in (("teacher", config.teacher), ("distill", config.distill))
            if key == "distill" or config.teacher.checkpoint is None
        },
        remote="://" in config.run.storage,
    )


def engines(config: Config, sizes: Sizes) -> tuple[str, str, str]:
    """Engines of the searches for training and for evaluation, and who votes, as the stages choose them."""
    rows, dim, vectors = config.model.query_maxlen, config.model.dim, int(sizes.vectors)

    def search(queries: int) -> str:
        if config.retrieve.engine != "auto":
            return config.retrieve.engine
        return choose_engine(queries, rows, vectors, dim, config.embed.codec)

    train = sizes.queries.get("train", 0)
    store: Any = SimpleNamespace(num_tokens=vectors, dim=dim)
    evaluate = search(sizes.evaluated(config)) if config.evaluate.engine == "retrieve" else "exact"
    return search(train), evaluate, vote_way(config, store, train)
