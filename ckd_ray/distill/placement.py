"""The number of training workers, and whether they fit the cluster.

Ray waits silently for a placement that does not fit, so such a placement is refused before the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from ckd_ray.errors import UserError
from ckd_ray.progress import say
from ckd_ray.ray_util.machines import alive

CPUS_PER_WORKER = 1


@dataclass(frozen=True)
class Placement:
    """The least and largest number of workers (equal unless training is elastic), and the resources of each.

    Attributes:
        use_gpu: whether each worker takes a GPU, or the share `gpus` of one.
    """

    fewest: int
    most: int
    use_gpu: bool
    gpus: float = 1.0
    cpus: float = CPUS_PER_WORKER

    @property
    def num_workers(self) -> int | tuple[int, int]:
        """The argument of Ray's ScalingConfig."""
        return self.fewest if self.fewest == self.most else (self.fewest, self.most)

    @property
    def resources(self) -> dict[str, float]:
        """The resources of one worker."""
        return {"CPU": self.cpus, "GPU": self.gpus} if self.use_gpu else {"CPU": self.cpus}


def parse_workers(workers: int | str) -> tuple[int, int] | None:
    """(fewest, most) of a number or of `2-8`; None for `auto`."""
    if workers == "auto":
        return None
    fewest, dash, most = str(workers).partition("-")
    return int(fewest), int(most if dash else fewest)


def plan_workers(workers: int | str, batch_size: int, key: str) -> Placement:
    """`place_workers` on the connected cluster.

    Raises:
        UserError: they do not fit the cluster, or the batch is smaller than their number.
    """
    placement = place_workers(workers, batch_size, key, [node["Resources"] for node in alive()])
    free = ray.available_resources()  # other jobs may hold what the workers need
    for name, each in placement.resources.items():
        needed, left = each * placement.fewest, free.get(name, 0)
        if left < needed:
            say(
                f"{key}: {placement.fewest} workers need {needed:g} {name}, of which {left:g} are free;"
                " training starts when enough are free"
            )
    return placement


def place_workers(workers: int | str, batch_size: int, key: str, nodes: Sequence[Mapping[str, Any]]) -> Placement:
    """The placement of `workers`: a number, `2-8` (elastic), or `auto`: one a GPU, else one.

    Args:
        nodes: the resources of each, such as {"CPU": 8, "GPU": 1}.

    Raises:
        UserError: they do not fit the cluster, or the batch is smaller than their number.
    """
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cpus_of = [int(node.get("CPU", 0) // CPUS_PER_WORKER) for node in nodes]
    gpus_of = [int(node.get("GPU", 0)) for node in nodes]
    room = sum(map(min, cpus_of, gpus_of) if gpus else cpus_of)
    chosen = parse_workers(workers)
    fewest, most = chosen if chosen is not None else (max(1, min(gpus, room, batch_size)),) * 2
    placement = Placement(fewest, most, gpus > 0)
    if fewest > room:
        cpus = int(sum(node.get("CPU", 0) for node in nodes))
        each = " and ".join(f"{count:g} {name}" for name, count in placement.resources.items())
        raise UserError(
            "the training workers do not fit the cluster",
            where=f"{key}.workers",
            expected=f"at most {room}, each with {each} on one node",
            found=f"{fewest}; the cluster has {cpus} CPU and {gpus} GPU (nodes: {len(nodes)})",
            fix=f"set {key}.workers: auto, or add nodes",
        )
    if most > batch_size:
        raise UserError(
            "more workers than queries in a batch",
            where=f"{key}.batch_size",
            expected=f">= {most}",
            found=str(batch_size),
        )
    return placement
