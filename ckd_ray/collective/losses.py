"""The losses of a batch.

Every loss compares softmax(s_S / scale), the student's distribution over the passages of the batch, with a target. s_S
are the student's scores, s_T the teacher's, T is the teacher's temperature. `raise` sets the label (the labelled
passage) to its row's maximum (method.md, step 6). The loss of a query is:

    contrastive   CE(label, softmax(s_S / scale)), the label smoothed by e: (1 - e) one-hot + e / n
    kl            KL(softmax(raise(s_T) / T) || softmax(s_S / scale))                       (published: step 6)
    margin        as kl, with the label raised to its row's maximum + margin * T
    mixture       KL((1 - a) one-hot + a softmax(raise(s_T) / T) || softmax(s_S / scale)), a = teacher_weight
    decoupled     CE(label, softmax(s_S / scale))
                  + w KL(softmax(s_T / T) || softmax(s_S / scale)), both over the query's own candidates without the
                  label, w = teacher_weight                   (the two parts of Zhao et al., CVPR 2022, equation 7)

The second part of `decoupled` has no gradient on the label's score: the teacher orders the candidates and never pulls
the label down. T divides only the teacher's scores, and no loss has a factor T^2: `scale` divides the student's.
Shapes: B rows (queries), N columns (passages of the batch), M = 1 + k columns of a query's own list (its label, then
its k candidates).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# `temperature: auto` is this many standard deviations of the teacher's scores of a query's candidates.
AUTO_TEMPERATURE = 0.5
_SMALLEST_SPREAD = 1e-3


@dataclass(frozen=True)
class BatchScores:
    """The scores of a batch, and which of them count.

    Attributes:
        student_BN: the student's scores, with gradient.
        positives_B: int64, the column of each row's label, which is always valid. The next M - 1 columns hold the
            query's own candidates.
        valid_BN: False removes a passage from the row's softmax on both sides: another labelled passage of the query,
            or a passage that the row counts already.
        list_size: M.
        teacher_BN: the teacher's scores; None for objectives without a teacher.
        scored_BN: True where the teacher has scored the pair; None: it has scored all of them. A cross-encoder scores
            only a query's own candidates, and a comparison with the teacher takes scored pairs only.

    Raises:
        ValueError: shapes do not fit, or a label is not valid.
    """

    student_BN: Tensor
    positives_B: Tensor
    valid_BN: Tensor
    list_size: int
    teacher_BN: Tensor | None = None
    scored_BN: Tensor | None = None

    def __post_init__(self) -> None:
        if self.student_BN.ndim != 2:
            raise ValueError(f"student_BN: expected (B, N), got {tuple(self.student_BN.shape)}")
        if self.positives_B.shape != self.student_BN.shape[:1]:
            raise ValueError(f"positives_B: expected ({len(self.student_BN)},), got {tuple(self.positives_B.shape)}")
        others = {"teacher_BN": self.teacher_BN, "valid_BN": self.valid_BN, "scored_BN": self.scored_BN}
        for name, other in others.items():
            if other is not None and other.shape != self.student_BN.shape:
                raise ValueError(f"{name}: expected {tuple(self.student_BN.shape)}, got {tuple(other.shape)}")
        if not bool(self.valid_BN.gather(1, self.positives_B[:, None]).all()):
            raise ValueError("valid_BN: expected every row's labelled passage to be valid")

    def scored(self) -> BatchScores:
        """The same batch, in which only labels and pairs that the teacher has scored are valid."""
        if self.scored_BN is None:
            return self
        scored_BN = self.scored_BN.scatter(1, self.positives_B[:, None], True)
        return replace(self, valid_BN=self.valid_BN & scored_BN, scored_BN=None)

    def of_list(self, values_BN: Tensor) -> Tensor:
        """The columns (B, M) of each query's own list."""
        columns_BM = self.positives_B[:, None] + torch.arange(self.list_size, device=values_BN.device)
        return values_BN.gather(1, columns_BM)


@dataclass(frozen=True)
class LossRows:
    """The loss of every row, and figures of its target.

    Attributes:
        loss_B: with gradient, 0 or more.
        entropy_B: entropy of the target, in nats. For `decoupled` (also in the next two) of the second part.
        uniform_B: the highest entropy that a target of that row can have.
        mass_B: the target's probability of the label; for `decoupled` the teacher's, within the query's own list.
    """

    loss_B: Tensor
    entropy_B: Tensor
    uniform_B: Tensor
    mass_B: Tensor


