"""Another teacher: scores of (query, candidate) pairs from a file or from a cross-encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckd_ray.distill.objectives.base import Objective, Problems, TeacherScores

if TYPE_CHECKING:
    from ckd_ray.config.schema import Config


def _problems(config: Config) -> Problems:
    if not (config.cross_encoder.scores or config.cross_encoder.model):
        yield (
            "cross_encoder.scores",
            "objective cross_encoder needs cross_encoder.scores (a file), or cross_encoder.model (a classifier)",
        )


CROSS_ENCODER = Objective(
    name="cross_encoder",
    formula="distill.loss with s_T = the scores of another teacher, over the pairs that it has scored",
    scores=TeacherScores.PAIRS,
    stages=lambda settings: ("cross_encoder",),
    own_keys=frozenset({"smoothing"}),
    problems=_problems,
)
