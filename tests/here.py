"""Trainings and pools of actors in the process of the test, for whole runs whose topic is neither.

They compute what Ray's processes compute. A training by Ray Train starts seven of these, a pool at least one, and each
takes seconds of a core to load its libraries. `tests/finished.py` makes a run with all of them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ckd_ray.cross_encoder import stream as scoring
from ckd_ray.distill import trainer, worker
from ckd_ray.embed import stream as embedding


@contextmanager
def in_this_process() -> Iterator[None]:
    """For the length of the block. Ray must be connected."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_run", _train)
        for module in (embedding, scoring):
            patch.setattr(module, "through_pool", _through_pool)
        yield
    torch.set_num_threads(threads)


def _train(training: Any, task: Any, actor: Any) -> tuple[Any, None]:
    """`fit` of Ray Train with one worker and without an interruption."""
    kept: list[tuple[Any, dict[str, Any]]] = []

    def report(metrics: dict[str, Any], *, checkpoint: Any, checkpoint_dir_name: str, **upload: Any) -> None:
        assert upload["delete_local_checkpoint_after_upload"]
        folder = Path(task.checkpoints) / checkpoint_dir_name
        shutil.move(checkpoint.path, folder)
        kept.append((worker.ray.train.Checkpoint.from_directory(str(folder)), metrics))

    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_world_size=lambda: 1)
    found = {"get_context": lambda: context, "get_checkpoint": lambda: None, "report": report}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "get_device", lambda: torch.device("cpu"))
        for name, function in found.items():
            patch.setattr(worker.ray.train, name, function)
        worker.train_worker(training.train_loop_config)
    return SimpleNamespace(checkpoint=kept[-1][0], best_checkpoints=kept), None


def _through_pool(
    work: list[dict[str, int]],
    pool: Any,
    *,
    prepare: Any,
    prepare_arguments: dict[str, Any],
    actor: type,
    actor_arguments: dict[str, Any],
    smaller: str,
) -> Iterator[dict[str, Any]]:
    call: Any = actor(**actor_arguments)
    for unit in work:
        batch = {name: np.array([value]) for name, value in unit.items()}
        yield from call(prepare(batch, **prepare_arguments)).to_pylist()
