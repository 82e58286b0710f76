"""A run of MLflow, on the server that MLFLOW_TRACKING_URI names."""

from __future__ import annotations

import time
from collections.abc import Mapping

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from ckd_ray.tracking.run import Status, TrackedRun, flat

_A_BATCH, _LONGEST = 100, 500  # of parameters, and of a value on servers before 2.10


class MLflow:
    """See `Tracker`. Values of the whole run are metrics at step 0."""

    def __init__(self, run: TrackedRun, identity: str | None) -> None:
        self._client = MlflowClient()
        self.identity = identity if identity and self._goes_on(identity) else self._begun(run)

    def _goes_on(self, identity: str) -> bool:
        """Whether the run is there; then it is running again."""
        try:
            if self._client.get_run(identity).info.lifecycle_stage != "active":
                return False
        except MlflowException:  # deleted, or of another server
            return False
        self._client.update_run(identity, status="RUNNING")
        return True

    def _begun(self, run: TrackedRun) -> str:
        experiment = self._client.get_experiment_by_name(run.project)
        home = self._client.create_experiment(run.project) if experiment is None else experiment.experiment_id
        identity: str = self._client.create_run(home, run_name=run.name, tags={"ckd_ray.run": run.group}).info.run_id
        params = [Param(key, str(value)[:_LONGEST]) for key, value in flat(run.config).items()]
        for first in range(0, len(params), _A_BATCH):
            self._client.log_batch(identity, params=params[first : first + _A_BATCH])
        return identity

    def scalars(self, values: Mapping[str, float], step: int, time: float) -> None:
        metrics = [Metric(name, value, int(1000 * time), step) for name, value in values.items()]
        self._client.log_batch(self.identity, metrics=metrics)

    def summary(self, values: Mapping[str, float]) -> None:
        self.scalars(values, 0, time.time())

    def close(self, status: Status) -> None:
        self._client.set_terminated(self.identity, status="FINISHED" if status == "finished" else "FAILED")
