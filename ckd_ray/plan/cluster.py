"""The machines of a plan: this one, or those that a cluster file describes.

Read are Ray cluster launcher files (`available_node_types`; AWS and GCP name their instances, `local` its hosts), a
KubeRay RayCluster, and a short form of our own: `nodes: [{count: 8, cpus: 16, gpus: 1, accelerator: A10G, memory_gib:
64, usd_per_hour: 1.2}]`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ckd_ray.errors import UserError
from ckd_ray.jobs.prices import hourly
from ckd_ray.plan.hardware import ACCELERATORS, ATTACHED, INSTANCES
from ckd_ray.ray_util.actor_pool import Node

_GIB = 2**30


@dataclass(frozen=True)
class Machines:
    """`count` machines of one kind.

    Attributes:
        cpus, gpus: what Ray is given of each (a head that should not compute has 0 of both).
        usd: an hour and machine; None when it is not known.
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
        return sum(m.memory_gib * m.count for m in self.groups if m.cpus or m.gpus) * _GIB

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
    def usd(self) -> float | None:
        """All machines an hour; None as soon as one price is not known."""
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


def this_machine() -> PlannedCluster:
    """The machine that plans; it costs nothing that we know of."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind = accelerator_of(torch.cuda.get_device_name(0)) if gpus else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    return PlannedCluster((Machines("this machine", 1, os.cpu_count() or 1, memory, gpus, kind),), "this machine")


def accelerator_of(name: str) -> str | None:
    """`NVIDIA A100-SXM4-80GB` to `A100-80GB`; the name itself where it is none that we know."""
    flat = name.upper().replace(" ", "-")
    found = [kind for kind in ACCELERATORS if all(part in flat.split("-") for part in kind.upper().split("-"))]
    return max(found, key=len) if found else name


def read_cluster(path: str, prices: Mapping[str, float] | None = None) -> PlannedCluster:
    """The machines that a file describes, as many as it may start (`max_workers`).

    Args:
        prices: USD an hour by instance type, before those of our table.

    Raises:
        UserError: not such a file, or an instance type that is not known and whose resources are not given.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        trees = [tree for tree in yaml.safe_load_all(text) if tree is not None]
    except OSError as error:
        raise UserError("the cluster file cannot be read", where=path, found=error.strerror) from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError("not valid YAML", where=path, found=" ".join(str(error).split())[:200]) from None
    # A file for Kubernetes may hold other objects beside the cluster.
    clusters = [tree for tree in trees if isinstance(tree, dict) and tree.get("kind") == "RayCluster"]
    tree = clusters[0] if clusters else trees[0] if trees else None
    if not isinstance(tree, dict):
        raise UserError("not a cluster file", where=path, expected="a mapping", found=type(tree).__name__)
    given = dict(prices or {})
    if "nodes" in tree:
        groups = [_plain(path, i, item, given) for i, item in enumerate(tree["nodes"] or [])]
    elif "available_node_types" in tree:
        groups = _launcher(path, tree, given)
    elif tree.get("kind") == "RayCluster":
        groups = _kuberay(path, tree)
    elif (tree.get("provider") or {}).get("type") == "local":
        groups = _hosts(path, tree)
    else:
        raise UserError(
            "no machines in this cluster file",
            where=path,
            expected="available_node_types (Ray cluster launcher), kind: RayCluster, or nodes: [...]",
            found=", ".join(list(tree)[:8]) or "nothing",
        )
    cluster = PlannedCluster(tuple(groups), path)
    if cluster.cpus <= 0:
        raise UserError("the cluster has no CPUs", where=path, expected="machines with CPUs for Ray")
    return cluster


def _plain(path: str, number: int, item: Any, given: dict[str, float]) -> Machines:
    where = f"{path}: nodes[{number}]"
    known = {"count", "cpus", "gpus", "accelerator", "memory_gib", "network_gbit", "usd_per_hour", "spot", "type"}
    if not isinstance(item, dict) or not set(item) <= known:
        wrong = ", ".join(sorted(set(item) - known)) if isinstance(item, dict) else type(item).__name__
        raise UserError("not a machine", where=where, expected=", ".join(sorted(known)), found=wrong)
    kind, spot = item.get("type"), bool(item.get("spot", False))
    if kind is not None:
        machines = _of_type(where, str(kind), spot, {}, given)
    elif "cpus" in item:
        machines = Machines(f"nodes[{number}]", 1, 0, 4.0 * float(item["cpus"]))
    else:
        raise UserError("a machine without cpus", where=where, expected="cpus, or type", found=str(item)[:80])
    values: dict[str, Any] = {
        "count": int(item.get("count", 1)),
        "cpus": float(item.get("cpus", machines.cpus)),
        "gpus": float(item.get("gpus", machines.gpus)),
        "accelerator": item.get("accelerator", machines.accelerator),
        "memory_gib": float(item.get("memory_gib", machines.memory_gib)),
        "network_gbit": float(item.get("network_gbit", machines.network_gbit)),
        "usd": item.get("usd_per_hour", machines.usd),
        "spot": spot,
    }
    return Machines(machines.name, **values)


