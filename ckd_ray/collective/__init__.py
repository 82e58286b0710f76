"""The paper's own part: k-means, token votes, expansions, teacher scores, soft labels. Torch and numpy, without Ray."""

from ckd_ray.collective.expand import Expansions, expand
from ckd_ray.collective.losses import collective_loss, soft_labels
from ckd_ray.collective.scores import expansion_weights, teacher_scores

__all__ = ["Expansions", "collective_loss", "expand", "expansion_weights", "soft_labels", "teacher_scores"]
