"""The frozen teacher's inputs of a batch: its rows from the store, unless its encoder computes them again.

A worker reads only the rows of its own queries and passages, so the work of reading and decoding does not grow with the
number of workers; workers exchange scores, not rows. Shapes: b queries of a worker, g passages of a group, Q and L
rows, D dimensions, E expansion embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ckd_ray.data.positives import Int64Array
from ckd_ray.distill.task import TrainingTask
from ckd_ray.labels.files import ExpansionReader
from ckd_ray.store import EmbeddingStore

Rows = tuple[Tensor, Tensor]


@dataclass
class TeacherInputs:
    """The teacher's inputs of a step.

    Attributes:
        expansions_bED, idf_bE: float32; E is 0 for objectives without an expansion.
        queries_bQD: rows of the worker's queries, float16; None when the step computes them.
        passages: (rows_gLD, mask_gL) of each group; None when the step computes them.
        depths: the number of depths of feedback in E, see `expansion_weights`.
    """

    expansions_bED: Tensor
    idf_bE: Tensor
    queries_bQD: Tensor | None = None
    passages: list[Rows] | None = None
    depths: int = 1


class TeacherReader:
    """Reads and decodes the teacher's inputs of a worker's slice of a batch, in the thread that reads ahead."""

    def __init__(self, task: TrainingTask, dim: int) -> None:
        self.task, self.dim = task, dim
        self.stored = not task.recomputes_teacher
        if self.stored:
            self.passages = EmbeddingStore.open(task.paths.passages)
            self.queries = EmbeddingStore.open(task.paths.query_embeddings("train"))
        reads_expansions = task.objective.reads_expansions
        self.expansions = ExpansionReader.open(task.paths.labels, "train") if reads_expansions else None

    def read(self, queries_b: Int64Array, groups: Sequence[Int64Array]) -> TeacherInputs:
        """The inputs for these queries and groups of passages, given as dense indices."""
        b = len(queries_b)
        expansions, idf, depths = torch.zeros(b, 0, self.dim), torch.zeros(b, 0), 1
        if self.expansions is not None and self.task.distillation is not None:
            expansions, idf = self.expansions.select(queries_b, self.task.distillation.expansion_size)
            depths = self.expansions.blocks
        if not self.stored:
            return TeacherInputs(expansions, idf, depths=depths)
        queries_bQD = self.queries.gather(queries_b).embeddings_TD.reshape(b, -1, self.dim)
        passages = [self.passages.gather(g).padded() for g in groups]
        return TeacherInputs(expansions, idf, queries_bQD, passages, depths)
