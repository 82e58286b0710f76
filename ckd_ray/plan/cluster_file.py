"""The machines that a cluster file describes.

A cluster file is one of Ray's cluster launcher (`available_node_types`; AWS and GCP name their instances, `local` its
hosts), a KubeRay RayCluster, or a short form of our own: `nodes: [{count: 8, cpus: 16, gpus: 1, accelerator: A10G,
memory_gib: 64, usd_per_hour: 1.2}]`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import yaml

from ckd_ray.errors import UserError
from ckd_ray.jobs.launcher_file import LauncherFile
from ckd_ray.plan.cluster import GIB, Machines, PlannedCluster, Prices, this_machine
from ckd_ray.plan.hardware import ATTACHED, accelerator_of, instances


def read_cluster(path: str, prices: Prices | None = None) -> PlannedCluster:
    """The machines that a file describes, as many as it may start (`max_workers`).

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
    if "nodes" in tree:
        groups = [_plain(path, i, item) for i, item in enumerate(tree["nodes"] or [])]
    elif "available_node_types" in tree:
        groups = _launcher(path, tree)
    elif tree.get("kind") == "RayCluster":
        groups = _kuberay(path, tree)
    elif (tree.get("provider") or {}).get("type") == "local":
        # The file names hosts over SSH, not what they are: the plan takes them for machines like this one.
        hosts = [tree["provider"].get("head_ip"), *(tree["provider"].get("worker_ips") or [])]
        count = max(1, len([host for host in hosts if host]))
        groups = [replace(this_machine().groups[0], name="hosts like this machine", count=count, usd=None)]
    else:
        raise UserError(
            "no machines in this cluster file",
            where=path,
            expected="available_node_types (Ray cluster launcher), kind: RayCluster, or nodes: [...]",
            found=", ".join(list(tree)[:8]) or "nothing",
        )
    cluster = PlannedCluster(tuple(map((prices or Prices()).priced, groups)), path)
    if cluster.cpus <= 0:
        raise UserError("the cluster has no CPUs", where=path, expected="machines with CPUs for Ray")
    return cluster


_PLAIN = {
    "count": int,
    "cpus": float,
    "gpus": float,
    "accelerator": str,
    "memory_gib": float,
    "network_gbit": float,
    "usd_per_hour": float,
    "spot": bool,
    "type": str,
}


def _plain(path: str, number: int, item: Any) -> Machines:
    where = f"{path}: nodes[{number}]"
    if not isinstance(item, dict) or not set(item) <= set(_PLAIN):
        wrong = ", ".join(sorted(set(item) - set(_PLAIN))) if isinstance(item, dict) else type(item).__name__
        raise UserError("not a machine", where=where, expected=", ".join(sorted(_PLAIN)), found=wrong)
    if "type" in item:
        machines = _of_type(where, str(item["type"]), {})
    elif "cpus" in item:
        machines = Machines(f"nodes[{number}]", 1, 0, 4.0 * float(item["cpus"]))
    else:
        raise UserError("a machine without cpus", where=where, expected="cpus, or type", found=str(item)[:80])
    values: dict[str, Any] = {key: _PLAIN[key](value) for key, value in item.items() if key != "type"}
    usd = values.pop("usd_per_hour", None)
    return replace(machines, usd=usd, **values)


def _launcher(path: str, tree: dict[str, Any]) -> list[Machines]:
    head, kinds = tree.get("head_node_type"), tree["available_node_types"]
    if not isinstance(kinds, dict) or head not in kinds:
        raise UserError(
            "head_node_type is none of available_node_types", where=path, found=str(head), expected=", ".join(kinds)
        )
    kinds = {name: values or {} for name, values in kinds.items()}
    file = LauncherFile(path, {"max_workers": 2, **tree, "available_node_types": kinds})
    groups = []
    for name, values in kinds.items():
        where, kind, resources = f"{path}: available_node_types.{name}", file.node_type(name), values.get("resources")
        # A type that sets no limit of its own may have as many workers as the cluster.
        workers = kind.most if "max_workers" in values else int(file.prepared["max_workers"])
        count = 1 if name == head else workers
        if kind.machine is None:
            groups.append(replace(_from_resources(where, name, resources or {}), count=count))
        else:
            machines = _of_type(where, kind.machine, resources or {}, kind.accelerators)
            groups.append(replace(machines, count=count, spot=kind.spot, node_type=name))
    return groups


def _of_type(
    where: str, kind: str, resources: Mapping[str, Any], attached: Mapping[str, int] | None = None
) -> Machines:
    """One machine of an instance type; `resources` say what Ray is given of it."""
    attached, known = dict(attached or {}), instances().get(kind)
    if known is not None:
        machines, guest = Machines(kind, 1, **vars(known), attached=attached), next(iter(attached), "")
        return replace(
            machines,
            cpus=float(resources.get("CPU", known.cpus)),
            gpus=float(resources.get("GPU", known.gpus + sum(attached.values()))),
            accelerator=known.accelerator or ATTACHED.get(guest, guest or None),
        )
    if "CPU" in resources:
        return replace(_from_resources(where, kind, resources), attached=attached)
    near = difflib.get_close_matches(kind, instances(), 3, 0.5)
    raise UserError(
        "an instance type that is not known here",
        where=where,
        expected="resources: {CPU: ..., GPU: ...} beside it, or one of the table"
        + (f" (such as {', '.join(near)})" if near else ""),
        found=kind,
        fix="give its resources in the file and its price by --price TYPE=USD",
    )


def _from_resources(where: str, name: str, resources: Mapping[str, Any]) -> Machines:
    if "CPU" not in resources:
        raise UserError("resources are not given", where=where, expected="resources: {CPU: ..., GPU: ...}", found="")
    cpus, gpus = float(resources["CPU"]), float(resources.get("GPU", 0))
    memory = float(resources["memory"]) / GIB if "memory" in resources else 4.0 * max(1.0, cpus)
    kinds = [key.removeprefix("accelerator_type:") for key in resources if key.startswith("accelerator_type:")]
    return Machines(name, 1, cpus, memory, gpus, kinds[0] if kinds else None)


def _kuberay(path: str, tree: dict[str, Any]) -> list[Machines]:
    spec = tree.get("spec") or {}
    workers = enumerate(spec.get("workerGroupSpecs") or [])
    wanted = [("head", 1, spec.get("headGroupSpec") or {})] + [
        (str(group.get("groupName", i)), int(group.get("maxReplicas", group.get("replicas", 1))), group)
        for i, group in workers
    ]
    groups = []
    for name, count, group in wanted:
        pod = (group.get("template") or {}).get("spec") or {}
        resources = (pod.get("containers") or [{}])[0].get("resources") or {}
        asked = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
        if "cpu" not in asked:
            where, expected = f"{path}: {name}", "resources.limits.cpu"
            raise UserError("the Ray container asks for no CPU", where=where, expected=expected)
        cpus = float((group.get("rayStartParams") or {}).get("num-cpus", _quantity(str(asked["cpu"]))))
        memory = _quantity(str(asked.get("memory", "0"))) / GIB or 4.0 * cpus
        labels = (pod.get("nodeSelector") or {}).items()
        kind = next((accelerator_of(str(v)) for k, v in labels if "accelerator" in k or "gpu" in k), None)
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
