"""One training step: encode, score all passages of the batch for all queries, objective, gradients.

Shapes: b queries and n passages of this worker, B and N of all workers, g passages of a group, Q and L rows,
D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ckd_ray.collective.losses import BatchScores, LossRows, contrastive
from ckd_ray.collective.scores import expansion_weights, teacher_scores
from ckd_ray.distill.exchange import gather_queries, gather_scores
from ckd_ray.distill.inputs import Part, StepInputs, worker_slice
from ckd_ray.distill.memory import return_freed_memory
from ckd_ray.distill.task import TrainingTask
from ckd_ray.distill.teacher import Rows
from ckd_ray.model import ColBERT
from ckd_ray.model.encoder import Precision, computing
from ckd_ray.model.maxsim import counted_rows, maxsim
from ckd_ray.model.packed import can_pack, encode_packed

Encoded = tuple[Tensor, list[Rows]]


class BatchEncoder(nn.Module):
    """Encodes queries and groups of passages in one forward call, as DDP requires."""

    def __init__(self, model: ColBERT) -> None:
        super().__init__()
        self.colbert = model

    def forward(self, query_ids_bQ: Tensor, query_mask_bQ: Tensor, groups: list[Rows]) -> Encoded:
        """(queries_bQD, [(rows_gLD, keep_gL) of each group])."""
        if can_pack(self.colbert):
            return encode_packed(self.colbert, query_ids_bQ, query_mask_bQ, groups)
        queries_bQD = self.colbert.encode_queries(query_ids_bQ, query_mask_bQ)
        return queries_bQD, [self.colbert.encode_passages(ids, mask) for ids, mask in groups]


class TrainingStep:
    """Computes the loss and leaves gradients in the model's parameters.

    Args:
        model: a `ColBERT`, or a `BatchEncoder` inside DDP.
        world: the number of workers. The loss of the batch is the mean over the queries of all workers.
        rank: of this worker.
        teacher: the frozen encoder, when the step computes its rows.
        scale: divides the scores before the softmax (`ckd_ray.distill.scale`).

    Attributes:
        rows: the loss and its figures for each query of the last step, without gradients; for this worker's queries
            only when negatives are not shared.
    """

    def __init__(
        self,
        model: nn.Module,
        task: TrainingTask,
        precision: Precision,
        world: int = 1,
        rank: int = 0,
        teacher: ColBERT | None = None,
        scale: float = 1.0,
    ) -> None:
        self.scale = scale
        self.rows: LossRows | None = None
        self.encoder = BatchEncoder(model) if isinstance(model, ColBERT) else model
        inner: Any = getattr(self.encoder, "module", self.encoder)
        self.bare: BatchEncoder = inner
        self.task, self.precision, self.world, self.rank = task, precision, world, rank
        self.frozen = None if teacher is None else BatchEncoder(teacher.eval())
        self.similarity = self.bare.colbert.settings.similarity
        self.shares = world > 1 and task.settings.share_negatives
        spans = [worker_slice(task.settings.batch_size, r, world) for r in range(world)]
        self.counts = [span.stop - span.start for span in spans]
        # The largest slice decides, so that all workers take the same path. A worker with a single query has one part
        # where others have more, and the two paths run their collective operations in different orders.
        self.in_parts = task.settings.accumulate > 1 and max(self.counts) > 1

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Forward and backward pass. Returns the loss of the whole batch, the same on every worker.

        Raises:
            FloatingPointError: the loss is not finite. Raised on every worker, before gradients are exchanged.
        """
        if self.in_parts:
            return self._cached(inputs)
        queries_bQD, groups = self._encode(inputs, 0, self.encoder)
        loss, total = self._agreed(lambda: self._loss(inputs, queries_bQD, groups))
        self._backward(loss)
        return total

    def _encode(self, inputs: StepInputs, part: int, encoder: nn.Module) -> Encoded:
        if self.task.dropout:
            # The step determines the masks, so neither a restart nor the second encoding of a part changes them.
            state = np.random.SeedSequence([self.task.seed, inputs.step, self.rank, part]).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0] >> 1))
        return self._run(encoder, inputs.parts[part])

    def _run(self, encoder: nn.Module, part: Part) -> Encoded:
        with computing(part.query_ids_bQ.device, self.precision):
            encoded: Encoded = encoder(part.query_ids_bQ, part.query_mask_bQ, part.groups)
        return encoded

    def _backward(self, loss: Tensor) -> None:
        # A worker has either the whole loss, and computes the part of its gradient that flows through its own texts,
        # or its share of the loss. Both add up to the batch's gradient, which DDP divides by the number of workers.
        (loss * self.world).backward()

    def _agreed(self, compute: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """(loss with its graph, loss of the batch). When negatives are not shared, a single worker may have a NaN; the
        others must know before they wait for its gradients."""
        if self.world == 1 or self.shares:
            loss = compute()
            return loss, loss.detach()
        cause = "another worker's part of the batch has no finite loss"
        try:
            loss = compute()
            total = loss.detach().clone()
        except FloatingPointError as error:
            cause = str(error)
            loss = total = torch.full((), torch.nan, device=self.bare.colbert.device)
        dist.all_reduce(total)
        if not bool(torch.isfinite(total)):
            raise FloatingPointError(cause)
        return loss, total

    def _loss(self, inputs: StepInputs, queries_bQD: Tensor, groups: list[Rows]) -> Tensor:
        """The mean over the batch's queries; this worker's share of it when negatives are not shared."""
        task = self.task
        queries_BQD = gather_queries(queries_bQD, self.counts) if self.shares else queries_bQD
        found = [maxsim(queries_BQD, *rows, similarity=self.similarity, zero_row_floor=task.zero_row_floor)
                 for rows in groups]  # fmt: skip
        scores_KBn = [self._columns(found, inputs)]
        if inputs.teacher is not None:
            scores_KBn.append(self._columns(self._teacher_scores(inputs), inputs))
        scores_KBN = torch.stack(scores_KBn)
        if self.shares:
            passages = 1 + task.settings.negatives
            scores_KBN = gather_scores(scores_KBN, [passages * count for count in self.counts])
        teacher_BN = scores_KBN[1].detach() if inputs.teacher is not None else inputs.scores_BN
        if teacher_BN is not None and inputs.ensemble_BN is not None:
            teacher_BN = teacher_BN + inputs.ensemble_BN
        scores = BatchScores(
            student_BN=scores_KBN[0],
            positives_B=inputs.positives_B,
            valid_BN=inputs.valid_BN,
            list_size=1 + task.settings.negatives,
            teacher_BN=teacher_BN,
            scored_BN=inputs.scored_BN,
        )
        if task.distillation is None:
            rows = contrastive(scores, scale=self.scale)
        else:
            rows = task.objective.loss(scores, task.distillation, self.scale)
        self.rows = LossRows(*(values.detach() for values in vars(rows).values()))
        return rows.loss_B.sum() / task.settings.batch_size

    @staticmethod
    def _columns(found: list[Tensor], inputs: StepInputs) -> Tensor:
        """The scores of all groups, columns in the order of the worker's passages."""
        return torch.cat(found, 1)[:, inputs.columns_n.argsort()]

    @torch.no_grad()
    def _teacher_scores(self, inputs: StepInputs) -> list[Tensor]:
        """(B, g) of each group."""
        teacher = inputs.teacher
        assert teacher is not None
        queries_bQD, groups = teacher.queries_bQD, teacher.passages
        if self.frozen is not None:
            # float16 as in the store, for the same scores and half the memory.
            parts = [self._run(self.frozen, part) for part in inputs.parts]
            queries_bQD = torch.cat([queries for queries, _ in parts]).half()
            groups = [(rows.half(), keep) for _, found in parts for rows, keep in found]
        assert queries_bQD is not None and groups is not None
        rows_bRD = torch.cat([queries_bQD.float(), teacher.expansions_bED], 1)
        student = self.task.distillation
        assert student is not None
        weights_bE = expansion_weights(
            teacher.idf_bE,
            counted_rows(queries_bQD),
            beta=student.beta,
            share=student.expansion_share,
            depths=teacher.depths,
        )
        weights_bR1 = torch.cat([rows_bRD.new_ones(queries_bQD.shape[:2]), weights_bE], 1)[:, :, None]
        if self.shares:
            packed_BRX = gather_queries(torch.cat([rows_bRD, weights_bR1], 2), self.counts)
            rows_bRD, weights_bR1 = packed_BRX[:, :, :-1], packed_BRX[:, :, -1:]
        length = queries_bQD.shape[1]
        return [
            teacher_scores(
                rows_bRD[:, :length],
                rows_bRD[:, length:],
                weights_bR1[:, length:, 0],
                *rows,
                similarity=self.similarity,
                zero_row_floor=self.task.zero_row_floor,
            )
            for rows in groups
        ]

    def _cached(self, inputs: StepInputs) -> Tensor:
        """Cached gradients (GradCache, Gao et al. 2021): memory of one part, loss of the whole batch.

        The parts are encoded without a graph, and the loss gives the gradients of their embeddings. Then each part is
        encoded again, with the same dropout, to propagate these gradients to the weights.
        """
        count = len(inputs.parts)
        with torch.no_grad():
            encoded = []
            for i in range(count):
                encoded.append(self._encode(inputs, i, self.bare))
                return_freed_memory(self.bare.colbert.device)
        queries_bQD = torch.cat([queries for queries, _ in encoded]).requires_grad_()
        groups = [(rows.requires_grad_(), keep) for _, found in encoded for rows, keep in found]
        loss, total = self._agreed(lambda: self._loss(inputs, queries_bQD, groups))
        self._backward(loss)
        assert queries_bQD.grad is not None
        gradients = iter(groups)
        of_queries = iter(queries_bQD.grad.split([len(queries) for queries, _ in encoded]))
        for i in range(count):
            quiet = getattr(self.encoder, "no_sync", nullcontext) if i < count - 1 else nullcontext
            with quiet():
                queries, found = self._encode(inputs, i, self.encoder)
                surrogate = (queries * next(of_queries)).sum()
                for rows, _ in found:
                    gradient = next(gradients)[0].grad
                    assert gradient is not None
                    surrogate = surrogate + (rows * gradient).sum()
                surrogate.backward()
                del queries, found, surrogate
            return_freed_memory(self.bare.colbert.device)
        return total
