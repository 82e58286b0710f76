"""The teacher stage: train it contrastively with sampled negatives, or take the checkpoint that is given."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from ckd_ray.config import Config
from ckd_ray.config.schema import TrainingConfig
from ckd_ray.files import delete, local_copy, new_folder
from ckd_ray.model.sources import signature
from ckd_ray.pipeline.stage import Stage
from ckd_ray.runs.directory import RunContext

# Keys of a training that count only where it is measured on dev.
_MEASURING = frozenset({"patience", "dev_queries", "dev_passages"})


def unmeasured_keys(section: TrainingConfig) -> frozenset[str]:
    """The keys that a training without measurements on dev does not read."""
    return frozenset() if section.evaluate_every else _MEASURING


def fingerprint_settings(config: Config) -> dict[str, Any]:
    """Section `model` and the training; for a given checkpoint its files instead of the training."""
    model = config.model.for_fingerprint()
    backbone = signature(config.model.backbone)
    if backbone:  # the contents count, not where they lie
        del model["backbone"]
    given = config.teacher.checkpoint
    if given is not None:
        # A .dnn file takes its tokenizer and configuration from the backbone. Dropout is for training alone.
        files = signature(given) + (backbone if given.endswith(".dnn") else [])
        return {"model": model | {"dropout": 0.0}, "checkpoint": None if files else given, "files": files}
    return {
        "model": model,
        "files": backbone,
        "teacher": config.teacher.for_fingerprint({"checkpoint", *unmeasured_keys(config.teacher)}),
        "seed": config.run.seed,
        "positive_grade": config.collection.positive_grade,
    }


def run(context: RunContext, fingerprint: str) -> dict[str, Any]:
    """Write the teacher's checkpoint."""
    from ckd_ray.pipeline.loading import load_backbone, load_teacher
    from ckd_ray.pipeline.training import train, training_task

    config, out = context.config, context.paths.teacher
    given = config.teacher.checkpoint
    if given is not None:
        # A model at a URI is downloaded into a temporary folder; the libraries find any other source themselves.
        with local_copy(given) if "://" in given else nullcontext(given) as source:
            model = load_teacher(source, config)
        with new_folder(out) as folder:
            model.save(folder)
        return {"given": given}
    start = context.paths.training_checkpoints("start", fingerprint)
    model = load_backbone(config)
    with new_folder(start) as folder:
        model.save(folder)
    task = training_task(context, "teacher", fingerprint, start, model)
    figures = train(task, out, context.tracking)
    delete(start)
    return figures


STAGE = Stage(
    name="teacher",
    inputs=lambda config: ("collection",),
    output=lambda run: run.teacher,
    fingerprint_settings=fingerprint_settings,
    run=run,
    replace_atomically=True,
)
