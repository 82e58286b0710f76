"""How many actors of which size fit the cluster. What does not fit is refused at once, and does not hang."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ckd_ray.errors import UserError
from ckd_ray.progress import say
from ckd_ray.ray_util.gpus import share_of_gpu
from ckd_ray.ray_util.machines import alive

# Every CPU actor leaves this share of its core to the tasks that feed it (see `Pool.feeder_cpus`).
_FEEDER_SHARE = 0.1
# A core tokenises some thousand passages a second: enough for dozens of encoders on CPUs, while a GPU needs several.
_CPU_ACTORS_A_FEEDER = 16
_FEEDERS_A_GPU = 8
# Actors that have just ended give their CPUs back within a second or two; other jobs' take longer.
_WAIT_S = 60.0
_WAIT_FOR_ALL_S = 5.0


@dataclass(frozen=True)
class Node:
    """CPUs and GPUs of one machine. An actor never spans two."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Pool:
    """A placed pool: `actors` of `cpus_per_actor` and `gpus_per_actor`, fed by `feeders` small tasks.

    Attributes:
        most: where GPUs come later, the pool grows up to so many actors.
    """

    actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    threads: int
    feeders: int
    feeder_cpus: float
    most: int = 0

    def __str__(self) -> str:
        actors = "1 actor" if self.actors == 1 else f"{self.actors} actors"
        return f"{actors} of {_needs(self.cpus_per_actor, self.gpus_per_actor)}"


