"""A bounded measurement on dev during training: MRR@10 of some dev queries over a fixed pool of passages.

The pool holds the labelled passages of the queries and, up to its size, others. In a distillation these are the
passages of a sample that the teacher ranks highest (near misses tell models apart, random passages do not); in the
teacher's training they are a sample. The seed determines queries and sample. Shapes: B dev queries, P passages of the
pool, S sampled passages, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from ckd_ray.data import Collection
from ckd_ray.data.positives import Int64Array
from ckd_ray.distill.task import TrainingTask
from ckd_ray.errors import UserError
from ckd_ray.files import exists, join
from ckd_ray.model import ColBERT, maxsim
from ckd_ray.model.encoder import Precision, computing
from ckd_ray.model.length_buckets import CPU_TOKENS, GPU_TOKENS, token_budget_batches
from ckd_ray.model.tokenizer import Int32Array
from ckd_ray.store import EmbeddingStore
from ckd_ray.store.writing import MANIFEST

CUTOFF = 10
_SAMPLE = 8  # passages of the sample for each passage of the pool


class DevMeasure:
    """Measures a model on dev. Every worker encodes a share of the pool, and all get the same result.

    Args:
        pool: the pool of an earlier start of the same training; None chooses one.
        left_out: passages that are not measured.

    Attributes:
        pool_P: dense indices, ascending.

    Raises:
        UserError: no dev query has a labelled passage.
    """

    def __init__(
        self,
        task: TrainingTask,
        model: ColBERT,
        *,
        rank: int,
        world: int,
        device: torch.device,
        precision: Precision,
        pool: list[int] | None = None,
        left_out: Sequence[int] = (),
    ) -> None:
        self.task, self.rank, self.world, self.device, self.precision = task, rank, world, device, precision
        self.model, self.similarity = model, model.settings.similarity
        collection = Collection.open(task.run)
        queries, positives = collection.queries("dev"), collection.positives("dev", task.positive_grade)
        labelled = positives.labelled_queries
        if not len(labelled):
            raise UserError("no dev query has a labelled passage", where=f"{task.stage}.evaluate_every")
        random = np.random.default_rng([task.seed, 2])
        self.queries_B: Int64Array = np.sort(random.permutation(labelled)[: task.settings.dev_queries])
        self.wanted = [positives.of(query) for query in self.queries_B.tolist()]
        size, total = _SAMPLE * task.settings.dev_passages, collection.num_passages
        sample_S = np.arange(total) if total <= size else np.unique(random.integers(0, total, size))
        chosen_P = np.array(pool, np.int64) if pool is not None else self._choose(sample_S, random)
        self.pool_P = np.setdiff1d(chosen_P, list(left_out))
        self.mine = self.pool_P[rank::world]
        self._query_texts, self._collection = [queries.texts[i] for i in self.queries_B.tolist()], collection

    @cached_property
    def _tokenised(self) -> tuple[Tensor, Tensor, list[Int32Array]]:
        """Ids and mask of the queries, and the ids of the worker's passages."""
        tokenizer = self.model.tokenizer
        return *tokenizer.queries(self._query_texts), tokenizer.passages(self._collection.texts(self.mine))

    def _choose(self, sample_S: Int64Array, random: np.random.Generator) -> Int64Array:
        labelled = np.unique(np.concatenate(self.wanted))
        room = max(0, self.task.settings.dev_passages - len(labelled))
        others = np.setdiff1d(sample_S, labelled)
        queries = self.task.paths.query_embeddings("dev")
        if self.task.stage == "teacher" or not exists(join(queries, MANIFEST)):
            chosen = random.permutation(others)[:room]
        else:
            chosen = others[top_of_rows(self._teacher_scores(queries, others), room)]
        return np.union1d(labelled, chosen)

    @torch.inference_mode()
    def _teacher_scores(self, queries_uri: str, others: Int64Array) -> Tensor:
        """(B, S) by the teacher's own rows; each worker scores a share of the sample."""
        queries, passages = EmbeddingStore.open(queries_uri), EmbeddingStore.open(self.task.paths.passages)
        rows_BQD = queries.gather(self.queries_B).embeddings_TD.reshape(len(self.queries_B), -1, queries.dim)
        rows_BQD = rows_BQD.to(self.device)
        parts = [rows_BQD.new_empty(len(rows_BQD), 0, dtype=torch.float32)]
        for block in np.array_split(others[self.rank :: self.world], max(1, len(others) // (64 * self.world))):
            rows, mask = passages.gather(block).padded()
            parts.append(maxsim(rows_BQD, rows.to(self.device), mask.to(self.device), similarity=self.similarity))
        return self._together(torch.cat(parts, 1), len(others))

    def _together(self, scores_Bp: Tensor, total: int) -> Tensor:
        """The columns of all workers in order; worker r holds columns r, r + world, ..."""
        if self.world == 1:
            return scores_Bp.cpu()
        widest = -(-total // self.world)
        padded = torch.nn.functional.pad(scores_Bp, (0, widest - scores_Bp.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, 2).flatten(1)[:, :total].cpu()

    def __call__(self) -> float:
        """MRR@10 of the model in its present state. The training mode does not change."""
        before = self.model.training
        self.model.eval()
        try:
            scores_BP = self._together(self._score(), len(self.pool_P))
        finally:
            self.model.train(before)
        relevant_BP = np.stack([np.isin(self.pool_P, wanted) for wanted in self.wanted])
        return mean_reciprocal_rank(scores_BP.numpy(), relevant_BP)

    @torch.no_grad()
    def _score(self) -> Tensor:
        """(B, P / world), the worker's share of the pool."""
        query_ids, query_mask, tokens = self._tokenised
        with computing(self.device, self.precision):
            queries_BQD = self.model.encode_queries(query_ids.to(self.device), query_mask.to(self.device))
        scores = torch.zeros(len(self.queries_B), len(self.mine), device=self.device)
        lengths = np.array([len(ids) for ids in tokens], np.int32)
        budget = CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS  # training holds most of the GPU's memory
        for batch in token_budget_batches(lengths, budget):
            ids, mask = self.model.tokenizer.pad([tokens[i] for i in batch])
            with computing(self.device, self.precision):
                rows, keep = self.model.encode_passages(ids.to(self.device), mask.to(self.device))
            columns = torch.from_numpy(batch.astype(np.int64)).to(self.device)
            scores[:, columns] = maxsim(queries_BQD, rows, keep, similarity=self.similarity)
        return scores


def top_of_rows(scores_BS: Tensor, count: int) -> Int64Array:
    """`count` columns, ascending: every row's first, then every row's second, and so on."""
    order_BS = np.argsort(-scores_BS.numpy(), axis=1, kind="stable")
    by_rank = order_BS.T.reshape(-1)
    found = np.unique(by_rank, return_index=True)[1]
    return np.sort(by_rank[np.sort(found)[:count]]).astype(np.int64)


def mean_reciprocal_rank(scores_BP: npt.NDArray[np.float32], relevant_BP: npt.NDArray[np.bool_]) -> float:
    """Mean over rows of 1 / rank of the first relevant column, 0 beyond rank 10; ties go to the left."""
    order_BP = np.argsort(-scores_BP, axis=1, kind="stable")
    hits_BK = np.take_along_axis(relevant_BP, order_BP, 1)[:, :CUTOFF]
    rank_B = hits_BK.argmax(1) + 1
    return float(np.where(hits_BK.any(1), 1 / rank_B, 0.0).mean())
