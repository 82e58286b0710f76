"""The description of a training, the same in every process and after every restart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ckd_ray.config.schema import DistillConfig, TrainingConfig
from ckd_ray.distill.objectives import BASELINE, OBJECTIVES, Objective
from ckd_ray.runs.directory import LABELS, RunDir


@dataclass(frozen=True)
class TrainingTask:
    """One training run, of the teacher or of a student.

    Attributes:
        stage: `teacher` or `distill`; the word in front of progress lines.
        run: the run directory (collection, store, rankings, labels are below it).
        start: folder of the checkpoint to start from.
        settings: the configuration's section, a `DistillConfig` for a student.
        seed: of batches and dropout.
        precision: `fp32` or `bf16`, as chosen for this training.
        dropout: probability for every dropout of the encoder.
        positive_grade: the qrels grade from which a passage is a positive.
        labels: the folder of the labels, below the run.
        teacher: the checkpoint whose encoder is run again when `teacher_embeddings` is `recompute`.
        untrained: a checkpoint with the encoder as it was before any training, for `untrained_share`.
        max_bad: passages that may be left out because the encoder fails on them.
    """

    stage: str
    run: str
    start: str
    fingerprint: str
    seed: int
    settings: TrainingConfig
    precision: str = "fp32"
    dropout: float = 0.0
    positive_grade: float = 1
    labels: str = LABELS
    teacher: str | None = None
    untrained: str | None = None
    max_bad: int = 0

    @property
    def paths(self) -> RunDir:
        """The folders of the run, with the labels of this training."""
        return RunDir(self.run, labels_name=self.labels)

    @property
    def checkpoints(self) -> str:
        """The folder of this training's checkpoints."""
        return self.paths.training_checkpoints(self.stage, self.fingerprint)

    @property
    def distillation(self) -> DistillConfig | None:
        """The settings of a student; None for a teacher."""
        return self.settings if isinstance(self.settings, DistillConfig) else None

    @property
    def objective(self) -> Objective:
        """The objective of a student; plain contrastive training for a teacher."""
        return OBJECTIVES[self.distillation.objective] if self.distillation else BASELINE

    @property
    def zero_row_floor(self) -> bool:
        """`distill.zero_row_floor`; False for a teacher."""
        return bool(self.distillation and self.distillation.zero_row_floor)

    @property
    def recomputes_teacher(self) -> bool:
        """Whether the workers run the teacher's encoder."""
        d = self.distillation
        return d is not None and self.objective.reads_rows and d.teacher_embeddings == "recompute"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "settings": self.settings.model_dump(mode="json")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingTask:
        """Reads `to_dict`'s form."""
        section = DistillConfig if "objective" in values["settings"] else TrainingConfig
        # The section was checked when the configuration was loaded.
        return cls(**{**values, "settings": section.model_construct(**values["settings"])})

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up over the first `warmup` share of the steps, then constant or linear decay to zero."""
        s = self.settings
        warm = max(1, round(s.warmup * s.steps))
        if step < warm:
            return s.learning_rate * (step + 1) / warm
        if s.schedule == "constant":
            return s.learning_rate
        return s.learning_rate * (s.steps - step) / max(1, s.steps - warm)