def raise_positives(
    teacher_BN: Tensor, positives_B: Tensor, valid_BN: Tensor, margin_B: Tensor | float = 0.0
) -> Tensor:
    """Teacher scores in which each row's label is at least `margin` above every other valid passage."""
    others_BN = teacher_BN.masked_fill(~valid_BN, -torch.inf).scatter(1, positives_B[:, None], -torch.inf)
    own_B = teacher_BN.gather(1, positives_B[:, None])[:, 0]
    return teacher_BN.scatter(1, positives_B[:, None], torch.maximum(own_B, others_BN.amax(1) + margin_B)[:, None])


def soft_labels(
    teacher_BN: Tensor,
    positives_B: Tensor,
    temperature: float | Tensor,
    valid_BN: Tensor | None = None,
    margin: float = 0.0,
) -> Tensor:
    """softmax(raise(s_T) / T) over the valid passages; rows sum to one.

    Args:
        temperature: T, a number or one for each row (B,).
        margin: the least distance of the label from the best other passage, in units of T.
    """
    valid_BN = torch.ones_like(teacher_BN, dtype=torch.bool) if valid_BN is None else valid_BN
    temperature_B = torch.as_tensor(temperature, dtype=teacher_BN.dtype, device=teacher_BN.device).expand(
        len(teacher_BN)
    )
    scores_BN = raise_positives(teacher_BN, positives_B, valid_BN, margin * temperature_B) / temperature_B[:, None]
    return scores_BN.masked_fill(~valid_BN, -torch.inf).softmax(1)


def temperatures(scores: BatchScores, temperature: float | str) -> Tensor:
    """T of every row, (B,) float64.

    `auto` is `AUTO_TEMPERATURE` standard deviations of the teacher's scores, over the query's own candidates without
    the label, or over all other passages of the batch where a query has fewer than three candidates. Teachers with
    another scale, similarity or query length then give the same targets (Sun et al., CVPR 2024, divide by the standard
    deviation of all logits).
    """
    assert scores.teacher_BN is not None
    teacher_BN = scores.teacher_BN.double()
    if temperature != "auto":
        return teacher_BN.new_full((len(teacher_BN),), float(temperature))
    valid_BN = scores.valid_BN.scatter(1, scores.positives_B[:, None], False)
    own_BM, own_valid_BM = scores.of_list(teacher_BN), scores.of_list(valid_BN)
    spread_B = torch.where(own_valid_BM.sum(1) >= 3, _deviation(own_BM, own_valid_BM), _deviation(teacher_BN, valid_BN))
    return AUTO_TEMPERATURE * spread_B.clamp_min(_SMALLEST_SPREAD)


def contrastive(scores: BatchScores, *, scale: float, smoothing: float = 0.0) -> LossRows:
    """Cross-entropy with the label, smoothed over the valid passages; see the formulas above."""
    _check(scale, 1.0, smoothing)
    one_hot_BN = torch.zeros_like(scores.student_BN).scatter_(1, scores.positives_B[:, None], 1.0)
    return _divergence(scores, _smoothed(one_hot_BN, scores.valid_BN, smoothing), scale)


def kl(
    scores: BatchScores,
    *,
    scale: float,
    temperature: float | str,
    smoothing: float = 0.0,
    teacher_weight: float = 1.0,
    margin: float = 0.0,
    denoise: float | None = None,
) -> LossRows:
    """`kl`, `margin` (`margin` above 0) and `mixture` (`teacher_weight` below 1); see the formulas above.

    Args:
        scale: divides the student's scores.
        temperature: T, a number or `auto` (`temperatures`).
        smoothing: e, the share of a uniform part in the target.
        denoise: leaves out the passages that `suspected` finds; None keeps all.

    Raises:
        ValueError: the teacher's scores are missing, or an argument is out of its range.
        FloatingPointError: scores are not finite, or the target of every row is the label alone.
    """
    scores = scores.scored()
    temperature_B = _teacher_ready(scores, scale, temperature, smoothing)
    scores = _without_suspected(scores, scores, temperature_B, denoise)
    assert scores.teacher_BN is not None
    # In float64 a target underflows to 0 only 745 T below its row's maximum.
    target_BN = soft_labels(scores.teacher_BN.double(), scores.positives_B, temperature_B, scores.valid_BN, margin)
    _check_underflow(target_BN, scores.valid_BN, temperature_B)
    if teacher_weight < 1:
        one_hot_BN = torch.zeros_like(target_BN).scatter_(1, scores.positives_B[:, None], 1.0)
        target_BN = (1 - teacher_weight) * one_hot_BN + teacher_weight * target_BN
    return _divergence(scores, _smoothed(target_BN.to(scores.student_BN.dtype), scores.valid_BN, smoothing), scale)


