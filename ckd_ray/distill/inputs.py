"""The tensors of a batch, read ahead of the step that needs them.

A worker encodes its own slice of the global batch and scores its passages for the queries of all workers. Shapes: b
queries and n = b * M passages of this worker, B queries and N passages of the loss (the global batch, or the worker's
own slice when negatives are not shared), Q and L rows, D dimensions.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckd_ray.cross_encoder.scores import CrossScores
from ckd_ray.data import Collection
from ckd_ray.data.positives import Int64Array
from ckd_ray.distill.batches import Batch, BatchPlan, valid_mask
from ckd_ray.distill.left_out import left_out
from ckd_ray.distill.task import TrainingTask
from ckd_ray.distill.teacher import Rows, TeacherInputs, TeacherReader
from ckd_ray.ensemble.reader import EnsembleReader
from ckd_ray.errors import JobError
from ckd_ray.model import ColBERTTokenizer
from ckd_ray.model.length_buckets import GPU_OVERHEAD, OVERHEAD, even_parts, length_groups
from ckd_ray.model.tokenizer import Int32Array
from ckd_ray.retrieve.rankings import read_ranking_matrix

_READ_WITHIN_S = 1800.0


@dataclass
class Part:
    """Texts that are encoded together: queries, and groups of passages of similar length, (ids_gL, mask_gL) each."""

    query_ids_bQ: Tensor
    query_mask_bQ: Tensor
    groups: list[Rows]


@dataclass
class StepInputs:
    """The inputs of a step on this worker.

    Attributes:
        parts: the worker's queries in order, and its passages in the order of `columns_n`; as many parts as
            `accumulate`.
        columns_n: the position of each encoded passage among the worker's n passages.
        positives_B: column of each query's positive among the N passages.
        valid_BN: see `valid_mask`.
        teacher: the inputs of the teacher's scores, for objectives that compute them from its rows.
        scores_BN: the teacher's scores, for objectives that read them; scored_BN: which pairs have one.
        ensemble_BN: the scores that further scorers add to the teacher's.
    """

    step: int
    parts: list[Part]
    columns_n: Tensor
    positives_B: Tensor
    valid_BN: Tensor
    teacher: TeacherInputs | None
    scores_BN: Tensor | None = None
    scored_BN: Tensor | None = None
    ensemble_BN: Tensor | None = None

    def to(self, device: torch.device) -> StepInputs:
        """The inputs on `device`."""
        moved: StepInputs = _moved(self, device)
        return moved


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, StepInputs | Part | TeacherInputs):
        return type(value)(**{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def worker_slice(batch_size: int, rank: int, world: int) -> slice:
    """The queries of the global batch that worker `rank` of `world` encodes; sizes differ by at most one."""
    return slice(batch_size * rank // world, batch_size * (rank + 1) // world)


def _next(ready: queue.Queue[StepInputs | BaseException]) -> StepInputs | BaseException:
    try:
        return ready.get(timeout=_READ_WITHIN_S)
    except queue.Empty:
        raise JobError(
            f"the inputs of a training step could not be read within {_READ_WITHIN_S:.0f} s: the storage of the run"
            " does not answer; give the same command again, and training goes on from its last checkpoint"
        ) from None


class InputReader:
    """Reads the inputs of any step for one worker."""

    def __init__(
        self,
        task: TrainingTask,
        tokenizer: ColBERTTokenizer,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.on_gpu = torch.device(device).type == "cuda"
        self.mine = worker_slice(task.settings.batch_size, rank, world)
        self.collection = Collection.open(task.run, keep_copies=True)
        self.query_texts = self.collection.queries("train").texts
        self.positives = self.collection.positives("train", task.positive_grade)
        self.left_out = [entry["index"] for entry in left_out(task)]
        student = task.distillation
        rankings = read_ranking_matrix(task.paths.rankings, "train") if student else None
        self.plan = BatchPlan(
            self.positives,
            num_passages=self.collection.num_passages,
            batch_size=task.settings.batch_size,
            negatives=task.settings.negatives,
            seed=task.seed,
            rankings=rankings,
            negatives_depth=student.negatives_depth if student else 0,
            sampling=student.sampling if student else "uniform",
            left_out=self.left_out,
        )
        dim = tokenizer.settings.dim
        self.teacher = TeacherReader(task, dim) if task.objective.reads_rows else None
        reads_pairs = task.objective.reads_pairs
        scorers = task.objective.scorers(student) if student else ()
        ensemble = task.paths.ensemble
        self.ensemble = EnsembleReader.open(ensemble, student, scorers) if student and scorers else None
        self.cross_scores = CrossScores.open(task.paths.cross_scores) if reads_pairs else None

    def read(self, step: int) -> StepInputs:
        """The inputs of `step`."""
        batch, mine = self.plan.batch(step), self.mine
        queries_b, passages_n = batch.queries_B[mine], batch.passages_BM[mine].reshape(-1)
        parts, groups = self._parts(queries_b, passages_n)
        # The rows and columns of the loss.
        scope = batch if self.task.settings.share_negatives else Batch(queries_b, batch.passages_BM[mine])
        teacher = None if self.teacher is None else self.teacher.read(queries_b, [passages_n[g] for g in groups])
        positives_B = torch.arange(len(scope.queries_B)) * scope.passages_BM.shape[1]
        valid_BN = torch.from_numpy(valid_mask(scope, self.positives))
        scores_BN = scored_BN = ensemble_BN = None
        passages_N = scope.passages_BM.reshape(-1)
        if self.ensemble is not None:
            ensemble_BN, scored_BN = self.ensemble.of_batch(scope.queries_B, passages_N)
        if self.cross_scores is not None:
            scores_BN, scored_BN = self.cross_scores.of_batch(scope.queries_B, passages_N, positives_B, valid_BN)
        return StepInputs(
            step=step,
            parts=parts,
            columns_n=torch.from_numpy(np.concatenate(groups)),
            positives_B=positives_B,
            valid_BN=valid_BN,
            teacher=teacher,
            scores_BN=scores_BN,
            scored_BN=scored_BN,
            ensemble_BN=ensemble_BN,
        )

    def _parts(self, queries_b: Int64Array, passages_n: Int64Array) -> tuple[list[Part], list[Int64Array]]:
        """The parts, and the passages of each group of all parts."""
        query_ids, query_mask = self.tokenizer.queries([self.query_texts[i] for i in queries_b.tolist()])
        tokens = self.tokenizer.passages(self.collection.texts(passages_n), self.task.settings.doc_maxlen)
        lengths = np.array([len(ids) for ids in tokens], np.int64)
        count = min(self.task.settings.accumulate, len(queries_b))
        parts, all_groups = [], []
        # Parts hold neighbours in length, which are then grouped once more, and as many tokens each.
        rows_of = np.array_split(np.arange(len(queries_b)), count)
        for rows, members in zip(rows_of, even_parts(lengths, count), strict=True):
            found = length_groups(lengths[members], GPU_OVERHEAD if self.on_gpu else OVERHEAD)
            groups = [members[group] for group in found]
            span = slice(rows[0], rows[-1] + 1)
            parts.append(Part(query_ids[span], query_mask[span], [self._pad(tokens, group) for group in groups]))
            all_groups += groups
        return parts, all_groups

    def _pad(self, tokens: list[Int32Array], group: Int64Array) -> Rows:
        return self.tokenizer.pad([tokens[i] for i in group.tolist()], 8 if self.on_gpu else 1)

    def stream(self, start: int) -> Iterator[StepInputs]:
        """Inputs of the steps from `start` to the last; a thread reads up to two steps in advance."""
        ready: queue.Queue[StepInputs | BaseException] = queue.Queue(maxsize=2)
        stop = threading.Event()

        def put(item: StepInputs | BaseException) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.2)
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                for step in range(start, self.task.settings.steps):
                    put(self.read(step))
                    if stop.is_set():
                        return
            except BaseException as error:  # handed to the training thread, which raises it
                put(error)

        thread = threading.Thread(target=produce, name="batch-reader", daemon=True)
        thread.start()
        try:
            for _ in range(start, self.task.settings.steps):
                item = _next(ready)
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
