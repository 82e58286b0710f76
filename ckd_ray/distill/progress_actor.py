"""The actor between the workers of a training and its driver: how far training is, why it failed, whether to stop."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Any

import ray

from ckd_ray.distill.metrics import Record
from ckd_ray.ray_util.waiting import LOOK_S, answer

_RECORDS = 10_000  # kept for a driver that is slow to ask


class ProgressActor:
    """Runs on the driver's node, so that the loss of a worker's node leaves it alive.

    Attributes:
        cause: why training failed.
        stop_requested: whether the workers are to end after their present step.
    """

    def __init__(self) -> None:
        self.step, self.loss = 0, float("nan")
        self.cause: str | None = None
        self.stop_requested = False
        self._records: deque[Record] = deque(maxlen=_RECORDS)

    @classmethod
    def start(cls, name: str) -> Any:
        """The handle of a new actor of this name, on the node of the caller."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        remote: Any = ray.remote(num_cpus=0)(cls)
        return remote.options(name=name, scheduling_strategy=here).remote()

    def report(self, step: int, loss: float, record: Record | None = None) -> None:
        """The last finished step, and its record where it is kept."""
        self.step, self.loss = step, loss
        if record is not None:
            self._records.append(record)

    def records_after(self, step: int) -> list[Record]:
        """The records of later steps."""
        return [record for record in self._records if record["step"] > step]

    def fail(self, cause: str) -> None:
        """Only the first cause counts; the others follow from it."""
        self.cause = self.cause or cause

    def request_stop(self) -> None:
        self.stop_requested = True

    def state(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class ProgressReporter:
    """The workers' side of the actor of this name. Without such an actor it does nothing."""

    def __init__(self, name: str) -> None:
        self._actor: Any = None
        with suppress(ValueError):
            self._actor = ray.get_actor(name)

    def report(self, step: int, loss: float, record: Record | None = None) -> None:
        """Does not wait."""
        if self._actor is not None:
            self._actor.report.remote(step, loss, record)

    def fail(self, cause: str) -> None:
        """Returns when the actor has the cause."""
        if self._actor is not None:
            answer("the driver of the training", self._actor.fail.remote(cause), LOOK_S)

    def stop_requested(self) -> bool:
        """Whether training is to end."""
        return self._actor is not None and bool(self._state()["stop_requested"])

    def has_failed(self) -> bool:
        """Whether an earlier attempt of this training has failed for good."""
        return self._actor is not None and self._state()["cause"] is not None

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = answer("the driver of the training", self._actor.state.remote(), LOOK_S)
        return state
