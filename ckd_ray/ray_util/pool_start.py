"""Ends a stream of Ray Data none of whose actors starts.

Ray Data itself waits for all actors of a pool (`wait_for_min_actors_s`), so one whose machine has left meanwhile would
hold up the others. Without that, work begins with the first, and where none starts it waits for ever.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

# From the request for the actors until one has loaded its model.
WITHIN_S = 900.0


class StartsInTime(ExecutionCallback):
    """Raises GetTimeoutError in the loop of the execution, and so in the iterator over its rows."""

    def __init__(self) -> None:
        self._until: float | None = time.monotonic() + WITHIN_S

    def on_execution_step(self, executor: Any) -> None:
        """Look whether an actor has started, until one has. Where tasks do the work there are none."""
        if self._until is None:
            return
        pools = [pool for operator in executor._topology for pool in operator.get_autoscaling_actor_pools()]
        if not pools or any(pool.num_running_actors() for pool in pools):
            self._until = None
        elif time.monotonic() > self._until:
            raise ray.exceptions.GetTimeoutError(f"no actor has started within {WITHIN_S:.0f} s")
