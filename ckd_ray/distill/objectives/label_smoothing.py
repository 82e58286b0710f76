"""The label shares its probability evenly with every passage of the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckd_ray.distill.objectives.base import Objective, Problems

if TYPE_CHECKING:
    from ckd_ray.config.schema import Config


def _problems(config: Config) -> Problems:
    if config.distill.smoothing == 0:
        yield "distill.smoothing", "objective label_smoothing needs a share above 0 (0.1 is usual)"


def _in_comparison(config: Config) -> dict[str, Any]:
    return {"smoothing": config.distill.smoothing or config.compare.smoothing}


LABEL_SMOOTHING = Objective(
    name="label_smoothing",
    formula="CE((1 - e) one-hot + e / n, softmax(s_S / scale))",
    own_keys=frozenset({"smoothing"}),
    problems=_problems,
    in_comparison=_in_comparison,
)
