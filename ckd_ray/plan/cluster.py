"""The machines of a plan, and what they cost: this machine, or those of a cluster file (`cluster_file.py`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckd_ray.jobs.prices import hourly
from ckd_ray.plan.hardware import ACCELERATORS, accelerator_of
from ckd_ray.ray_util.actor_pool import Node

GIB = 2**30


@dataclass(frozen=True)
class Machines:
    """`count` machines of one kind.

    Attributes:
        cpus, gpus: what Ray is given of each (a head that should not compute has 0 of both).
        usd: of a machine an hour; None when the user gave no price.
        node_type: its name in the cluster file, where `name` is its machine type.
        attached: GPUs that are attached to it and paid for apart, by their type.
    """

    name: str
    count: int
    cpus: float
    memory_gib: float
    gpus: float = 0.0
    accelerator: str | None = None
    network_gbit: float = 10.0
    usd: float | None = None
    spot: bool = False
    node_type: str | None = None
    attached: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Prices:
    """What the user pays.

    Attributes:
        given: USD an hour of a node by its machine type, or by its name in the cluster file (`--price`).
        file: a file of prices (`--prices`); that of CKD_RAY_PRICES when None.
    """

    given: Mapping[str, float] = field(default_factory=dict)
    file: str | None = None

    def priced(self, machines: Machines) -> Machines:
        """The machines with their price, unless their own cluster file gives it."""
        m = machines
        given = [self.given[name] for name in (m.node_type, m.name) if name and name in self.given]
        listed = hourly(m.name, spot=m.spot, accelerators=dict(m.attached), file=self.file)
        usd = next((price for price in (*given, m.usd, listed) if price is not None), None)
        return replace(m, usd=usd)


@dataclass(frozen=True)
class PlannedCluster:
    """All machines; the head among them."""

    groups: tuple[Machines, ...]
    source: str

    @property
    def nodes(self) -> list[Node]:
        """As `plan_pool` takes them: those that compute."""
        found = [Node(float(m.cpus), float(m.gpus)) for m in self.groups for _ in range(m.count)]
        return [node for node in found if node.cpus > 0 or node.gpus > 0]

    @property
    def cpus(self) -> float:
        """Of all machines."""
        return sum(m.cpus * m.count for m in self.groups)

    @property
    def gpus(self) -> float:
        """Of all machines."""
        return sum(m.gpus * m.count for m in self.groups)

    @property
    def memory(self) -> float:
        """Bytes of the machines that compute; Ray hands out about 0.7 of them."""
        return sum(m.memory_gib * m.count for m in self.groups if m.cpus or m.gpus) * GIB

    @property
    def smallest_gib(self) -> float:
        """Memory of the smallest machine that computes."""
        return min(m.memory_gib for m in self.groups if m.cpus or m.gpus)

    @property
    def largest_gib(self) -> float:
        """Memory of the largest machine that computes."""
        return max(m.memory_gib for m in self.groups if m.cpus or m.gpus)

    @property
    def accelerator(self) -> str | None:
        """The kind of GPU; of several the slowest, which the others wait for."""
        kinds = {m.accelerator for m in self.groups if m.gpus and m.accelerator}
        known = sorted(kinds & ACCELERATORS.keys(), key=lambda kind: ACCELERATORS[kind].teraflops)
        return known[0] if known else next(iter(sorted(kinds)), None)

    @property
    def network_gbit(self) -> float:
        """Of the machine with the least, among those that compute."""
        return min((m.network_gbit for m in self.groups if m.cpus or m.gpus), default=10.0)

    @property
    def count(self) -> int:
        """Of all machines, the head among them."""
        return sum(m.count for m in self.groups)

    @property
    def usd(self) -> float | None:
        """All machines an hour; None when the price of one is unknown."""
        prices = [m.usd for m in self.groups if m.count]
        return None if any(p is None for p in prices) else sum((m.usd or 0.0) * m.count for m in self.groups)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "source": self.source,
            "machines": [vars(m) for m in self.groups],
            "cpus": self.cpus,
            "gpus": self.gpus,
            "usd_per_hour": self.usd,
        }


def this_machine(prices: Prices | None = None) -> PlannedCluster:
    """The machine that plans."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = accelerator_of(torch.cuda.get_device_name(0)) if gpus else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    name = "this machine"
    machines = Machines(name, 1, os.cpu_count() or 1, memory, gpus, kind)
    return PlannedCluster(((prices or Prices()).priced(machines),), name)
