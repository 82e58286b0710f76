"""The class of objectives. Each objective has a file in this folder, and no other code compares their names.

Only the computation of a loss imports torch, because configurations are checked against objectives without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckd_ray.collective.losses import BatchScores, LossRows
    from ckd_ray.config.schema import Config, DistillConfig

Problems = Iterator[tuple[str, str]]  # (path of the key, the problem and its fix)


class TeacherScores(Enum):
    """The source of the teacher's scores."""

    NONE = "none"
    ROWS = "rows"  # MaxSim of the teacher's token embeddings
    EXPANDED = "expanded"  # the same, with the expansion of the labels
    PAIRS = "pairs"  # scores of (query, passage) pairs, computed before training


# The keys of `distill` that each `distill.loss` reads besides those of every loss.
LOSS_KEYS: Mapping[str, frozenset[str]] = {
    "kl": frozenset(),
    "margin": frozenset({"margin"}),
    "mixture": frozenset({"teacher_weight"}),
    "decoupled": frozenset({"teacher_weight"}),
}
# What `teacher_weight: auto` is for a loss. That of `decoupled` was chosen on dev (evidence.md).
AUTO_TEACHER_WEIGHT: Mapping[str, float] = {"mixture": 0.5, "decoupled": 2.0}
_TEACHER_KEYS = frozenset({"loss", "temperature", "denoise"})


@dataclass(frozen=True)
class Objective:
    """One way of training a student.

    Attributes:
        name: the value of `distill.objective`.
        formula: the target or loss, for `training.json`, in the notation of `ckd_ray.collective.losses`.
        scores: where the teacher's scores come from.
        stages: stages whose artifacts it reads with these settings, besides those that every distillation reads.
        own_keys: keys of `distill` that it reads and some other objective does not, `distill.loss` and what follows
            from it aside.
        problems: what is wrong with a configuration that uses it, besides what `mistakes` finds for all objectives.
        in_comparison: what it changes in section `distill` when `ckd-ray compare` trains it under the budget of
            another objective, given the configuration.
    """

    name: str
    formula: str
    scores: TeacherScores = TeacherScores.NONE
    stages: Callable[[DistillConfig], tuple[str, ...]] = field(default=lambda settings: ())
    own_keys: frozenset[str] = frozenset()
    problems: Callable[[Config], Problems] = field(default=lambda config: iter(()))
    in_comparison: Callable[[Config], dict[str, Any]] = field(default=lambda config: {})

    @property
    def has_teacher(self) -> bool:
        """Whether it has a teacher."""
        return self.scores is not TeacherScores.NONE

    @property
    def reads_rows(self) -> bool:
        """Whether a step computes the teacher's scores from its token embeddings."""
        return self.scores in (TeacherScores.ROWS, TeacherScores.EXPANDED)

    @property
    def reads_expansions(self) -> bool:
        """Whether a step reads the labels' expansions."""
        return self.scores is TeacherScores.EXPANDED

    @property
    def reads_pairs(self) -> bool:
        """Whether a step reads scores of pairs."""
        return self.scores is TeacherScores.PAIRS

    def scorers(self, settings: DistillConfig) -> tuple[str, ...]:
        """The further scorers whose scores are part of the teacher's."""
        return scorers_of(settings) if self.reads_expansions else ()

    def keys(self, settings: DistillConfig) -> frozenset[str]:
        """The keys of `distill` that this objective reads with these settings and some other objective does not."""
        if not self.has_teacher:
            return self.own_keys
        return self.own_keys | _TEACHER_KEYS | LOSS_KEYS[settings.loss] | _beta_keys(self, settings)

    def mistakes(self, config: Config) -> Problems:
        """The problems of section `distill` in a configuration with this objective."""
        yield from self.problems(config)
        d = config.distill
        if not self.has_teacher:
            return
        if d.loss == "decoupled" and d.negatives < 2:
            yield (
                "distill.negatives",
                "loss decoupled orders a query's own candidates: it needs 2 or more (7 is usual); the published loss, "
                "distill.loss: kl, does with 1",
            )
        if d.loss == "mixture" and d.teacher_weight != "auto" and d.teacher_weight > 1:
            yield "distill.teacher_weight", "is the teacher's share of the target of loss mixture: it must be at most 1"

    def all_keys(self) -> frozenset[str]:
        """The keys of `distill` that it reads with some setting of the others."""
        if not self.has_teacher:
            return self.own_keys
        return (self.own_keys | _TEACHER_KEYS).union(*LOSS_KEYS.values())

    def loss(self, scores: BatchScores, settings: DistillConfig, scale: float) -> LossRows:
        """The loss of every row of a batch.

        Args:
            settings: section `distill`.
            scale: divides the student's scores: `distill.score_scale`, measured where that is `auto`.

        Raises:
            ValueError: the teacher's scores are missing. FloatingPointError: scores are not finite.
        """
        from ckd_ray.collective import losses

        if not self.has_teacher:
            return losses.contrastive(scores, scale=scale, smoothing=settings.smoothing if self.own_keys else 0.0)
        shared: dict[str, Any] = {
            "scale": scale,
            "temperature": settings.temperature,
            "smoothing": settings.smoothing,
            "denoise": settings.denoise,
        }
        if settings.loss == "decoupled":
            return losses.decoupled(scores, teacher_weight=_teacher_weight(settings), **shared)
        if settings.loss == "mixture":
            return losses.kl(scores, teacher_weight=_teacher_weight(settings), **shared)
        return losses.kl(scores, margin=settings.margin if settings.loss == "margin" else 0.0, **shared)


def _teacher_weight(settings: DistillConfig) -> float:
    return AUTO_TEACHER_WEIGHT[settings.loss] if settings.teacher_weight == "auto" else settings.teacher_weight


def scorers_of(settings: DistillConfig) -> tuple[str, ...]:
    """The scorers of the ensemble that have a share."""
    shares = {"encoder": settings.encoder_share, "bm25": settings.bm25_share}
    return tuple(name for name, share in shares.items() if share)


def _beta_keys(objective: Objective, settings: DistillConfig) -> frozenset[str]:
    """The keys that set the weight of the expansion; `expansion_share` counts only with `beta: auto`."""
    if not objective.reads_expansions:
        return frozenset()
    return frozenset({"beta", "expansion_share"}) if settings.beta == "auto" else frozenset({"beta"})
