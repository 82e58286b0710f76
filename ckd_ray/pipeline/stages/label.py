"""The label stage: collective relevance labels of every training query."""

from __future__ import annotations

from typing import Any

from ckd_ray.config import Config
from ckd_ray.pipeline.stage import Stage
from ckd_ray.runs.directory import RunContext


def fingerprint_settings(config: Config) -> dict[str, Any]:
    """The section, and what the chosen way of voting reads of `retrieve`."""
    if config.label.token_vote == "feedback":
        return config.label.for_fingerprint({"neighbours"})
    settings = {**config.label.for_fingerprint(), "seed": config.run.seed}
    if config.label.neighbours == "faiss":
        settings |= {"cells": config.retrieve.cells, "nprobe": config.retrieve.nprobe}
    return settings


def run(context: RunContext, fingerprint: str) -> dict[str, Any]:
    """Write the labels."""
    from ckd_ray.pipeline.labelling import label_split

    return label_split(context, "train", context.paths.rankings, context.paths.labels)


STAGE = Stage(
    name="label",
    inputs=lambda config: ("retrieve",),
    output=lambda run: run.labels,
    fingerprint_settings=fingerprint_settings,
    run=run,
)
