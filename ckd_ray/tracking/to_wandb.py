"""A run of Weights & Biases. Its own environment says where and how: WANDB_API_KEY, WANDB_MODE, WANDB_DIR."""

from __future__ import annotations

from collections.abc import Mapping

import wandb

from ckd_ray.tracking.run import Status, TrackedRun


class WeightsAndBiases:
    """See `Tracker`. Each stage has steps of its own, `distill/step`."""

    def __init__(self, run: TrackedRun, identity: str | None) -> None:
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            group=run.group,
            config=run.config,
            id=identity,
            resume="allow" if identity else None,
            reinit="create_new",  # a run that the program has open stays as it is
            # silent: it does not prompt for a key. console: what the process prints is not uploaded.
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        self.identity = str(self._run.id)
        self._stages: set[str] = set()

    def scalars(self, values: Mapping[str, float], step: int, time: float) -> None:
        named: dict[str, float] = {**values}
        for stage in {name.partition("/")[0] for name in values}:
            if stage not in self._stages:
                self._stages.add(stage)
                self._run.define_metric(f"{stage}/step", hidden=True)
                self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            named[f"{stage}/step"] = step
        self._run.log(named)

    def summary(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def close(self, status: Status) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)
