"""The tensors of a batch, read ahead of the step that needs them.

A worker encodes its own slice of the global batch and scores its queries against the passages of all workers, so it
reads the texts of its slice and the teacher's embeddings of every passage of the batch. Shapes: b queries of this
worker, n = b * M its passages, N passages of the global batch, Q and L rows, D dimensions, E expansion embeddings.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ckd_ray.collective.labels import ExpansionReader
from ckd_ray.cross_encoder.scores import CrossScores
from ckd_ray.data import Collection
from ckd_ray.distill.batches import BatchPlan, Positives, valid_mask
from ckd_ray.distill.task import TrainingTask
from ckd_ray.errors import JobError
from ckd_ray.model import ColBERTTokenizer
from ckd_ray.retrieve.rankings import read_ranking_matrix
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.files import join


@dataclass
class TeacherInputs:
    """The frozen side of a step: queries_bQD, expansions_bED with weights_bE, passages_NLD with mask_NL."""

    queries_bQD: Tensor
    expansions_bED: Tensor
    weights_bE: Tensor
    passages_NLD: Tensor
    mask_NL: Tensor


@dataclass
class StepInputs:
    """Everything a step needs on this worker.

    Attributes:
        positives_b: column of each query's positive among the N passages; valid_bN: see `valid_mask`.
        teacher: None for objectives without a teacher.
    """

    step: int
    query_ids_bQ: Tensor
    query_mask_bQ: Tensor
    passage_ids_nL: Tensor
    passage_mask_nL: Tensor
    positives_b: Tensor
    valid_bN: Tensor
    teacher: TeacherInputs | None
    scores_bN: Tensor | None = None  # of another teacher (cross_encoder); valid_bN then leaves out pairs without one

    def to(self, device: torch.device) -> StepInputs:
        """A copy on `device`."""

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=True)
            if isinstance(value, TeacherInputs):
                return TeacherInputs(**{k: move(v) for k, v in vars(value).items()})
            return value

        return StepInputs(**{k: move(v) for k, v in vars(self).items()})


def worker_slice(batch_size: int, rank: int, world: int) -> slice:
    """The queries of the global batch that worker `rank` of `world` encodes; sizes differ by one at most."""
    return slice(batch_size * rank // world, batch_size * (rank + 1) // world)


class InputReader:
    """Reads the inputs of any step for one worker."""

    def __init__(self, task: TrainingTask, tokenizer: ColBERTTokenizer, rank: int = 0, world: int = 1) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.mine = worker_slice(task.batch_size, rank, world)
        self.collection = Collection.open(task.run)
        self.query_texts = self.collection.queries("train").texts
        qrels = self.collection.qrels("train")
        self.positives = Positives.from_qrels(
            len(self.query_texts),
            qrels.query_index,
            qrels.passage_index,
            qrels.relevance,
            task.positive_grade,
        )
        rankings = read_ranking_matrix(join(task.run, "rankings"), "train") if task.hard_negatives else None
        self.plan = BatchPlan(
            self.positives,
            num_passages=self.collection.num_passages,
            batch_size=task.batch_size,
            negatives=task.negatives,
            seed=task.seed,
            rankings=rankings,
            negatives_depth=task.negatives_depth,
        )
        wants_scores = task.objective == "cross_encoder"
        self.cross_scores = CrossScores.open(join(task.run, "cross_scores")) if wants_scores else None
        if task.needs_teacher:
            self.passages = EmbeddingStore.open(join(task.run, "embeddings", "passages"))
            self.queries = EmbeddingStore.open(join(task.run, "embeddings", "queries.train"))
            wants_expansion = task.objective == "collective"
            self.expansions = ExpansionReader.open(join(task.run, "labels"), "train") if wants_expansion else None

    def read(self, step: int) -> StepInputs:
        """The inputs of `step`."""
        batch = self.plan.batch(step)
        mine, per_query = self.mine, batch.passages_BM.shape[1]
        queries_b = batch.queries_B[mine]
        query_ids, query_mask = self.tokenizer.queries([self.query_texts[i] for i in queries_b.tolist()])
        texts = self.collection.texts(batch.passages_BM[mine].reshape(-1))
        passage_ids, passage_mask = self.tokenizer.pad(self.tokenizer.passages(texts))
        positives_b = torch.arange(mine.start, mine.stop) * per_query
        valid_bN, scores_bN = torch.from_numpy(valid_mask(batch, self.positives)[mine]), None
        if self.cross_scores is not None:
            passages_N = batch.passages_BM.reshape(-1)
            scores_bN, valid_bN = self.cross_scores.of_batch(queries_b, passages_N, positives_b, valid_bN)
        return StepInputs(
            step=step,
            query_ids_bQ=query_ids,
            query_mask_bQ=query_mask,
            passage_ids_nL=passage_ids,
            passage_mask_nL=passage_mask,
            positives_b=positives_b,
            valid_bN=valid_bN,
            teacher=self._teacher(queries_b, batch.passages_BM.reshape(-1)) if self.task.needs_teacher else None,
            scores_bN=scores_bN,
        )

    def _teacher(self, queries_b: np.ndarray, passages_N: np.ndarray) -> TeacherInputs:
        rows = self.queries.gather(queries_b)
        queries_bQD = rows.embeddings_TD.float().reshape(len(queries_b), -1, self.queries.dim)
        if self.expansions is None:
            expansions, weights = (
                queries_bQD.new_zeros(len(queries_b), 0, self.queries.dim),
                queries_bQD.new_zeros(len(queries_b), 0),
            )
        else:
            expansions, weights = self.expansions.select(queries_b, self.task.expansion_size, self.task.beta)
        passages_NLD, mask_NL = self.passages.gather(passages_N).padded()
        return TeacherInputs(queries_bQD, expansions, weights, passages_NLD.float(), mask_NL)

    def stream(self, start: int, ahead: int = 2) -> Iterator[StepInputs]:
        """Inputs of the steps from `start` to the last, read by a thread that stays `ahead` steps in front."""
        ready: queue.Queue[StepInputs | BaseException] = queue.Queue(maxsize=ahead)
        stop = threading.Event()

        def produce() -> None:
            try:
                for step in range(start, self.task.steps):
                    item = self.read(step)
                    while not stop.is_set():
                        try:
                            ready.put(item, timeout=0.2)
                            break
                        except queue.Full:
                            continue
                    if stop.is_set():
                        return
            except BaseException as error:  # handed to the training thread, which raises it
                ready.put(error)

        thread = threading.Thread(target=produce, name="batch-reader", daemon=True)
        thread.start()
        try:
            for _ in range(start, self.task.steps):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise JobError(f"reading a batch failed: {item}") from item
                yield item
        finally:
            stop.set()
