"""Steps a second against the published step, written out: padding to the full length, a teacher that runs in every
step, and MaxSim by the differences of all token pairs.

Shapes: B queries, Q rows, N = 2B passages, L = doc_maxlen rows, E expansion rows, D dimensions.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from common import figure, note
from distill_run import DistillRun, median, seconds_a_step
from torch import Tensor

from ckd_ray.distill.inputs import InputReader, StepInputs
from ckd_ray.distill.step import TrainingStep
from ckd_ray.distill.task import TrainingTask
from ckd_ray.model import ColBERT


def steps_vs_literal(run: DistillRun, args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The lower of the ratios at batch 8 and batch 32 (`--quick`: at batch 8)."""
    ratios: dict[int, float] = {}
    shown: dict[str, Any] = {"value": "the lowest of all batches"}
    for batch, steps in ((8, 2),) if args.quick else ((8, 4), (32, 2)):
        task = run.task("collective", batch)
        ours = seconds_a_step(run, task, 1, max(3, steps), run.model())
        published = LiteralStep(run, task)
        agreement = _agreement(run, published)
        literal = published.seconds(1, steps)
        ours += seconds_a_step(run, task, 1, max(3, steps), run.model())
        ratios[batch] = median(literal) / median(ours)
        shown[f"batch_{batch}"] = {
            "ours_seconds": round(median(ours), 4),
            "literal_seconds": round(median(literal), 4),
            "ratio": round(ratios[batch], 3),
            "loss_differs_by": agreement,
            "steps": [len(ours), len(literal)],
        }
        note(f"  batch {batch}: {shown[f'batch_{batch}']}")
    settings["literal"] = shown
    return {"steps_vs_literal": figure(min(ratios.values()), 3, "higher")}


def _agreement(run: DistillRun, published: LiteralStep) -> float:
    """Both losses of one batch, ours with the published zero rows: they must be the same step."""
    task = run.task("collective", published.task.settings.batch_size, zero_row_floor=True)
    inputs = published.reader.read(0)
    ours = float(TrainingStep(run.model(), task, "fp32")(inputs))
    return abs(ours - published(inputs))


class LiteralStep:
    """The published step on the batches of `task`.

    The differences of all queries are held at once, as published, where they take at most 1 GiB (batch 8). At batch 32
    they would not fit this machine's memory, so there the literal version is kinder than the original: each row of
    scores is taken back to the passages' embeddings as soon as its loss is known. That is the same arithmetic, with no
    recomputation.
    """

    def __init__(self, run: DistillRun, task: TrainingTask) -> None:
        self.task, self.student, self.teacher = task, run.model(), run.model()
        assert task.distillation is not None
        self.settings = task.distillation
        self.student.train()
        self.maxlen = self.student.settings.doc_maxlen
        self.reader = InputReader(task, self.student.tokenizer)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=task.settings.learning_rate)

    def seconds(self, first: int, count: int) -> list[float]:
        """Of each step; reading the batch is left out."""
        out = []
        for step in range(first, first + count):
            inputs = self.reader.read(step)
            started = time.perf_counter()
            self(inputs)
            out.append(time.perf_counter() - started)
        return out

    def __call__(self, inputs: StepInputs) -> float:
        # Our groups of like length, padded to the full length and put back in the batch's order.
        order = inputs.columns_n.argsort()
        groups = inputs.parts[0].groups
        ids_NL, mask_NL = (torch.cat([self._full_length(group[i]) for group in groups])[order] for i in (0, 1))
        assert inputs.teacher is not None
        with torch.no_grad():
            teacher_rows, teacher_NLD = self._encode(self.teacher, inputs, ids_NL, mask_NL)
            rows_BRD = torch.cat([teacher_rows, inputs.teacher.expansions_bED], 1)
            # The published strength of the expansion is 1.
            weights_BR = torch.cat([torch.ones(teacher_rows.shape[:2]), inputs.teacher.idf_bE], 1)
            target_BN = self._scores(rows_BRD, teacher_NLD, weights_BR)
            target_BN.scatter_(1, inputs.positives_B[:, None], target_BN.amax(1, keepdim=True))
            target_BN = (target_BN / self.settings.temperature).softmax(1)
        queries_BQD, passages_NLD = self._encode(self.student, inputs, ids_NL, mask_NL)
        leaf_q, leaf_p = queries_BQD.detach().requires_grad_(), passages_NLD.detach().requires_grad_()
        loss = 0.0
        step = len(leaf_q) if self._fits(leaf_q, leaf_p) else 1
        for queries, targets in zip(leaf_q.split(step), target_BN.split(step), strict=True):
            scores = _maxsim(queries, leaf_p, None)
            part = torch.nn.functional.kl_div(scores.log_softmax(1), targets, reduction="sum") / len(leaf_q)
            part.backward()
            loss += float(part.detach())
        self.optimizer.zero_grad()
        torch.autograd.backward([queries_BQD, passages_NLD], [leaf_q.grad, leaf_p.grad])
        self.optimizer.step()
        return loss

    @staticmethod
    def _fits(rows_BRD: Tensor, passages_NLD: Tensor) -> bool:
        return rows_BRD[:, :, 0].numel() * passages_NLD.numel() * 4 <= 2**30

    def _scores(self, rows_BRD: Tensor, passages_NLD: Tensor, weights_BR: Tensor) -> Tensor:
        step = len(rows_BRD) if self._fits(rows_BRD, passages_NLD) else 1
        parts = zip(rows_BRD.split(step), weights_BR.split(step), strict=True)
        return torch.cat([_maxsim(rows, passages_NLD, weights) for rows, weights in parts])

    def _full_length(self, ids_NL: Tensor) -> Tensor:
        return torch.nn.functional.pad(ids_NL, (0, self.maxlen - ids_NL.shape[1]))

    def _encode(self, model: ColBERT, inputs: StepInputs, ids_NL: Tensor, mask_NL: Tensor) -> tuple[Tensor, Tensor]:
        part = inputs.parts[0]
        queries_BQD = model.encode_queries(part.query_ids_bQ, part.query_mask_bQ)
        passages_NLD, keep_NL = model.encode_passages(ids_NL, mask_NL)
        return queries_BQD, passages_NLD * keep_NL[:, :, None]  # dropped rows stay as zeros


def _maxsim(queries_BQD: Tensor, passages_NLD: Tensor, weights_BQ: Tensor | None) -> Tensor:
    differences_BNQLD = queries_BQD[:, None, :, None] - passages_NLD[None, :, None]
    best_BNQ = (-differences_BNQLD.pow(2).sum(-1)).amax(-1)
    return best_BNQ.sum(-1) if weights_BQ is None else (best_BNQ * weights_BQ[:, None]).sum(-1)
