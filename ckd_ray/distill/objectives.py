"""The five objectives: each is a distribution over the passages of the batch, and one divergence from it.

loss of a row = KL(target || softmax(student)), where the target is

    contrastive        one-hot at the labelled positive                          (softmax cross-entropy)
    label_smoothing    (1 - e) one-hot + e / n, e = smoothing                    (uniform over the n valid passages)
    self_distillation  softmax(raise(s_T) / T), s_T the teacher without expansion
    cross_encoder      softmax(raise(s_T) / T), s_T another teacher's scores
    collective         softmax(raise(s_T) / T), s_T the teacher with its expansion (docs/method.md, step 5)

`raise` lifts the labelled positive to its row's maximum (docs/method.md step 6). T divides the teacher alone, there is
no T^2 factor. `smoothing` mixes a uniform part e / n into any of them. Shapes: B rows (queries), N columns (passages).
"""

from __future__ import annotations

import torch
from torch import Tensor

OBJECTIVES = ("contrastive", "label_smoothing", "self_distillation", "cross_encoder", "collective")
TEACHER_OBJECTIVES = ("self_distillation", "cross_encoder", "collective")


def raise_positives(teacher_scores_BN: Tensor, positives_B: Tensor, valid_BN: Tensor | None = None) -> Tensor:
    """Teacher scores with the labelled positive of each row at least as high as every (valid) other."""
    scores = teacher_scores_BN if valid_BN is None else teacher_scores_BN.masked_fill(~valid_BN, -torch.inf)
    return teacher_scores_BN.scatter(1, positives_B[:, None], scores.amax(1, keepdim=True))


def soft_labels(
    teacher_scores_BN: Tensor, positives_B: Tensor, temperature: float, valid_BN: Tensor | None = None
) -> Tensor:
    """softmax(raise(s_T) / T) over the valid passages; rows sum to one."""
    scores = raise_positives(teacher_scores_BN, positives_B, valid_BN) / temperature
    if valid_BN is not None:
        scores = scores.masked_fill(~valid_BN, -torch.inf)
    return scores.softmax(1)


def target_distribution(
    name: str,
    student_scores_BN: Tensor,
    *,
    positives_B: Tensor,
    teacher_scores_BN: Tensor | None = None,
    valid_BN: Tensor | None = None,
    temperature: float = 0.25,
    smoothing: float = 0.0,
) -> Tensor:
    """The target of objective `name`, (B, N), without a gradient. Arguments as in `objective_loss`."""
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; expected one of {', '.join(OBJECTIVES)}")
    if name in TEACHER_OBJECTIVES:
        if teacher_scores_BN is None:
            raise ValueError(f"objective {name} needs teacher scores")
        _check_finite("teacher", teacher_scores_BN, valid_BN)
        # In float64 a target becomes 0 only 745 below its row's maximum after the division by T.
        target = soft_labels(teacher_scores_BN.double(), positives_B, temperature, valid_BN)
        _check_underflow(target, valid_BN, temperature)
        target = target.to(student_scores_BN.dtype)
    else:
        target = torch.zeros_like(student_scores_BN).scatter_(1, positives_B[:, None], 1.0)
    if smoothing:
        valid = torch.ones_like(target) if valid_BN is None else valid_BN.to(target.dtype)
        target = (1 - smoothing) * target + smoothing * valid / valid.sum(1, keepdim=True)
    return target.detach()


