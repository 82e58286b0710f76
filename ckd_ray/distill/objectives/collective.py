"""The teacher with the collective knowledge of its feedback passages (method.md, steps 4 and 5), and with further
scorers: the encoder as it is, and BM25 (method.md, "The ensemble")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckd_ray.distill.objectives.base import Objective, Problems, TeacherScores

if TYPE_CHECKING:
    from ckd_ray.config.schema import Config, DistillConfig


def _stages(settings: DistillConfig) -> tuple[str, ...]:
    return ("label", "ensemble") if COLLECTIVE.scorers(settings) else ("label",)


def _problems(config: Config) -> Problems:
    shares = [share for share in (config.distill.encoder_share, config.distill.bm25_share) if share != "auto"]
    if sum(shares) >= 1:
        yield "distill.bm25_share", f"must be below 1 together with distill.encoder_share, which are {sum(shares):g}"


COLLECTIVE = Objective(
    name="collective",
    formula="distill.loss with s_T = MaxSim of the teacher + the weighted MaxSim of its expansion + the ensemble",
    scores=TeacherScores.EXPANDED,
    stages=_stages,
    own_keys=frozenset(
        {"smoothing", "teacher_embeddings", "beta", "expansion_share", "expansion_size", "encoder_share", "bm25_share"}
    ),
    problems=_problems,
)