def _launcher(path: str, tree: dict[str, Any], given: dict[str, float]) -> list[Machines]:
    head, kinds = tree.get("head_node_type"), tree["available_node_types"]
    if not isinstance(kinds, dict) or head not in kinds:
        raise UserError(
            "head_node_type is none of available_node_types", where=path, found=str(head), expected=", ".join(kinds)
        )
    groups = []
    for name, kind in kinds.items():
        where = f"{path}: available_node_types.{name}"
        kind = kind or {}
        config = kind.get("node_config") or {}
        instance = config.get("InstanceType") or config.get("machineType")
        workers = int(kind.get("max_workers", tree.get("max_workers", 2)))
        count = 1 if name == head else min(workers, int(tree.get("max_workers", workers)))
        resources = kind.get("resources") or {}
        if instance is None:
            machines = _from_resources(where, name, resources)
        else:
            attached = {
                str(item["acceleratorType"]).rpartition("/")[2]: int(item["acceleratorCount"])
                for item in config.get("guestAccelerators") or []
            }
            kind_name = str(instance).rpartition("/")[2]
            machines = _of_type(where, kind_name, _is_spot(config), resources, given, attached)
        groups.append(Machines(**{**vars(machines), "count": count}))
    return groups


def _is_spot(config: Mapping[str, Any]) -> bool:
    """AWS: InstanceMarketOptions; GCP: scheduling, a mapping or a list of one."""
    scheduling = config.get("scheduling") or []
    rows = [scheduling] if isinstance(scheduling, dict) else scheduling
    return (config.get("InstanceMarketOptions") or {}).get("MarketType") == "spot" or any(
        row.get("preemptible") is True or row.get("provisioningModel") == "SPOT" for row in rows
    )


def _of_type(
    where: str,
    kind: str,
    spot: bool,
    resources: Mapping[str, Any],
    given: Mapping[str, float],
    attached: dict[str, int] | None = None,
) -> Machines:
    """One machine of an instance type; `resources` say what Ray is given of it."""
    usd = given[kind] if kind in given else hourly(kind, spot=spot, accelerators=attached)
    known = INSTANCES.get(kind)
    if known is None:
        if "CPU" not in resources:
            near = difflib.get_close_matches(kind, INSTANCES, 3, 0.5)
            raise UserError(
                "an instance type that is not known here",
                where=where,
                expected="resources: {CPU: ..., GPU: ...} beside it, or one of the table"
                + (f" (such as {', '.join(near)})" if near else ""),
                found=kind,
                fix="give its resources in the file and its price by --price TYPE=USD",
            )
        machines = _from_resources(where, kind, resources)
        return Machines(**{**vars(machines), "usd": usd, "spot": spot})
    guest = next(iter(attached or {}), "")
    return Machines(
        kind,
        1,
        float(resources.get("CPU", known.cpus)),
        known.memory_gib,
        float(resources.get("GPU", known.gpus + sum((attached or {}).values()))),
        known.accelerator or ATTACHED.get(guest, guest or None),
        known.network_gbit,
        usd,
        spot,
    )


def _from_resources(where: str, name: str, resources: Mapping[str, Any]) -> Machines:
    if "CPU" not in resources:
        raise UserError("resources are not given", where=where, expected="resources: {CPU: ..., GPU: ...}", found="")
    cpus, gpus = float(resources["CPU"]), float(resources.get("GPU", 0))
    memory = float(resources["memory"]) / _GIB if "memory" in resources else 4.0 * max(1.0, cpus)
    kinds = [key.removeprefix("accelerator_type:") for key in resources if key.startswith("accelerator_type:")]
    return Machines(name, 1, cpus, memory, gpus, kinds[0] if kinds else None)


def _hosts(path: str, tree: dict[str, Any]) -> list[Machines]:
    """Own machines over SSH: the file names hosts, not what they are; they are taken for machines like this one."""
    hosts = [tree["provider"].get("head_ip"), *(tree["provider"].get("worker_ips") or [])]
    here = this_machine().groups[0]
    count = len([host for host in hosts if host])
    return [Machines(**{**vars(here), "name": "hosts like this machine", "count": max(1, count)})]


def _kuberay(path: str, tree: dict[str, Any]) -> list[Machines]:
    spec = tree.get("spec") or {}
    wanted: Sequence[tuple[str, int, Any]] = [
        ("head", 1, spec.get("headGroupSpec")),
        *(
            (str(group.get("groupName", i)), int(group.get("maxReplicas", group.get("replicas", 1))), group)
            for i, group in enumerate(spec.get("workerGroupSpecs") or [])
        ),
    ]
    groups = []
    for name, count, group in wanted:
        where = f"{path}: {name}"
        pod = (((group or {}).get("template") or {}).get("spec") or {}).get("containers") or [{}]
        resources = pod[0].get("resources") or {}
        asked = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
        if "cpu" not in asked:
            raise UserError("the Ray container asks for no CPU", where=where, expected="resources.limits.cpu")
        start = (group or {}).get("rayStartParams") or {}
        cpus = float(start.get("num-cpus", _quantity(str(asked["cpu"]))))
        memory = _quantity(str(asked.get("memory", "0"))) / _GIB or 4.0 * cpus
        selector = (((group or {}).get("template") or {}).get("spec") or {}).get("nodeSelector") or {}
        kind = next((accelerator_of(str(v)) for k, v in selector.items() if "accelerator" in k or "gpu" in k), None)
        gpus = float(asked.get("nvidia.com/gpu", 0))
        groups.append(Machines(name, count, cpus, memory, gpus, kind if gpus else None))
    return groups


_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "m": 1e-3}


def _quantity(text: str) -> float:
    """Kubernetes' `500m`, `16Gi`, `8`."""
    for unit, factor in _UNITS.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)
