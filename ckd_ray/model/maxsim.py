"""MaxSim, the late interaction of ColBERT: every query row takes its best passage row.

Source: method.md, *Notation*: MaxSim(Q, P) = sum_i max_j sim(Q_i, P_j). Shapes: B queries, Q rows a query,
N passages, L rows a passage, D dimensions.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ckd_ray.arrays import IntArray

# Similarities of a block of passages, in numbers: memory does not grow with N, and on a CPU the maximum reads from the
# cache what the matrix product has just written.
_BLOCK = 1 << 21
_BLOCK_GPU = 1 << 25
# The similarity of a query row with a passage without rows: that of opposite unit rows, the least possible.
_EMPTY = {"l2": -4.0, "cosine": -1.0}


def maxsim(
    queries_BQD: Tensor,
    passages_NLD: Tensor,
    passage_mask_NL: Tensor,
    weights_BQ: Tensor | None = None,
    similarity: Literal["l2", "cosine"] = "l2",
    *,
    zero_row_floor: bool = False,
) -> Tensor:
    """Scores of all passages for all queries: sum_i w_i max_j sim(Q_i, P_j).

    Computed as 2 <a, b> - |a|^2 - |b|^2 by matrix products; only the winning row of every maximum is kept for the
    backward pass.

    Args:
        queries_BQD: any float type; half types are computed in float32. Rows need not be unit.
        passages_NLD: the same D.
        passage_mask_NL: bool or 0/1. Rows where it is False never win. A passage without rows gives -4 (l2) or -1
            (cosine) a query row, the similarity of opposite unit rows, so that it ranks below every other.
        weights_BQ: a factor for each query row; ones when None. Rows of weight 0 add nothing.
        similarity: `l2`: -|a - b|^2. `cosine`: <a, b> / (|a| |b|), also for rows that are not unit; a zero row has
            cosine 0.
        zero_row_floor: add a zero row to every passage, as padding does in the published training score: no
            maximum falls below -|a|^2 (l2) or 0 (cosine).

    Returns:
        scores_BN, float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit, or the similarity is unknown.
    """
    _check(queries_BQD, passages_NLD, passage_mask_NL, weights_BQ, similarity)
    # Autocast would take the products, and the sum over query rows, back to half precision.
    with torch.autocast(queries_BQD.device.type, enabled=False):
        return _scores(queries_BQD, passages_NLD, passage_mask_NL.bool(), weights_BQ, similarity, zero_row_floor)


def _scores(
    queries_BQD: Tensor,
    passages_NLD: Tensor,
    mask_NL: Tensor,
    weights_BQ: Tensor | None,
    similarity: str,
    zero_row_floor: bool,
) -> Tensor:
    dtype = torch.float64 if torch.float64 in (queries_BQD.dtype, passages_NLD.dtype) else torch.float32
    # Masked rows are cleared: a NaN in them would survive a bias of -inf.
    a_BQD, b_NLD = queries_BQD.to(dtype), passages_NLD.to(dtype).masked_fill(~mask_NL[:, :, None], 0.0)
    if similarity == "cosine":
        a_BQD, b_NLD = F.normalize(a_BQD, dim=-1), F.normalize(b_NLD, dim=-1)
        bias_NL = b_NLD.new_zeros(mask_NL.shape)
    else:
        bias_NL = b_NLD.square().sum(-1) / -2
    # <a, b> - |b|^2 / 2 has its maximum where -|a - b|^2 has it, and is 0 for a zero row.
    best_BQN = _BestRow.apply(a_BQD, b_NLD, bias_NL.masked_fill(~mask_NL, -torch.inf))
    similarity_BQN = _similarities(best_BQN, a_BQD, ~mask_NL.any(-1), similarity, zero_row_floor)
    if weights_BQ is None:
        return similarity_BQN.sum(1)
    return torch.einsum("bqn,bq->bn", similarity_BQN, weights_BQ.to(dtype))


def maxsim_unpadded(
    queries_QD: Tensor,
    rows_TD: Tensor,
    lengths_N: IntArray,
    weights_Q: Tensor,
    similarity: Literal["l2", "cosine"] = "l2",
    *,
    zero_row_floor: bool = False,
) -> Tensor:
    """`maxsim` of one query with N passages whose rows lie one after another: one product, then the maximum of each
    stretch. On the CPU, without a gradient.

    Args:
        rows_TD: T = sum(lengths_N).

    Returns:
        scores_N, float32.
    """
    a_QD, b_TD = queries_QD.float(), rows_TD.float()
    if similarity == "cosine":
        a_QD, b_TD = F.normalize(a_QD, dim=-1), F.normalize(b_TD, dim=-1)
        products_QT = a_QD @ b_TD.T
    else:
        products_QT = torch.addmm(b_TD.square().sum(-1) / -2, a_QD, b_TD.T)
    filled_N = np.asarray(lengths_N) > 0
    best_QN = torch.zeros(len(a_QD), len(filled_N))
    if filled_N.any():
        starts = (np.cumsum(lengths_N) - lengths_N)[filled_N]
        found = np.maximum.reduceat(products_QT.numpy(), starts, axis=1)
        best_QN[:, torch.from_numpy(filled_N)] = torch.from_numpy(found)
    empty_N = torch.from_numpy(~filled_N)
    return weights_Q.float() @ _similarities(best_QN, a_QD, empty_N, similarity, zero_row_floor)


def _similarities(best: Tensor, queries: Tensor, empty_N: Tensor, similarity: str, zero_row_floor: bool) -> Tensor:
    """The greatest similarity of each query row with each passage, (..., Q, N), from the maxima of <a, b> - |b|^2 / 2
    (l2) or <a, b> (cosine)."""
    best = best.masked_fill(empty_N, 0.0)
    if zero_row_floor:
        best = best.clamp_min(0.0)
    if similarity == "l2":
        best = 2 * best - queries.square().sum(-1, keepdim=True)
    return best if zero_row_floor else best.masked_fill(empty_N, _EMPTY[similarity])


def counted_rows(queries_BQD: Tensor) -> Tensor:
    """The number of rows of each query that count, (B,). Models without query augmentation pad a query with zeros."""
    return (queries_BQD != 0).any(2).sum(1)


def _check(queries: Tensor, passages: Tensor, mask: Tensor, weights: Tensor | None, similarity: str) -> None:
    if similarity not in _EMPTY:
        raise ValueError(f"similarity: expected l2 or cosine, got {similarity!r}")
    if queries.ndim != 3 or passages.ndim != 3 or queries.shape[2] != passages.shape[2]:
        raise ValueError(
            "expected queries of shape (B, Q, D) and passages of shape (N, L, D), "
            f"got {tuple(queries.shape)} and {tuple(passages.shape)}"
        )
    if mask.shape != passages.shape[:2]:
        raise ValueError(f"expected a passage mask of shape {tuple(passages.shape[:2])}, got {tuple(mask.shape)}")
    if weights is not None and weights.shape != queries.shape[:2]:
        raise ValueError(f"expected weights of shape {tuple(queries.shape[:2])}, got {tuple(weights.shape)}")


class _BestRow(torch.autograd.Function):
    """max_j (<a_i, b_j> + bias_j) for every query row and passage; keeps the position of the maximum, not the block."""

    @staticmethod
    def forward(ctx: Any, a_BQD: Tensor, b_NLD: Tensor, bias_NL: Tensor) -> Tensor:
        num_queries, rows, dim = a_BQD.shape
        num_passages, length = bias_NL.shape
        a_RD = a_BQD.reshape(-1, dim)
        best_RN = a_RD.new_empty(len(a_RD), num_passages)
        tracked = any(ctx.needs_input_grad)  # frozen rows need the maximum alone, which is found faster
        where_RN = torch.empty(len(a_RD), num_passages if tracked else 0, dtype=torch.int64, device=a_RD.device)
        step = max(1, (_BLOCK_GPU if a_RD.is_cuda else _BLOCK) // max(1, len(a_RD) * length))
        for start in range(0, num_passages if length else 0, step):
            part = slice(start, start + step)
            block = torch.addmm(bias_NL[part].reshape(1, -1), a_RD, b_NLD[part].reshape(-1, dim).T)
            block_RNL = block.unflatten(1, (-1, length))
            if tracked:
                best_RN[:, part], where_RN[:, part] = block_RNL.max(-1)
            else:
                best_RN[:, part] = block_RNL.amax(-1)
        if not length:
            best_RN.fill_(-torch.inf)
            where_RN.zero_()
        ctx.save_for_backward(a_RD, b_NLD, where_RN, best_RN == -torch.inf)
        return best_RN.view(num_queries, rows, num_passages)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BQN: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        a_RD, b_NLD, where_RN, empty_RN = ctx.saved_tensors
        num_passages, length, dim = b_NLD.shape
        grad_RN = grad_BQN.reshape(len(a_RD), num_passages).masked_fill(empty_RN, 0.0)
        grad_a, grad_b = torch.zeros_like(a_RD), b_NLD.new_zeros(num_passages * length, dim)
        grad_bias = b_NLD.new_zeros(num_passages * length)
        flat_RN = where_RN + torch.arange(num_passages, device=where_RN.device) * length
        b_TD = b_NLD.reshape(-1, dim)
        if grad_RN.numel() and length:
            # Bags add their rows in one fixed order, also on a GPU, and hold no (R, N, D) block.
            if ctx.needs_input_grad[0]:
                grad_a = F.embedding_bag(flat_RN, b_TD, per_sample_weights=grad_RN, mode="sum")
            order = torch.argsort(flat_RN.reshape(-1), stable=True)
            chosen_T = torch.bincount(flat_RN.reshape(-1), minlength=len(b_TD))
            first_T, sorted_grad = chosen_T.cumsum(0) - chosen_T, grad_RN.reshape(-1)[order]
            row = torch.div(order, num_passages, rounding_mode="floor")
            if ctx.needs_input_grad[1]:
                grad_b = F.embedding_bag(row, a_RD, first_T, per_sample_weights=sorted_grad, mode="sum")
            if ctx.needs_input_grad[2]:
                one = a_RD.new_ones(1, 1)
                grad_bias = F.embedding_bag(
                    torch.zeros_like(row), one, first_T, per_sample_weights=sorted_grad, mode="sum"
                )[:, 0]
        return (
            grad_a.view(*grad_BQN.shape[:2], dim),
            grad_b.view_as(b_NLD),
            grad_bias.view(num_passages, length),
        )
