"""How much each scorer weighs in the teacher's score: a conditional logit over the labels.

The probability that candidate k of a query is the labelled one is softmax_k(sum_f w_f x_kf), with one feature a scorer.
The weights that maximise the likelihood of the labels say what a scorer adds to the others on this collection: a scorer
that finds nothing new gets 0, whatever the range of its scores (McFadden, 1973). Shapes: B queries, K candidates,
F scorers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckd_ray.arrays import BoolArray, Float64Array, Int64Array
from ckd_ray.files import join, read_json

# The file of the weights, and the split whose queries they are fitted to.
WEIGHTS, SPLIT = "weights.json", "train"
_STEPS, _RIDGE, _CONVERGED = 50, 1e-6, 1e-9


@dataclass(frozen=True)
class ScorerWeight:
    """What is known of a scorer.

    Attributes:
        fitted: its weight beside a weight of 1 for the teacher's MaxSim, in units of MaxSim a unit of its score.
        spread: mean over the queries of the standard deviation of its scores over a query's candidates.
    """

    fitted: float
    spread: float


def fit_weights(features_BKF: Float64Array, label_B: Int64Array, valid_BK: BoolArray) -> Float64Array:
    """The weights w_F >= 0 of the highest likelihood, by Newton's method. A scorer whose weight would be negative is
    taken out, and the others are fitted again.

    Args:
        features_BKF: finite where valid.
        label_B: the column of each query's labelled candidate, which is valid.
        valid_BK: which candidates count.
    """
    weights_F = np.zeros(features_BKF.shape[2])
    kept = np.flatnonzero(spreads(features_BKF, valid_BK) > 0)
    while len(kept) and len(label_B):
        found = _newton(features_BKF[:, :, kept], label_B, valid_BK)
        if (found >= 0).all():
            weights_F[kept] = found
            break
        kept = kept[found > 0]
    return weights_F


def spreads(features_BKF: Float64Array, valid_BK: BoolArray) -> Float64Array:
    """(F,): the mean over queries with two candidates or more of the standard deviation over their candidates."""
    counts_B1 = valid_BK.sum(1, keepdims=True)
    rows = counts_B1[:, 0] > 1
    if not rows.any():
        return np.zeros(features_BKF.shape[2])
    valid_BK1, counts_B1 = valid_BK[rows][:, :, None], counts_B1[rows]
    x_BKF = np.where(valid_BK1, features_BKF[rows], 0.0)
    mean_B1F = x_BKF.sum(1, keepdims=True) / counts_B1[:, :, None]
    square_BF = (np.where(valid_BK1, x_BKF - mean_B1F, 0.0) ** 2).sum(1) / (counts_B1 - 1)
    found: Float64Array = np.sqrt(square_BF).mean(0)
    return found


def _newton(features_BKF: Float64Array, label_B: Int64Array, valid_BK: BoolArray) -> Float64Array:
    scale_F = spreads(features_BKF, valid_BK)
    x_BKF = np.where(valid_BK[:, :, None], features_BKF / scale_F, 0.0)
    own_BF = x_BKF[np.arange(len(label_B)), label_B]
    weights_F = np.zeros(len(scale_F))
    value, p_BK = _likelihood(x_BKF, own_BF, valid_BK, weights_F)
    for _ in range(_STEPS):
        mean_BF = np.einsum("bk,bkf->bf", p_BK, x_BKF)
        gradient_F = (own_BF - mean_BF).sum(0)
        second_FF = np.einsum("bk,bkf,bkg->fg", p_BK, x_BKF, x_BKF) - np.einsum("bf,bg->fg", mean_BF, mean_BF)
        step_F = np.linalg.solve(second_FF + _RIDGE * len(label_B) * np.eye(len(scale_F)), gradient_F)
        length = 1.0
        better, next_BK = _likelihood(x_BKF, own_BF, valid_BK, weights_F + step_F)
        # The likelihood is concave; half a step is enough where a whole one would pass its top.
        while better < value and length > 1e-4:
            length /= 2
            better, next_BK = _likelihood(x_BKF, own_BF, valid_BK, weights_F + length * step_F)
        if better <= value + _CONVERGED * len(label_B):
            break
        weights_F, value, p_BK = weights_F + length * step_F, better, next_BK
    found: Float64Array = weights_F / scale_F
    return found


def _likelihood(
    x_BKF: Float64Array, own_BF: Float64Array, valid_BK: BoolArray, weights_F: Float64Array
) -> tuple[float, Float64Array]:
    """(log-likelihood of the labels, probabilities_BK)."""
    scores_BK = np.where(valid_BK, x_BKF @ weights_F, -np.inf)
    highest_B1 = scores_BK.max(1, keepdims=True)
    e_BK = np.exp(scores_BK - highest_B1)
    total_B1 = e_BK.sum(1, keepdims=True)
    own_B = own_BF @ weights_F
    return float((own_B - highest_B1[:, 0] - np.log(total_B1[:, 0])).sum()), e_BK / total_B1


def factor(scorer: ScorerWeight, share: float | str, shares: float, teacher_spread: float, expansion: float) -> float:
    """What a scorer's score is multiplied by before it is added to the teacher's.

    Args:
        share: `auto` takes the fitted weight; a number is the scorer's share of the spread of the teacher's score.
        shares: the sum of the shares that are numbers.
        teacher_spread: of the teacher's MaxSim.
        expansion: by how much the expansion widens the teacher's score, 1 / (1 - `expansion_share`).
    """
    if share == "auto":
        return scorer.fitted * expansion
    if not scorer.spread:
        return 0.0
    return float(share) / (1 - shares) * teacher_spread / scorer.spread * expansion


def read_weights(folder: str) -> tuple[dict[str, ScorerWeight], float]:
    """The weights that an ensemble stage has written, by scorer, and the spread of the teacher's MaxSim."""
    record = read_json(join(folder, WEIGHTS))
    return {name: ScorerWeight(**weight) for name, weight in record["scorers"].items()}, record["teacher_spread"]