def plan_pool(
    actors: int | Literal["auto"],
    gpus_per_actor: float | Literal["auto"],
    *,
    limit: int,
    nodes: Sequence[Node],
    key: str = "embed",
) -> Pool:
    """Choose a pool of at most `limit` actors for these machines.

    With GPUs: one actor a GPU (or as many as `gpus_per_actor` allows), each with a CPU, or with a share of one where
    GPUs outnumber CPUs. Without: one single-threaded actor a core, which beats fewer actors with more threads on small
    encoders.

    Raises:
        UserError: the asked number of actors cannot be placed, or `gpus_per_actor` is above 1.
    """
    gpus_per_actor = share_of_gpu(gpus_per_actor, nodes)
    if gpus_per_actor > 1:
        raise UserError(
            "the model of an actor runs on one GPU",
            where=f"{key}.gpus_per_actor",
            expected="1, a share of it, or 0",
            found=f"{gpus_per_actor:g}",
        )
    cpus_per_actor = 1.0 - _FEEDER_SHARE
    if gpus_per_actor > 0:
        by_gpu = [(_gpu_room(node.gpus, gpus_per_actor), node.cpus) for node in nodes]
        shares = [cpus / fit - _FEEDER_SHARE for fit, cpus in by_gpu if fit and cpus >= 1]
        cpus_per_actor = round(max(_FEEDER_SHARE, min([1.0, *shares])), 2)
        room = sum(min(fit, int(cpus / cpus_per_actor + 1e-9)) for fit, cpus in by_gpu)
    else:
        room = sum(_cpu_room(node.cpus, cpus_per_actor) for node in nodes)
    wanted = room if actors == "auto" else actors
    if room < 1 or wanted > room:
        raise UserError(
            "the pool of actors does not fit the cluster",
            where=f"{key}.actors",
            expected=f"at most {room} actors of {_needs(cpus_per_actor, gpus_per_actor)}, each within one node",
            found=f"{actors} asked for; {describe(nodes)}",
            fix=f"set {key}.actors: auto, or add nodes" if room else f"add nodes, or lower {key}.gpus_per_actor",
        )
    chosen = max(1, min(wanted, limit))
    spare = sum(node.cpus for node in nodes) - chosen * cpus_per_actor
    if gpus_per_actor > 0:
        share = 1.0 if spare >= 1 else _FEEDER_SHARE
        feeders = max(1, min(int(spare / share + 1e-9), _FEEDERS_A_GPU * chosen))
        most = limit if actors == "auto" else chosen
        return Pool(chosen, cpus_per_actor, gpus_per_actor, 1, feeders, share, most)
    # With fewer shards than cores, on one machine, the cores left over help the actors.
    threads = max(1, room // chosen) if actors == "auto" and len(nodes) == 1 else 1
    return Pool(chosen, cpus_per_actor, 0.0, threads, -(-chosen // _CPU_ACTORS_A_FEEDER), _FEEDER_SHARE)


def place_pool(
    actors: int | Literal["auto"],
    gpus_per_actor: float | Literal["auto"],
    *,
    limit: int,
    key: str = "embed",
    patience: float = _WAIT_S,
) -> Pool:
    """`plan_pool` for the connected cluster: its totals first, then what other jobs leave free.

    It waits for a while, as other jobs may end. After that `auto` takes what is free, and a number that does not fit is
    refused.

    Raises:
        UserError: as `plan_pool`, about the whole cluster or about its free part.
    """
    total, _ = cluster_nodes()
    wanted = plan_pool(actors, gpus_per_actor, limit=limit, nodes=total, key=key)
    started = time.monotonic()
    told = False
    while True:
        _, free = cluster_nodes()
        waited = time.monotonic() - started
        try:
            pool = plan_pool(actors, wanted.gpus_per_actor, limit=limit, nodes=free, key=key)
        except UserError as error:
            if waited >= patience:
                raise UserError(
                    "other jobs hold what the pool of actors needs",
                    where=error.where,
                    expected=error.expected,
                    found=f"{error.found}, of {describe(total)}, after {waited:.0f} s",
                    fix=f"wait for the other jobs, or lower {key}.actors",
                ) from None
        else:
            if pool.actors >= wanted.actors:
                # Sized by the whole cluster: small loads elsewhere for a moment do not make the actors smaller.
                return wanted
            if waited >= min(patience, _WAIT_FOR_ALL_S):
                say(f"{key}: {pool}; the cluster has room for {wanted.actors}, other jobs hold the rest")
                return pool
        if not told and waited > 2:
            told = True
            say(f"{key}: waiting for {wanted}; free now: {describe(free)}")
        # The actors of a pool that failed in this process live as long as a handle to them. Such handles lie in cycles
        # of tracebacks, and a process that only waits collects no garbage.
        gc.collect()
        time.sleep(0.2)


def cluster_nodes() -> tuple[list[Node], list[Node]]:
    """(all, free): CPUs and GPUs of the connected cluster's nodes that are alive."""
    from ray._private.state import available_resources_per_node

    now: dict[str, Any] = available_resources_per_node()
    nodes = alive()
    total = [Node(n["Resources"].get("CPU", 0.0), n["Resources"].get("GPU", 0.0)) for n in nodes]
    left = [now.get(node["NodeID"], {}) for node in nodes]
    return total, [Node(n.get("CPU", 0.0), n.get("GPU", 0.0)) for n in left]


def describe(nodes: Sequence[Node]) -> str:
    """`4 nodes with 32 CPU and 16 GPU (at most 8 CPU and 4 GPU on one)`."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    text = f"{len(nodes)} node{'' if len(nodes) == 1 else 's'} with {cpus:g} CPU and {gpus:g} GPU"
    if len(nodes) > 1:
        text += f" (at most {max(n.cpus for n in nodes):g} CPU and {max(n.gpus for n in nodes):g} GPU on one)"
    return text


def _cpu_room(cpus: float, each: float) -> int:
    """Actors on the CPUs of a node, one per core, with the share of a feeder left over."""
    return max(0, min(math.ceil(cpus), int((cpus - _FEEDER_SHARE) / each + 1e-9)))


def _gpu_room(gpus: float, each: float) -> int:
    """Actors on the GPUs of a node; an actor with a share of a GPU uses a single one."""
    if each < 1:
        return int(gpus + 1e-9) * int(1 / each + 1e-9)
    return int(gpus / each + 1e-9)


def _needs(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPU and {gpus:g} GPU"
