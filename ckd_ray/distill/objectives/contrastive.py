"""Plain training: the labelled passage against everything else of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckd_ray.distill.objectives.base import Objective, Problems

if TYPE_CHECKING:
    from ckd_ray.config.schema import Config


def _problems(config: Config) -> Problems:
    if config.distill.smoothing:
        yield "distill.smoothing", "objective contrastive has no smoothing: set it to 0, or take label_smoothing"


CONTRASTIVE = Objective(
    name="contrastive",
    formula="CE(label, softmax(s_S / scale))",
    problems=_problems,
    in_comparison=lambda config: {"smoothing": 0.0},
)
