"""The kinds of GPU in the connected cluster, told by processes that hold one: the driver may have none, or another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ckd_ray.errors import JobError
from ckd_ray.progress import say
from ckd_ray.ray_util.processes import actor_device

# In this time other jobs give a GPU back, or the autoscaler starts a machine.
_PATIENCE_S, _TOLD_AFTER_S = 900.0, 15.0

Kinds = dict[str, tuple[int, int]]


def share_of_gpu(gpus_per_actor: float | Literal["auto"], nodes: Sequence[Any]) -> float:
    """What an actor gets of a GPU: with `auto` a whole one where a node has any, see `plan_pool`."""
    if gpus_per_actor != "auto":
        return float(gpus_per_actor)
    return 1.0 if any(node.gpus >= 1 for node in nodes) else 0.0


def kinds_of_gpus(share: float, patience: float = _PATIENCE_S) -> Kinds:
    """Compute capability of each kind of GPU, by name. One process asks on a node of each kind.

    Args:
        share: what each of these processes reserves of its GPU.

    Raises:
        UserError: PyTorch cannot use a GPU that Ray has. JobError: other jobs hold them all.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # A task of its own process, whose CUDA context ends with it.
    task = ray.remote(num_cpus=0, num_gpus=share, max_calls=1)(_kind)
    nodes = _a_node_of_each_kind(ray.nodes())
    asked = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes
    ]
    try:
        if len(ray.wait(asked, num_returns=len(asked), timeout=min(patience, _TOLD_AFTER_S))[0]) < len(asked):
            say("waiting for a free GPU, to ask what it computes")
        return dict(ray.get(asked, timeout=patience))
    except ray.exceptions.GetTimeoutError as error:
        for one in asked:
            ray.cancel(one, force=True)
        raise JobError(
            f"no GPU was free within {patience:.0f} s to ask what it computes; the cluster has"
            f" {ray.cluster_resources().get('GPU', 0):g}, and other jobs hold them. Give the same command again later"
        ) from error
    except ray.exceptions.RayTaskError as error:
        raise getattr(error, "cause", error) from None


def _kind() -> tuple[str, tuple[int, int]]:
    import torch

    actor_device()  # says what is wrong where PyTorch cannot use it
    return torch.cuda.get_device_name(), torch.cuda.get_device_capability()


def _a_node_of_each_kind(nodes: Sequence[dict[str, Any]]) -> list[str]:
    """A node's id for each kind of GPU. Ray notes the kind as a resource, such as `accelerator_type:T4`."""
    found: dict[frozenset[str], str] = {}
    for node in nodes:
        if node["Alive"] and node["Resources"].get("GPU", 0) > 0:
            kind = frozenset(name for name in node["Resources"] if name.startswith("accelerator_type:"))
            found.setdefault(kind, node["NodeID"])
    return list(found.values())
