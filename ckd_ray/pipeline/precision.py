"""The precision of a store or a training: chosen once, and kept when it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from ckd_ray.files import exists, join, read_json, write_json_atomic
from ckd_ray.model import ColBERT
from ckd_ray.model.encoder import bf16_failure, choose_precision, configured_precision, precision_of_gpus
from ckd_ray.model.pooled import PooledModel
from ckd_ray.progress import say
from ckd_ray.ray_util.actor_pool import cluster_nodes
from ckd_ray.ray_util.gpus import kinds_of_gpus, share_of_gpu


def agreed_precision(
    folder: str, stage: str, choose: Callable[[], tuple[Any, str]], name: str = "precision.json"
) -> Any:
    """The precision that the file `name` of `folder` has kept, else that of `choose`, which returns it with the reason.
    What is resumed keeps its precision even where a new measurement would differ."""
    path = join(folder, name)
    if exists(path):
        kept = read_json(path)
        precision, reason = kept["precision"], kept["reason"]
    else:
        precision, reason = choose()
        write_json_atomic(path, {"precision": precision, "reason": reason})
    say(f"{stage}: {precision} ({reason})")
    return precision


def precision_on_cluster(
    load: Callable[[], ColBERT | PooledModel] | None, requested: str, gpus: float | Literal["auto"], key: str
) -> tuple[Any, str]:
    """(precision, reason) for the processes that compute.

    Args:
        load: the model, which is asked whether it computes in bfloat16 at all, and measured on a CPU. None: `auto` is
            fp32 on CPUs, and nothing is measured.
        gpus: what each of these processes gets of a GPU; `auto`: one where the cluster has any.
        key: that of the precision in the configuration, for messages.
    """
    share = share_of_gpu(gpus, cluster_nodes()[0])
    given = configured_precision(requested, "cuda" if share else "cpu", key)
    chosen = (given, "as configured") if given else precision_of_gpus(kinds_of_gpus(share)) if share else None
    if load is None:
        return chosen or ("fp32", "on CPUs")
    if chosen is not None and (chosen[0] != "bf16" or (share and bf16_failure(load()) is None)):
        return chosen
    return choose_precision(load(), requested, threads=1)