def objective_loss(
    name: str,
    student_scores_BN: Tensor,
    *,
    positives_B: Tensor,
    teacher_scores_BN: Tensor | None = None,
    valid_BN: Tensor | None = None,
    temperature: float = 0.25,
    smoothing: float = 0.0,
) -> Tensor:
    """KL(target || softmax(student)) of every row; the formulas stand at the top of this module.

    Args:
        student_scores_BN: MaxSim scores, with gradient.
        positives_B: int64, the column of each row's labelled positive (always valid).
        teacher_scores_BN: for self_distillation, cross_encoder and collective.
        valid_BN: False takes a passage out of the row's softmax on both sides: another labelled positive of the query,
            or the same passage a second time.
        temperature: T > 0, divides the teacher's scores.
        smoothing: e in [0, 1).

    Returns:
        loss_B >= 0.

    Raises:
        ValueError: the objective is unknown or lacks its teacher.
        FloatingPointError: scores are not finite.
    """
    _check_arguments(student_scores_BN, positives_B, teacher_scores_BN, valid_BN, temperature, smoothing)
    _check_finite("student", student_scores_BN, valid_BN)
    target_BN = target_distribution(
        name,
        student_scores_BN,
        positives_B=positives_B,
        teacher_scores_BN=teacher_scores_BN,
        valid_BN=valid_BN,
        temperature=temperature,
        smoothing=smoothing,
    )
    scores = student_scores_BN if valid_BN is None else student_scores_BN.masked_fill(~valid_BN, -torch.inf)
    log_student_BN = scores.log_softmax(1)
    if valid_BN is not None:  # 0 * -inf has no place in the sum
        log_student_BN = log_student_BN.masked_fill(~valid_BN, 0.0)
    return (torch.xlogy(target_BN, target_BN) - target_BN * log_student_BN).sum(1)


def collective_loss(
    student_scores_BN: Tensor, teacher_scores_BN: Tensor, positives_B: Tensor, temperature: float
) -> Tensor:
    """mean over rows of KL(softmax(raise(s_T) / T) || softmax(s_S)): docs/method.md, step 6.

    Args:
        student_scores_BN: scores of all passages of the batch for all its queries, with gradient.
        teacher_scores_BN: `teacher_scores` of the same passages.
        positives_B: column of each row's labelled positive.
        temperature: T, on the teacher only; there is no T^2 factor.
    """
    return objective_loss(
        "collective",
        student_scores_BN,
        positives_B=positives_B,
        teacher_scores_BN=teacher_scores_BN,
        temperature=temperature,
    ).mean()


def _check_underflow(target_BN: Tensor, valid_BN: Tensor | None, temperature: float) -> None:
    """A confident row is no mistake; a batch in which every row is the bare label says nothing."""
    if target_BN.shape[1] < 2 or not len(target_BN):
        return
    alone_B = (target_BN > 0).sum(1) == 1
    if valid_BN is not None:
        alone_B = alone_B & (valid_BN.sum(1) > 1)
    if bool(alone_B.all()):
        raise FloatingPointError(
            "the teacher's distribution underflows to the label alone in every row: its scores lie more than "
            f"{745 * temperature:.4g} apart at temperature {temperature:g}; raise distill.temperature"
        )


def _check_arguments(
    student_BN: Tensor,
    positives_B: Tensor,
    teacher_BN: Tensor | None,
    valid_BN: Tensor | None,
    temperature: float,
    smoothing: float,
) -> None:
    if student_BN.ndim != 2:
        raise ValueError(f"student_scores_BN: expected (B, N), got {tuple(student_BN.shape)}")
    if positives_B.shape != student_BN.shape[:1]:
        raise ValueError(f"positives_B: expected ({len(student_BN)},), got {tuple(positives_B.shape)}")
    for name, other in (("teacher_scores_BN", teacher_BN), ("valid_BN", valid_BN)):
        if other is not None and other.shape != student_BN.shape:
            raise ValueError(f"{name}: expected {tuple(student_BN.shape)}, got {tuple(other.shape)}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected 0 <= smoothing < 1, got {smoothing}")
    if valid_BN is not None and not bool(valid_BN.gather(1, positives_B[:, None]).all()):
        raise ValueError("valid_BN: expected every row's labelled positive to be valid")


def _check_finite(who: str, scores_BN: Tensor, valid_BN: Tensor | None) -> None:
    bad = ~torch.isfinite(scores_BN)
    if valid_BN is not None:
        bad &= valid_BN
    if bad.any():
        row, column = (int(i) for i in bad.nonzero()[0])
        raise FloatingPointError(
            f"the {who}'s score of passage {column} for query {row} of the batch is {scores_BN[row, column].item()};"
            " a diverged model (lower the learning rate) or damaged embeddings (run ckd-ray embed --fresh)"
        )
