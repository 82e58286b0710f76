"""The precision of a store or a training: chosen once, and kept when it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
import torch

from ckd_ray.files import exists, join, read_json, write_json_atomic
from ckd_ray.model import ColBERT
from ckd_ray.model.encoder import bf16_failure, choose_precision
from ckd_ray.model.pooled import PooledModel
from ckd_ray.progress import say


def agreed_precision(folder: str, stage: str, choose: Callable[[], tuple[Any, str]]) -> Any:
    """The precision that `folder` has kept, else that of `choose`, which returns it with the reason. What is resumed
    keeps its precision even where a new measurement would differ."""
    path = join(folder, "precision.json")
    if exists(path):
        kept = read_json(path)
        precision, reason = kept["precision"], kept["reason"]
    else:
        precision, reason = choose()
        write_json_atomic(path, {"precision": precision, "reason": reason})
    say(f"{stage}: {precision} ({reason})")
    return precision


def precision_on_cluster(model: ColBERT | PooledModel, requested: str) -> tuple[Any, str]:
    """(precision, reason) for the devices of the cluster; the driver itself may have none of them."""
    device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    if device == "cuda" and requested == "auto" and not torch.cuda.is_available() and not bf16_failure(model):
        return "bf16", "the cluster has GPUs"
    return choose_precision(model, requested, device, threads=1)
