"""The distill stage: train the student, starting from the teacher's weights."""

from __future__ import annotations

from typing import Any

from ckd_ray.config import Config
from ckd_ray.distill.objectives import CONDITIONAL_KEYS, objective_of
from ckd_ray.model.sources import signature
from ckd_ray.pipeline.stage import Stage
from ckd_ray.pipeline.stages.teacher import unmeasured_keys
from ckd_ray.runs.directory import RunContext


def distill_seed(config: Config) -> int:
    """`distill.seed`, or `run.seed` when that is null."""
    return config.run.seed if config.distill.seed is None else config.distill.seed


def inputs(config: Config) -> tuple[str, ...]:
    """The teacher's side, and what the objective takes its targets from."""
    return ("collection", "teacher", "embed", "retrieve", *objective_of(config).stages(config.distill))


def fingerprint_settings(config: Config) -> dict[str, Any]:
    """The keys of the section that the objective and its loss read, and what training takes from other sections."""
    d = config.distill
    unread = CONDITIONAL_KEYS - objective_of(config).keys(d)
    # A teacher that this run trains stands for its backbone already.
    untrained = d.untrained_share > 0 and config.teacher.checkpoint is not None
    return {
        **({"backbone": signature(config.model.backbone) or config.model.backbone} if untrained else {}),
        "distill": d.for_fingerprint({"seed", *unread, *unmeasured_keys(d)}),
        "dropout": config.model.dropout,
        "seed": distill_seed(config),
        "positive_grade": config.collection.positive_grade,
    }


def run(context: RunContext, fingerprint: str) -> dict[str, Any]:
    """Write the student's checkpoint."""
    from ckd_ray.pipeline.training import distill_task, train

    return train(distill_task(context, fingerprint), context.paths.student, context.tracking)


STAGE = Stage(
    name="distill",
    inputs=inputs,
    output=lambda run: run.student,
    fingerprint_settings=fingerprint_settings,
    run=run,
    replace_atomically=True,
)
