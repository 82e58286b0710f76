"""Waits for Ray with a limit. Without one, a task that can never be placed or a process that is stuck stops a command
for ever (tests/unit/test_waits.py finds a wait without a limit)."""

from __future__ import annotations

from typing import Any

from ckd_ray.errors import JobError
from ckd_ray.progress import duration

# An actor looks something up, or starts again after a crash.
LOOK_S = 600.0
# A unit of work: a shard of 16,384 texts takes minutes on a CPU, BM25 of a million passages an hour.
WORK_S = 4 * 3600.0
# An index over the whole store.
INDEX_S = 24 * 3600.0


def answer(what: str, reference: Any, within: float = WORK_S) -> Any:
    """`ray.get` of a reference or a list of them.

    Args:
        what: the thing that is waited for, for the message.
        within: seconds.

    Raises:
        JobError: there is no answer in time.
    """
    import ray

    try:
        return ray.get(reference, timeout=within)
    except ray.exceptions.GetTimeoutError as error:
        raise no_answer(what, within) from error


def no_answer(what: str, within: float) -> JobError:
    """The error for a wait that has come to its limit."""
    from ckd_ray.ray_util.actor_pool import cluster_nodes, describe

    total, free = cluster_nodes()
    return JobError(
        f"{what}: nothing has come within {duration(within)}; the cluster: {describe(total)}; free now:"
        f" {describe(free)}. Where nothing is free, wait for other jobs; then give the same command again, as what was"
        " finished is kept"
    )
