"""One training step: encode, score all passages of the batch for all queries, objective, gradients.

Shapes: b queries and n passages of this worker, N passages of all workers, Q and L rows, D dimensions.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ckd_ray.collective import teacher_scores
from ckd_ray.distill.inputs import StepInputs
from ckd_ray.distill.objectives import objective_loss
from ckd_ray.distill.task import TrainingTask
from ckd_ray.embed.encoder import Precision, computing
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.maxsim import maxsim


class _GatherRows(torch.autograd.Function):
    """All workers' rows, in rank order; the backward pass sums every worker's gradient of our rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def gather_passages(passages_nLD: Tensor, keep_nL: Tensor) -> tuple[Tensor, Tensor]:
    """Passages of all workers, with gradients: (N, L', D) and their mask (N, L').

    Workers may hold different n and L; both are padded for the exchange and cut again.
    """
    sizes = torch.tensor(passages_nLD.shape[:2], device=passages_nLD.device)
    all_sizes = [torch.empty_like(sizes) for _ in range(dist.get_world_size())]
    dist.all_gather(all_sizes, sizes)
    counts = [int(s[0]) for s in all_sizes]
    rows, width = max(counts), max(int(s[1]) for s in all_sizes)
    n, length, _ = passages_nLD.shape
    padded = nn.functional.pad(passages_nLD, (0, 0, 0, width - length, 0, rows - n))
    mask = nn.functional.pad(keep_nL, (0, width - length, 0, rows - n)).to(torch.uint8)
    masks = [torch.empty_like(mask) for _ in counts]
    dist.all_gather(masks, mask)
    gathered = _GatherRows.apply(padded)
    passages = torch.cat([gathered[r, :c] for r, c in enumerate(counts)])
    return passages, torch.cat([m[:c].bool() for m, c in zip(masks, counts, strict=True)])


def _settings(model: nn.Module) -> ColBERTSettings:
    """Of a ColBERT, or of one inside DDP."""
    inner = getattr(model, "module", model)
    assert isinstance(inner, ColBERT)
    return inner.settings


class TrainingStep:
    """Computes the loss and leaves gradients in the model's parameters.

    Args:
        model: `ColBERT`, or the same wrapped in DDP.
        world: number of workers; the batch's loss is the mean over all their queries.
    """

    def __init__(self, model: nn.Module, task: TrainingTask, precision: Precision, world: int = 1) -> None:
        self.model, self.task, self.precision, self.world = model, task, precision, world
        self.similarity = _settings(model).similarity

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Backward pass included. Returns this worker's share of the loss: the sum over workers is the batch's loss."""
        if self.task.accumulate > 1:
            return self._cached(inputs)
        queries, passages, keep = self._encode(inputs, slice(None), slice(None))
        loss = self._loss(inputs, queries, passages, keep)
        self._backward(loss)
        return loss.detach()

    def _encode(self, inputs: StepInputs, rows: slice, passage_rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        with computing(inputs.query_ids_bQ.device, self.precision):
            return self.model(
                inputs.query_ids_bQ[rows],
                inputs.query_mask_bQ[rows],
                inputs.passage_ids_nL[passage_rows],
                inputs.passage_mask_nL[passage_rows],
            )

    def _backward(self, loss: Tensor) -> None:
        # DDP averages gradients over workers, while the batch's loss is the sum of the workers' shares.
        (loss * self.world).backward()

    def _loss(self, inputs: StepInputs, queries_bQD: Tensor, passages_nLD: Tensor, keep_nL: Tensor) -> Tensor:
        if self.world > 1:
            passages_nLD, keep_nL = gather_passages(passages_nLD, keep_nL)
        task = self.task
        student_bN = maxsim(
            queries_bQD, passages_nLD, keep_nL, similarity=self.similarity, zero_row_floor=task.zero_row_floor
        )
        teacher_bN = inputs.scores_bN
        if inputs.teacher is not None:
            t = inputs.teacher
            with torch.no_grad():
                teacher_bN = teacher_scores(
                    t.queries_bQD,
                    t.expansions_bED,
                    t.weights_bE,
                    t.passages_NLD,
                    t.mask_NL,
                    similarity=self.similarity,
                    zero_row_floor=task.zero_row_floor,
                )
        rows_b = objective_loss(
            task.objective,
            student_bN,
            positives_B=inputs.positives_b,
            teacher_scores_BN=teacher_bN,
            valid_BN=inputs.valid_bN,
            temperature=task.temperature,
            smoothing=task.smoothing,
        )
        return rows_b.sum() / task.batch_size

    def _cached(self, inputs: StepInputs) -> Tensor:
        """Cached gradients (GradCache, Gao et al. 2021): memory of one part, loss of the whole batch.

        Embeddings are computed part by part without a graph, the loss gives their gradients, and each part is encoded
        once more to carry these into the weights. Exact only without dropout, which the configuration checks.
        """
        parts = list(self._parts(inputs))
        with torch.no_grad():
            encoded = [self._encode(inputs, q, p) for q, p in parts]
        queries = torch.cat([e[0] for e in encoded]).requires_grad_()
        passages = torch.cat([e[1] for e in encoded]).requires_grad_()
        loss = self._loss(inputs, queries, passages, torch.cat([e[2] for e in encoded]))
        self._backward(loss)
        assert queries.grad is not None and passages.grad is not None
        for i, (q, p) in enumerate(parts):
            last = i == len(parts) - 1
            quiet = getattr(self.model, "no_sync", nullcontext) if not last else nullcontext
            with quiet():
                part_queries, part_passages, _ = self._encode(inputs, q, p)
                surrogate = (part_queries * queries.grad[q]).sum() + (part_passages * passages.grad[p]).sum()
                surrogate.backward()
        return loss.detach()

    def _parts(self, inputs: StepInputs) -> list[tuple[slice, slice]]:
        b = len(inputs.query_ids_bQ)
        per_query = len(inputs.passage_ids_nL) // max(1, b)
        size = -(-b // self.task.accumulate)
        starts = range(0, b, max(1, size))
        return [(slice(s, s + size), slice(s * per_query, (s + size) * per_query)) for s in starts]
