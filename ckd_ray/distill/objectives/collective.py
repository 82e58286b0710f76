"""The teacher with the collective knowledge of its feedback passages (docs/method.md, steps 4 and 5)."""

from ckd_ray.distill.objectives.base import Objective, TeacherScores

COLLECTIVE = Objective(
    name="collective",
    formula="distill.loss with s_T = MaxSim of the teacher + the weighted MaxSim of its expansion",
    scores=TeacherScores.EXPANDED,
    stages=("label",),
    own_keys=frozenset({"smoothing", "teacher_embeddings", "beta", "expansion_share", "expansion_size"}),
)
