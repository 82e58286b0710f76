"""The actor between the workers of a training and its driver: how far training is, why it failed, whether to stop."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Any

import ray

from ckd_ray.distill.metrics import Record
from ckd_ray.ray_util.waiting import LOOK_S, answer

_RECORDS = 10_000  # kept for a driver that is slow to ask
# The workers may be processing the texts of this many steps, from the last reported one on: they do not all progress
# alike, a message is lost with its process, and two more steps are read ahead.
NEAR = 4


class ProgressActor:
    """Runs on the driver's node, so that the loss of a worker's node leaves it alive.

    Attributes:
        cause: why training failed.
        stop_requested: whether the workers are to end after their present step.
        failures: attempts that failed: a worker died or raised an error.
        stuck: two attempts in a row failed within `NEAR` steps. The workers of the next one return at once.
    """

    def __init__(self) -> None:
        self.step, self.loss = 0, float("nan")
        self.failures, self.stuck = 0, False
        self._failed_at: int | None = None
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

    def begin(self, step: int) -> None:
        """The first step of an attempt."""
        self.step = step

    def attempt_failed(self) -> None:
        """Sets `stuck` when this attempt came no further than the last one."""
        before, self._failed_at = self._failed_at, self.step
        self.failures += 1
        self.stuck = before is not None and abs(self.step - before) < NEAR

    def go_on(self) -> None:
        """Forget the failures."""
        self.failures, self.stuck, self._failed_at = 0, False, None

    def report(self, step: int, loss: float, record: Record | None = None) -> None:
        """The number of finished steps, and the record of the last one where it is kept."""
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
        """Let the workers end after their present step."""
        self.stop_requested = True

    def state(self) -> dict[str, Any]:
        """The public attributes, by name."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class ProgressReporter:
    """The workers' side of the actor of this name. Without such an actor it does nothing."""

    def __init__(self, name: str) -> None:
        self._actor: Any = None
        with suppress(ValueError):
            self._actor = ray.get_actor(name)

    def begin(self, step: int) -> None:
        """Does not wait."""
        if self._actor is not None:
            self._actor.begin.remote(step)

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

    def is_over(self) -> bool:
        """Whether earlier attempts of this training have failed for good, or come no further."""
        if self._actor is None:
            return False
        state = self._state()
        return state["cause"] is not None or bool(state["stuck"])

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = answer("the driver of the training", self._actor.state.remote(), LOOK_S)
        return state