def collective_loss(
    student_scores_BN: Tensor, teacher_scores_BN: Tensor, positives_B: Tensor, temperature: float
) -> Tensor:
    """Mean over rows of KL(softmax(raise(s_T) / T) || softmax(s_S)): method.md, step 6, as published.

    Args:
        student_scores_BN: scores of all passages of the batch for all its queries, with gradient.
        teacher_scores_BN: `teacher_scores` of the same passages.
        positives_B: column of each row's labelled passage.
        temperature: T; it divides only the teacher's scores, and there is no T^2 factor.
    """
    everything_BN = torch.ones_like(student_scores_BN, dtype=torch.bool)
    scores = BatchScores(student_scores_BN, positives_B, everything_BN, 1, teacher_scores_BN)
    return kl(scores, scale=1.0, temperature=temperature).loss_B.mean()


def decoupled(
    scores: BatchScores,
    *,
    scale: float,
    temperature: float | str,
    teacher_weight: float = 1.0,
    smoothing: float = 0.0,
    denoise: float | None = None,
) -> LossRows:
    """Cross-entropy on the label, plus the KL among the query's own candidates; see the formulas above.

    The first part counts every passage of the batch, scored by the teacher or not. A query with fewer than two scored
    candidates has only the first part. Arguments and errors as for `kl`.
    """
    everything, scores = scores, scores.scored()
    temperature_B = _teacher_ready(scores, scale, temperature, smoothing)
    assert scores.teacher_BN is not None
    first = _without_suspected(everything, scores, temperature_B, denoise)
    on_label = contrastive(first, scale=scale, smoothing=smoothing)
    valid_BK = scores.of_list(scores.valid_BN)[:, 1:]
    teacher_BM = scores.of_list(scores.teacher_BN.double()) / temperature_B[:, None]
    enough_B1 = (valid_BK.sum(1) >= 2)[:, None]
    valid_BK = valid_BK & enough_B1
    # A softmax over no columns is NaN, so a row without candidates takes all of them; its numbers are masked below.
    open_BK = valid_BK | ~enough_B1
    target_BK = teacher_BM[:, 1:].masked_fill(~open_BK, -torch.inf).softmax(1).masked_fill(~valid_BK, 0.0)
    student_BK = scores.of_list(scores.student_BN)[:, 1:] / scale
    log_student_BK = student_BK.masked_fill(~open_BK, -torch.inf).log_softmax(1).masked_fill(~valid_BK, 0.0)
    target_BK = target_BK.to(log_student_BK.dtype).detach()
    among_B = (torch.xlogy(target_BK, target_BK) - target_BK * log_student_BK).sum(1)
    own_valid_BM = scores.of_list(scores.valid_BN)
    mass_B = teacher_BM.masked_fill(~own_valid_BM, -torch.inf).softmax(1)[:, 0]
    return LossRows(
        on_label.loss_B + teacher_weight * among_B,
        -torch.xlogy(target_BK, target_BK).sum(1),
        valid_BK.sum(1).clamp_min(1).double().log(),
        mass_B,
    )


def suspected(scores: BatchScores, temperature_B: Tensor, denoise: float) -> Tensor:
    """Bool (B, N): passages that the teacher scores within `denoise` * T of the label or above it.

    They may be relevant without a label. A loss that counts them as negatives punishes the student for finding them
    (RocketQA, Qu et al., NAACL 2021, leaves out what a cross-encoder calls relevant).
    """
    assert scores.teacher_BN is not None
    teacher_BN = scores.teacher_BN.double()
    edge_B1 = teacher_BN.gather(1, scores.positives_B[:, None]) - denoise * temperature_B[:, None]
    return (teacher_BN >= edge_B1).scatter(1, scores.positives_B[:, None], False)


