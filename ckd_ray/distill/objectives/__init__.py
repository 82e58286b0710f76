"""The objectives that a student can be trained with, by name.

To add an objective, write a file in this folder, add the objective to the tuple below, and add its name to
`distill.objective` in `ckd_ray/config/schema.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckd_ray.distill.objectives.base import LOSS_KEYS, Objective, TeacherScores, scorers_of
from ckd_ray.distill.objectives.collective import COLLECTIVE
from ckd_ray.distill.objectives.contrastive import CONTRASTIVE
from ckd_ray.distill.objectives.cross_encoder import CROSS_ENCODER
from ckd_ray.distill.objectives.label_smoothing import LABEL_SMOOTHING
from ckd_ray.distill.objectives.self_distillation import SELF_DISTILLATION

if TYPE_CHECKING:
    from ckd_ray.config.schema import Config

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (CONTRASTIVE, LABEL_SMOOTHING, SELF_DISTILLATION, CROSS_ENCODER, COLLECTIVE)
}
# The keys of `distill` that only some objectives, losses or settings read.
CONDITIONAL_KEYS: frozenset[str] = frozenset().union(*(objective.all_keys() for objective in OBJECTIVES.values()))
# What `ckd-ray compare` tests the others against, and how the teacher is trained.
BASELINE = CONTRASTIVE


def objective_of(config: Config) -> Objective:
    """The objective of section `distill`."""
    return OBJECTIVES[config.distill.objective]


__all__ = [
    "BASELINE",
    "CONDITIONAL_KEYS",
    "LOSS_KEYS",
    "OBJECTIVES",
    "Objective",
    "TeacherScores",
    "objective_of",
    "scorers_of",
]
