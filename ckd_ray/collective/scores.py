"""The teacher's score: its own MaxSim, plus that of the expansion (method.md, step 5).

Shapes: B queries, Q rows, E = M * e expansion embeddings (e for each of M depths of feedback), N passages, L rows a
passage, D dimensions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ckd_ray.arrays import IntArray
from ckd_ray.model.maxsim import maxsim, maxsim_unpadded


def expansion_weights(
    idf_BE: Tensor, query_rows_B: Tensor, *, beta: float | Literal["auto"] = 1.0, share: float = 0.3, depths: int = 1
) -> Tensor:
    """The weight of each expansion embedding, (B, E). The query's own rows weigh 1 each.

    A number for `beta` gives beta * idf (method.md, step 4), whose sum depends on the size of the collection.
    `auto` scales the idf so that their sum is share / (1 - share) * Q. The expansion then holds `share` of the total
    weight of the teacher's score, on any collection and for any length of the query and the expansion. A query without
    an expansion (idf 0 everywhere) keeps weights of 0.

    With several depths of feedback, each depth's weights are computed separately and divided by the number of depths:
    the teacher's score takes the mean of the depths' expansion scores. A depth without an expansion adds 0.

    Args:
        idf_BE: 0 where an embedding is missing.
        query_rows_B: Q, the rows of each query that count.
        share: 0 <= share < 1.
        depths: M.

    Raises:
        ValueError: E is not a multiple of `depths`.
    """
    num_queries, size = idf_BE.shape
    if depths < 1 or size % depths:
        raise ValueError(f"{size} expansion embeddings are not {depths} blocks of equal size")
    if beta != "auto":
        return beta * idf_BE / depths
    idf_BMe = idf_BE.reshape(num_queries, depths, size // depths)
    total_BM1 = idf_BMe.sum(2, keepdim=True)
    wanted_B11 = share / (1 - share) * query_rows_B.to(idf_BE.dtype)[:, None, None] / depths
    weights_BMe = torch.where(total_BM1 > 0, wanted_B11 * idf_BMe / total_BM1.clamp_min(1e-12), 0.0)
    return weights_BMe.reshape(num_queries, size)


@torch.no_grad()
def teacher_scores(
    queries_BQD: Tensor,
    expansions_BED: Tensor,
    weights_BE: Tensor,
    passages_NLD: Tensor,
    passage_mask_NL: Tensor,
    similarity: Literal["l2", "cosine"] = "l2",
    *,
    zero_row_floor: bool = False,
) -> Tensor:
    """s_T(q, p) = MaxSim(Q, P) + sum_e w_e max_j sim(C_e, P_j), without a gradient.

    Expansion embeddings are query rows with a weight, so one pass over the passages computes both sums. Rows of weight
    0 (short feedback) add nothing; E may be 0.

    Returns:
        scores_BN, float32.
    """
    rows_BRD = torch.cat([queries_BQD.float(), expansions_BED.float()], 1)
    ones_BQ = weights_BE.new_ones(queries_BQD.shape[:2])
    weights_BR = torch.cat([ones_BQ, weights_BE], 1)
    return maxsim(rows_BRD, passages_NLD, passage_mask_NL, weights_BR, similarity, zero_row_floor=zero_row_floor)


@torch.no_grad()
def candidate_scores(
    queries_QD: Tensor,
    expansions_ED: Tensor,
    weights_E: Tensor,
    rows_TD: Tensor,
    lengths_N: IntArray,
    similarity: Literal["l2", "cosine"] = "l2",
    *,
    zero_row_floor: bool = False,
) -> Tensor:
    """`teacher_scores` of one query for its own candidates, whose rows lie one after another (`maxsim_unpadded`).

    Expansion embeddings of weight 0 are left out.

    Args:
        rows_TD: the rows of all N candidates, T = sum(lengths_N).

    Returns:
        scores_N, float32.
    """
    counting = weights_E != 0
    rows_RD = torch.cat([queries_QD.float(), expansions_ED[counting].float()])
    weights_R = torch.cat([weights_E.new_ones(len(queries_QD)), weights_E[counting]])
    return maxsim_unpadded(rows_RD, rows_TD, lengths_N, weights_R, similarity, zero_row_floor=zero_row_floor)
