"""The teacher without its expansion."""

from ckd_ray.distill.objectives.base import Objective, TeacherScores

SELF_DISTILLATION = Objective(
    name="self_distillation",
    formula="distill.loss with s_T = MaxSim of the teacher",
    scores=TeacherScores.ROWS,
    own_keys=frozenset({"smoothing", "teacher_embeddings"}),
)
