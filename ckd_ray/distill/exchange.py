"""The exchange between workers in a step: queries before scoring, scores after it.

A worker scores its own passages for the queries of all workers. Query rows have a tenth of the bytes of passage rows,
and no worker holds the passages of another. Shapes: b queries and n passages of a worker, B and N of all workers,
Q rows, D dimensions, K matrices of scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def gather_queries(rows_bQD: Tensor, counts: Sequence[int]) -> Tensor:
    """(B, Q, D): the rows of all workers in rank order. The backward pass sums the workers' gradients of our rows.

    Args:
        counts: b of every worker.
    """
    gathered: Tensor = _GatherQueries.apply(rows_bQD, list(counts))
    return gathered


def gather_scores(scores_KBn: Tensor, counts: Sequence[int]) -> Tensor:
    """(K, B, N): the columns of all workers in rank order.

    Every worker then computes the same loss from the same matrix. So the gradient of our columns is complete on this
    worker, and the backward pass exchanges nothing.

    Args:
        counts: n of every worker.
    """
    padded = F.pad(scores_KBn.detach(), (0, max(counts) - scores_KBn.shape[2]))
    parts = [part[..., :count] for part, count in zip(_all(padded), counts, strict=True)]
    parts[dist.get_rank()] = scores_KBn
    return torch.cat(parts, 2)


def _all(mine: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine.contiguous())
    return parts


class _GatherQueries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_bQD: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = F.pad(rows_bQD, (0, 0, 0, 0, 0, max(counts) - len(rows_bQD)))
        return torch.cat([part[:count] for part, count in zip(_all(padded), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad_BQD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad_BQD.contiguous().clone()
        dist.all_reduce(total)
        rank, counts = dist.get_rank(), ctx.counts
        first = sum(counts[:rank])
        return total[first : first + counts[rank]], None
