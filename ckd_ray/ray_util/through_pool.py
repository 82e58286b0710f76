"""Ray Data streams units of work through tasks that prepare them to a pool of processes that hold a model.

A unit (a shard of texts, a part of queries) is one row and one batch, so a dead process loses the unit that it works on
and the one that waits. Only rows of figures come back. Work begins with the first actor that has started. A pool in
which no actor starts, and a stream that stops, end in an error that says what the cluster has.

The processes are actors. For a few units on CPUs they are tasks that keep their model between units: Ray gives the
processes of finished tasks to the next stage, while an actor is a new process, which imports PyTorch and transformers
for five seconds.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray

from ckd_ray.errors import JobError
from ckd_ray.ray_util.actor_pool import Pool, cluster_nodes, describe
from ckd_ray.ray_util.again import same_command
from ckd_ray.ray_util.frames import let_go
from ckd_ray.ray_util.parts import MOST_BLOCKS
from ckd_ray.ray_util.waiting import WORK_S

# Up to this many units a process, tasks do the work. With more, the start of an actor takes a small part of the time.
_FEW_UNITS = 8


def through_pool(
    work: list[dict[str, int]],
    pool: Pool,
    *,
    prepare: Callable[..., Any],
    prepare_arguments: dict[str, Any],
    actor: type,
    actor_arguments: dict[str, Any],
    smaller: str,
) -> Iterator[dict[str, Any]]:
    """The rows that the actors return, one per unit, as they are finished.

    Args:
        work: the units, which are small.
        prepare: takes a unit as a numpy batch of one row and `prepare_arguments`, and returns a table of one row.
        actor: its instances take such a table and return a table of figures.
        smaller: how to make a unit smaller, for the message when one takes longer than the limit.

    Raises:
        JobError: no actor started in time, or no unit was finished for hours.
    """
    from ckd_ray.ray_util import pool_start  # imports Ray Data

    dataset: Any = ray.data.from_items(work, override_num_blocks=min(len(work), MOST_BLOCKS))
    dataset = dataset.map_batches(
        prepare,
        fn_kwargs=prepare_arguments,
        batch_size=1,
        batch_format="numpy",
        num_cpus=pool.feeder_cpus,
        compute=ray.data.TaskPoolStrategy(size=pool.feeders),
    )
    each: dict[str, Any] = {"batch_size": 1, "batch_format": "pyarrow", "num_cpus": pool.cpus_per_actor}
    if not pool.gpus_per_actor and len(work) <= _FEW_UNITS * pool.actors:
        dataset = dataset.map_batches(
            _in_task,
            fn_kwargs={"stage": uuid.uuid4().hex, "actor": actor, "arguments": actor_arguments},
            compute=ray.data.TaskPoolStrategy(size=pool.actors),
            max_retries=-1,  # as an actor, which is started again however often it dies
            **each,
        )
    else:
        dataset = dataset.map_batches(
            actor,
            fn_constructor_kwargs=actor_arguments,
            num_gpus=pool.gpus_per_actor or None,
            # All actors start at once; after the loss of a node the pool is smaller for a while.
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=max(pool.actors, pool.most),
                initial_size=pool.actors,
                max_tasks_in_flight_per_actor=2,
            ),
            **each,
        )
    # Keep an actor that waits for its first unit.
    dataset.context.autoscaling_config.actor_pool_util_downscaling_threshold = -1.0
    dataset.context.wait_for_min_actors_s = -1
    callbacks = dataset.context.custom_execution_callback_classes
    dataset.context.custom_execution_callback_classes = [*callbacks, pool_start.StartsInTime]
    dataset.context.execution_no_progress_timeout_s = WORK_S
    try:
        yield from _rows(dataset)
    except ray.exceptions.GetTimeoutError as error:
        total, free = cluster_nodes()
        raise JobError(
            f"of {pool} none has started within {pool_start.WITHIN_S:g} s; the cluster: {describe(total)}; "
            f"free now: {describe(free)}; give {same_command()} again: it takes what there is"
        ) from error
    except ray.data.exceptions.ExecutionTimeoutError as error:
        hours = WORK_S / 3600
        raise JobError(
            f"nothing was finished for {hours:g} hours by {pool}; the cluster: {describe(cluster_nodes()[0])}. "
            f"{smaller}"
        ) from error


# In a process of tasks: the instance of the stage at work, and the threads that it asks for.
_kept: dict[str, tuple[Any, int]] = {}


def _in_task(table: Any, stage: str, actor: type, arguments: dict[str, Any]) -> Any:
    """One unit, by the actor's class in a task; its instance stays for the next unit of this stage."""
    import torch

    before = torch.get_num_threads()
    try:
        if stage not in _kept:
            _kept.clear()
            _kept[stage] = actor(**arguments), torch.get_num_threads()
        worker, threads = _kept[stage]
        torch.set_num_threads(threads)
        return worker(table)
    finally:
        torch.set_num_threads(before)  # other tasks run in this process later


def _rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """The rows of a data set. An error that ends it does not keep the actors alive.

    Ray Data ends its actors by dropping their handles. The frames of an error's traceback hold such handles, and so the
    CPUs and GPUs, as long as the error exists.
    """
    try:
        yield from dataset.iter_rows()
    except BaseException as error:
        let_go(error, forget=True)
        raise
