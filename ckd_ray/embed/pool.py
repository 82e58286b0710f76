"""How many actors of what size fit the cluster; refused with numbers before anything starts, never a silent hang."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ckd_ray.errors import UserError

# Every CPU actor leaves this share of its core to the tasks that feed it (see `Pool.feeder_cpus`).
_FEEDER_SHARE = 0.1


@dataclass(frozen=True)
class Pool:
    """A placed pool: `actors` of `cpus_per_actor` and `gpus_per_actor`, fed by `feeders` small tasks."""

    actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    threads: int
    feeders: int
    feeder_cpus: float


def plan_pool(
    actors: int | Literal["auto"],
    gpus_per_actor: float | Literal["auto"],
    *,
    limit: int,
    resources: dict[str, float] | None = None,
    key: str = "embed",
) -> Pool:
    """Choose a pool of at most `limit` actors for the cluster's free or total resources.

    With GPUs: one actor a GPU (or as many as `gpus_per_actor` allows). Without: one single-threaded actor a core, which
    beats fewer actors with more threads on small encoders.

    Args:
        resources: {"CPU": ..., "GPU": ...}; the connected cluster's when None.

    Raises:
        UserError: the asked number of actors cannot be placed.
    """
    if resources is None:
        import ray

        resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    if gpus_per_actor == "auto":
        gpus_per_actor = 1.0 if gpus >= 1 else 0.0
    if gpus_per_actor > 0:
        room, cpus_per_actor, threads = int(gpus / gpus_per_actor + 1e-9), 1.0, 1
        room = min(room, int(cpus / (cpus_per_actor + _FEEDER_SHARE)))
    else:
        room, cpus_per_actor = int(cpus), 1.0 - _FEEDER_SHARE
        threads = 1
    wanted = room if actors == "auto" else actors
    if room < 1 or wanted > room:
        raise UserError(
            "the pool of actors does not fit the cluster",
            where=f"{key}.actors",
            expected=f"at most {room} actors of {cpus_per_actor:g} CPU and {gpus_per_actor:g} GPU",
            found=f"{wanted} actors asked for; the cluster has {cpus:g} CPU and {gpus:g} GPU",
            fix=f"set {key}.actors: auto, or add nodes",
        )
    chosen = max(1, min(wanted, limit))
    if gpus_per_actor == 0 and actors == "auto":
        threads = max(1, int(cpus) // chosen) if chosen < int(cpus) else 1
    return Pool(chosen, cpus_per_actor, gpus_per_actor, threads, max(1, 2 * chosen), _FEEDER_SHARE)
