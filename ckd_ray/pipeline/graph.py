"""The stages of a run in order, which of them a command needs, and their fingerprints.

The fingerprint of a stage covers its settings and what came of its inputs, so a change reaches exactly the stages that
follow from it. The settings are every key of the stage's section that the schema does not mark `OPERATIONAL`, but for
the keys that the rest of the configuration leaves unread.
"""

from __future__ import annotations

from collections.abc import Mapping

from ckd_ray.config import Config
from ckd_ray.errors import UserError
from ckd_ray.pipeline.stage import Stage
from ckd_ray.pipeline.stages import (
    collection,
    cross_encoder,
    distill,
    embed,
    ensemble,
    evaluate,
    label,
    retrieve,
    teacher,
)
from ckd_ray.runs.fingerprint import fingerprint

STAGES: tuple[Stage, ...] = (
    collection.STAGE,
    teacher.STAGE,
    embed.STAGE,
    retrieve.STAGE,
    label.STAGE,
    ensemble.STAGE,
    cross_encoder.STAGE,
    distill.STAGE,
    evaluate.STAGE,
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def check_stage_names(start: str | None, until: str) -> None:
    """Raises UserError for a `--from` or `--until` that names no stage."""
    for option, name in (("--from", start), ("--until", until)):
        if name is not None and name not in STAGE_NAMES:
            raise UserError("unknown stage", where=option, expected=", ".join(STAGE_NAMES), found=name)


def needed(config: Config, until: str) -> list[Stage]:
    """The stages that `until` follows from, itself included, in order."""
    wanted = {until}
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted |= set(stage.inputs(config))
    return [stage for stage in STAGES if stage.name in wanted]


def stage_fingerprint(stage: Stage, config: Config, identities: Mapping[str, str], source: str) -> str:
    """The fingerprint of a stage.

    Args:
        identities: of its inputs, by the name of the stage (see `Stage.identity`).
        source: the signature of the collection's input files; counts for the first stage alone.
    """
    inputs = {name: identities[name] for name in stage.inputs(config)}
    extra = {"source": source} if stage is collection.STAGE else {}
    return fingerprint(stage=stage.name, settings=stage.fingerprint_settings(config), inputs=inputs, **extra)
