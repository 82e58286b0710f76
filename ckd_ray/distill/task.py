"""What a training run needs to know, the same in every process and after every restart."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


def checkpoints_of(stage: str, fingerprint: str) -> str:
    """The folder, below a run, of what a training has come to. It goes when the stage that trains is finished."""
    return f"checkpoints/{stage}-{fingerprint[:16]}"


@dataclass(frozen=True)
class TrainingTask:
    """One training run, of the teacher or of a student.

    Attributes:
        stage: `teacher` or `distill`; the word in front of progress lines.
        run: the run directory (collection, store, rankings, labels are below it).
        start: folder of the checkpoint to start from.
        objective: see `ckd_ray.distill.objectives`.
        temperature: divides the teacher's scores alone (docs/method.md step 6).
        smoothing: share of the uniform distribution mixed into the labels.
        beta, expansion_size: how strong and how long the expansion is when labels are read.
        zero_row_floor: the published score's clip, off by default.
        labels: the folder of the labels, below the run.
        positive_grade: the qrels grade from which a passage is a positive.
        hard_negatives: from the rankings; else from the whole corpus.
        accumulate: parts in which a batch is encoded. Gradients are cached between the parts, so the loss stays that
            of the whole batch.
        share_negatives: every query meets the passages of all workers; off, those of its own worker alone, and the
            loss then depends on the number of workers.
        teacher_embeddings: `store` reads the teacher's rows; `recompute` runs the encoder in `teacher` (a checkpoint)
            on the passages of the batch.
        ema: decay of the moving average of the weights that is kept as the result; 0 keeps the weights themselves.
        evaluate_every: steps between measurements on dev (see `ckd_ray.distill.dev`); 0 measures never. When it is on,
            the result is the best checkpoint, not the last.
        patience: stop after so many measurements without a better one; 0 never stops early.
        dev_queries, dev_passages: how large a measurement is.
    """

    stage: str
    run: str
    start: str
    fingerprint: str
    seed: int
    steps: int
    batch_size: int
    learning_rate: float
    objective: str = "contrastive"
    temperature: float = 0.25
    smoothing: float = 0.0
    beta: float = 1.0
    expansion_size: int = 10
    zero_row_floor: bool = False
    labels: str = "labels"
    positive_grade: int = 1
    negatives: int = 1
    negatives_depth: int = 100
    hard_negatives: bool = False
    warmup: float = 0.1
    schedule: str = "linear"
    weight_decay: float = 0.0
    clip_norm: float = 2.0
    accumulate: int = 1
    precision: str = "fp32"
    dropout: float = 0.0
    share_negatives: bool = True
    teacher_embeddings: str = "store"
    teacher: str | None = None
    ema: float = 0.0
    evaluate_every: int = 0
    patience: int = 0
    dev_queries: int = 100
    dev_passages: int = 1000
    checkpoint_every: int = 200
    log_every: int = 10

    @property
    def checkpoints(self) -> str:
        """The folder of this training's checkpoints, below the run."""
        return checkpoints_of(self.stage, self.fingerprint)

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective reads the teacher's embeddings."""
        return self.objective in ("self_distillation", "collective")

    @property
    def recomputes_teacher(self) -> bool:
        """Whether workers run the teacher's encoder."""
        return self.needs_teacher and self.teacher_embeddings == "recompute"

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingTask:
        """Reads `to_dict`'s form."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up over the first `warmup` share of the steps, then constant or linear decay to zero."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (self.steps - step) / max(1, self.steps - warm)