def _without_suspected(
    scores: BatchScores, scored: BatchScores, temperature_B: Tensor, denoise: float | None
) -> BatchScores:
    """`scores` without the passages that `suspected` finds among the valid pairs of `scored`."""
    if denoise is None:
        return scores
    left_out_BN = suspected(scored, temperature_B, denoise) & scored.valid_BN
    return replace(scores, valid_BN=scores.valid_BN & ~left_out_BN)


def _divergence(scores: BatchScores, target_BN: Tensor, scale: float) -> LossRows:
    """KL(target || softmax(s_S / scale)) of every row."""
    _check_finite("student", scores.student_BN, scores.valid_BN)
    target_BN = target_BN.detach()
    logits_BN = (scores.student_BN / scale).masked_fill(~scores.valid_BN, -torch.inf)
    log_student_BN = logits_BN.log_softmax(1).masked_fill(~scores.valid_BN, 0.0)  # 0 * -inf has no place in the sum
    negative_entropy_BN = torch.xlogy(target_BN, target_BN)
    return LossRows(
        (negative_entropy_BN - target_BN * log_student_BN).sum(1),
        -negative_entropy_BN.sum(1),
        scores.valid_BN.sum(1).double().log(),
        target_BN.gather(1, scores.positives_B[:, None])[:, 0],
    )


def _smoothed(target_BN: Tensor, valid_BN: Tensor, smoothing: float) -> Tensor:
    if not smoothing:
        return target_BN
    valid_BN = valid_BN.to(target_BN.dtype)
    return (1 - smoothing) * target_BN + smoothing * valid_BN / valid_BN.sum(1, keepdim=True)


def _deviation(values_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """Standard deviation over the valid columns of each row; 0 where there are fewer than two."""
    count_B = valid_BN.sum(1).clamp_min(1)
    values_BN = values_BN.masked_fill(~valid_BN, 0.0)
    mean_B = values_BN.sum(1) / count_B
    squares_B = (values_BN - mean_B[:, None]).masked_fill(~valid_BN, 0.0).square().sum(1)
    return (squares_B / (count_B - 1).clamp_min(1)).sqrt()


def _teacher_ready(scores: BatchScores, scale: float, temperature: float | str, smoothing: float) -> Tensor:
    """Check the arguments; return the temperatures (B,)."""
    if scores.teacher_BN is None:
        raise ValueError("this loss needs the teacher's scores")
    _check(scale, temperature, smoothing)
    _check_finite("teacher", scores.teacher_BN, scores.valid_BN)
    _check_finite("student", scores.student_BN, scores.valid_BN)
    return temperatures(scores, temperature)


def _check(scale: float, temperature: float | str, smoothing: float) -> None:
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale: expected a number above 0, got {scale}")
    if isinstance(temperature, str):
        if temperature != "auto":
            raise ValueError(f"temperature: expected a number above 0 or auto, got {temperature!r}")
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a number above 0 or auto, got {temperature}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected 0 <= smoothing < 1, got {smoothing}")


def _check_underflow(target_BN: Tensor, valid_BN: Tensor, temperature_B: Tensor) -> None:
    """A single confident row is fine; a batch in which every target is the label alone teaches nothing."""
    if target_BN.shape[1] < 2 or not len(target_BN):
        return
    alone_B = ((target_BN > 0).sum(1) == 1) & (valid_BN.sum(1) > 1)
    if bool(alone_B.all()):
        temperature = float(temperature_B.max())
        raise FloatingPointError(
            "the teacher's distribution underflows to the label alone in every row: its scores lie more than "
            f"{745 * temperature:.4g} apart at temperature {temperature:g}; raise distill.temperature, or set it to "
            "auto"
        )


def _check_finite(who: str, scores_BN: Tensor, valid_BN: Tensor) -> None:
    bad = ~torch.isfinite(scores_BN) & valid_BN
    if bad.any():
        row, column = (int(i) for i in bad.nonzero()[0])
        raise FloatingPointError(
            f"the {who}'s score of passage {column} for query {row} of the batch is {scores_BN[row, column].item()};"
            " a diverged model (lower the learning rate) or damaged embeddings (run ckd-ray embed --fresh)"
        )
