"""The training of a teacher or a student as a task for the trainer, and what is told of it."""

from __future__ import annotations

from typing import Any

from ckd_ray.config import Config
from ckd_ray.data import Collection
from ckd_ray.distill.callbacks import load_callbacks
from ckd_ray.distill.metrics import SCALARS, Record
from ckd_ray.distill.targets import degenerate, targets_of
from ckd_ray.distill.task import TrainingTask
from ckd_ray.distill.trainer import TrainingOutcome, fit
from ckd_ray.errors import UserError
from ckd_ray.files import exists, join, local_copy, new_folder
from ckd_ray.model import ColBERT
from ckd_ray.model.recompute import recompute_activations
from ckd_ray.pipeline.loading import load_backbone
from ckd_ray.pipeline.precision import agreed_precision, precision_on_cluster
from ckd_ray.pipeline.stages.distill import distill_seed
from ckd_ray.progress import say
from ckd_ray.runs.directory import RunContext
from ckd_ray.tracking import Tracking


def training_task(
    context: RunContext, stage: str, fingerprint: str, start: str, model: ColBERT, keep: str | None = None
) -> TrainingTask:
    """The training of the stage `teacher` or `distill`.

    Args:
        start: the checkpoint to start from, which is `model`.
        keep: the folder that keeps the precision chosen; that of the training's checkpoints when None.
    """
    config, run = context.config, context.paths
    section = config.teacher if stage == "teacher" else config.distill
    home = keep or run.training_checkpoints(stage, fingerprint)
    precision = agreed_precision(
        home, stage, lambda: precision_on_cluster(lambda: model, section.precision, "auto", f"{stage}.precision")
    )
    if section.gradient_checkpointing:
        recompute_activations(model, f"{stage}.gradient_checkpointing")  # refused here, before workers start
    if section.evaluate_every and "dev" not in Collection.open(run.root).splits:
        raise UserError("the collection has no dev split to measure on", where=f"{stage}.evaluate_every")
    untrained = None
    if section.untrained_share and stage == "teacher":
        untrained = start
    elif section.untrained_share:
        untrained = _untrained(config, model, join(home, "untrained"), f"{stage}.untrained_share")
    return TrainingTask(
        stage=stage,
        run=run.root,
        start=start,
        fingerprint=fingerprint,
        seed=config.run.seed if stage == "teacher" else distill_seed(config),
        settings=section,
        precision=precision,
        dropout=config.model.dropout,
        positive_grade=config.collection.positive_grade,
        labels=run.labels_name,
        teacher=None if stage == "teacher" else run.teacher,
        untrained=untrained,
        max_bad=config.embed.max_bad_passages,
    )


def _untrained(config: Config, model: ColBERT, folder: str, key: str) -> str:
    """Write the backbone as it is into `folder`, unless it is there. UserError when it does not fit `model`."""
    backbone = load_backbone(config)
    shapes = ([p.shape for p in encoder.parameters()] for encoder in (model.backbone, backbone.backbone))
    if next(shapes) != next(shapes):
        raise UserError(
            "the encoder is of another architecture or size than model.backbone",
            where=key,
            expected="the model that the teacher was trained from, as model.backbone",
            found=config.model.backbone,
            fix=f"set model.backbone, or {key}=0",
        )
    if not exists(folder):
        with new_folder(folder) as out:
            backbone.save(out)
    return folder


def distill_task(context: RunContext, fingerprint: str, *, keep: str | None = None) -> TrainingTask:
    """The training that distils the student of this configuration; see `training_task` for `keep`."""
    start = context.paths.teacher
    with local_copy(start) as folder:
        model = ColBERT.from_pretrained(folder)
    return training_task(context, "distill", fingerprint, start, model, keep)


def train(task: TrainingTask, out: str, tracking: Tracking) -> dict[str, Any]:
    """Run the training, put its result at `out`, and return the figures of the stage."""

    def listener(records: list[Record]) -> None:
        for record in records:
            values = {f"{task.stage}/{name}": record[name] for name in SCALARS if name in record}
            tracking.scalars(values, record["step"], record["time"])

    section = task.settings
    callbacks = load_callbacks(section.callbacks, task.stage)
    options: dict[str, Any] = {"workers": section.workers, "max_failures": section.max_failures}
    outcome = fit(task, out=out, callbacks=callbacks, listener=listener if tracking.active else None, **options)
    return _figures(task, outcome)


def _figures(task: TrainingTask, outcome: TrainingOutcome) -> dict[str, Any]:
    losses = [record["loss"] for record in outcome.metrics]
    targets = targets_of(outcome.metrics)
    left_out = {"set_aside": [entry["passage_id"] for entry in outcome.set_aside]} if outcome.set_aside else {}
    student = task.distillation
    if student and task.objective.has_teacher and (notice := degenerate(targets, student.temperature)):
        say(f"{task.stage}: {notice}")
    if outcome.best is not None:
        say(f"{task.stage}: best on dev MRR@10 {outcome.best:.4f} at step {outcome.kept_step} of {outcome.steps}")
    return {
        "count": outcome.steps,
        "unit": "steps",
        "workers": outcome.workers,
        "precision": task.precision,
        "objective": task.objective.name,
        "score_scale": outcome.score_scale,
        **targets,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "weights": outcome.weights,
        "kept_step": outcome.kept_step,
        "dev_mrr@10": outcome.best,
        **left_out,
    }
