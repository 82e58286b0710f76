"""The teacher's score: its own MaxSim, plus that of the expansion (docs/method.md, step 5).

Shapes: B queries, Q rows, E expansion embeddings, N passages, L rows a passage, D dimensions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ckd_ray.model.maxsim import maxsim


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

    Expansion embeddings are ordinary query rows with a weight, so both sums are one pass over the passages. Rows of
    weight 0 (short feedback) add nothing; E may be 0.

    Returns:
        scores_BN, float32.
    """
    rows_BRD = torch.cat([queries_BQD.float(), expansions_BED.float()], 1)
    ones_BQ = weights_BE.new_ones(queries_BQD.shape[:2])
    weights_BR = torch.cat([ones_BQ, weights_BE], 1)
    return maxsim(rows_BRD, passages_NLD, passage_mask_NL, weights_BR, similarity, zero_row_floor=zero_row_floor)
