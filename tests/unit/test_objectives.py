"""The objectives against literal float64 versions, by hand, and through autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ckd_ray.collective import collective_loss, teacher_scores
from ckd_ray.distill.objectives import OBJECTIVES, objective_loss
from ckd_ray.model.maxsim import maxsim

TEMPERATURE = 0.25
TEACHER = ("self_distillation", "cross_encoder", "collective")


def literal_row(
    name: str, student: list[float], teacher: list[float], positive: int, valid: list[bool], smoothing: float
) -> float:
    """KL of one row in Python floats, straight from the formulas."""
    columns = [n for n, keep in enumerate(valid) if keep]
    if name in TEACHER:
        raised = {n: teacher[n] for n in columns}
        raised[positive] = max(raised.values())
        top = max(raised.values())
        powers = {n: math.exp((s - top) / TEMPERATURE) for n, s in raised.items()}
        target = {n: p / sum(powers.values()) for n, p in powers.items()}
    else:
        target = {n: float(n == positive) for n in columns}
    target = {n: (1 - smoothing) * t + smoothing / len(columns) for n, t in target.items()}
    top = max(student[n] for n in columns)
    log_sum = top + math.log(sum(math.exp(student[n] - top) for n in columns))
    return sum(t * (math.log(t) - student[n] + log_sum) for n, t in target.items() if t > 0)


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(6, 9, dtype=torch.float64, generator=random)
    teacher = torch.randn(6, 9, dtype=torch.float64, generator=random) - 20
    positives = torch.tensor([0, 1, 2, 3, 4, 8])
    valid = torch.rand(6, 9, generator=random) < 0.7
    valid[torch.arange(6), positives] = True
    valid[5] = positives[5] == torch.arange(9)  # a row in which only the positive is left
    return student, teacher, positives, valid


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("masked", [False, True])
def test_objectives_equal_the_literal_version(name: str, smoothing: float, masked: bool) -> None:
    student, teacher, positives, valid = batch()
    if not masked:
        valid = torch.ones_like(valid)
    arguments = {"temperature": TEMPERATURE, "smoothing": smoothing}
    rows = objective_loss(
        name,
        student,
        positives_B=positives,
        teacher_scores_BN=teacher if name in TEACHER else None,
        valid_BN=valid if masked else None,
        **arguments,
    )
    wanted = [
        literal_row(name, student[b].tolist(), teacher[b].tolist(), int(positives[b]), valid[b].tolist(), smoothing)
        for b in range(6)
    ]
    assert rows.tolist() == pytest.approx(wanted, abs=1e-9)
    if masked:
        assert rows[5].item() == pytest.approx(0.0, abs=1e-12)


def test_contrastive_is_cross_entropy_and_smoothing_differs_from_torch_by_the_entropy_alone() -> None:
    student, _, positives, _ = batch(1)
    rows = objective_loss("contrastive", student, positives_B=positives, temperature=1.0, smoothing=0.0)
    torch.testing.assert_close(rows, torch.nn.functional.cross_entropy(student, positives, reduction="none"))
    e, n = 0.1, student.shape[1]
    rows = objective_loss("label_smoothing", student, positives_B=positives, temperature=1.0, smoothing=e)
    cross = torch.nn.functional.cross_entropy(student, positives, reduction="none", label_smoothing=e)
    high, low = 1 - e + e / n, e / n
    torch.testing.assert_close(
        rows - cross, torch.full_like(rows, high * math.log(high) + (n - 1) * low * math.log(low))
    )


def test_the_gradient_is_the_difference_of_the_distributions() -> None:
    student, teacher, positives, valid = batch(2)
    student.requires_grad_()
    teacher = teacher.clone().requires_grad_()
    rows = objective_loss(
        "collective",
        student,
        positives_B=positives,
        teacher_scores_BN=teacher,
        valid_BN=valid,
        temperature=TEMPERATURE,
        smoothing=0.1,
    )
    rows.sum().backward()
    raised = teacher.detach().masked_fill(~valid, -torch.inf)
    raised = raised.scatter(1, positives[:, None], raised.amax(1, keepdim=True))
    target = 0.9 * torch.softmax(raised / TEMPERATURE, 1) + 0.1 * valid / valid.sum(1, keepdim=True)
    model = torch.softmax(student.detach().masked_fill(~valid, -torch.inf), 1)
    torch.testing.assert_close(student.grad, model - target)
    assert teacher.grad is None and not student.grad[~valid].any()


def test_collective_loss_by_hand() -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    teacher = torch.tensor([[-3.0, 0.0, -math.log(2.0) / 4]])
    # The positive is raised from -3 to 0; softmax((0, 0, -ln 2 / 4) / 0.25) = (2, 2, 1) / 5.
    loss = collective_loss(student, teacher, torch.tensor([0]), 0.25)
    assert loss.item() == pytest.approx(2 * 0.4 * math.log(0.4) + 0.2 * math.log(0.2) + math.log(3), abs=1e-6)
    loss.backward()
    assert student.grad is not None
    assert student.grad[0].tolist() == pytest.approx([1 / 3 - 0.4, 1 / 3 - 0.4, 1 / 3 - 0.2], abs=1e-6)


THIRDS = [1 / 3, 1 / 3, 1 / 6, 1 / 6]


@pytest.mark.parametrize(
    ("name", "smoothing", "hidden", "target"),
    [
        ("contrastive", 0.0, None, [0, 1, 0, 0]),
        ("contrastive", 0.2, None, [0.05, 0.85, 0.05, 0.05]),
        ("label_smoothing", 0.2, None, [0.05, 0.85, 0.05, 0.05]),
        ("label_smoothing", 0.3, 3, [0.1, 0.8, 0.1, 0]),
        ("self_distillation", 0.0, None, THIRDS),
        ("cross_encoder", 0.0, None, THIRDS),
        ("collective", 0.0, None, THIRDS),
        ("self_distillation", 0.25, None, [0.3125, 0.3125, 0.1875, 0.1875]),
        ("cross_encoder", 0.25, None, [0.3125, 0.3125, 0.1875, 0.1875]),
        ("collective", 0.25, None, [0.3125, 0.3125, 0.1875, 0.1875]),
        ("cross_encoder", 0.0, 0, [0, 0.5, 0.25, 0.25]),
        ("collective", 0.3, 0, [0, 0.45, 0.275, 0.275]),
    ],
)
def test_every_objective_by_hand(name: str, smoothing: float, hidden: int | None, target: list[float]) -> None:
    """The student's softmax is (1, 2, 3, 4) / 10. The teacher's scores over T = 0.5 are 0, -18, -ln 2, -ln 2, and the
    positive (column 1) is raised to the highest, 0. Where column 0 does not count, its own score is 0."""
    teacher = torch.tensor([[0.0, -9.0, -math.log(2) / 2, -math.log(2) / 2]])
    if hidden == 0:
        teacher[0, 1] = 0.0
    valid = torch.tensor([[column != hidden for column in range(4)]])
    student = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()[None] + 7
    loss = objective_loss(
        name,
        student.double(),
        positives_B=torch.tensor([1]),
        teacher_scores_BN=teacher.double() if name in TEACHER else None,
        valid_BN=valid,
        temperature=0.5,
        smoothing=smoothing,
    )
    share = [(i + 1) / sum(n + 1 for n in range(4) if n != hidden) for i in range(4)]
    wanted = sum(t * math.log(t / p) for t, p in zip(target, share, strict=True) if t)
    assert loss.item() == pytest.approx(wanted, abs=1e-6)


def test_a_constant_added_to_a_row_changes_nothing() -> None:
    student, teacher, positives, _ = batch(3)
    loss = collective_loss(student, teacher, positives, TEMPERATURE)
    torch.testing.assert_close(loss, collective_loss(student + 100, teacher - 50, positives, TEMPERATURE))
    assert loss > 0


def test_invalid_columns_may_hold_any_teacher_score() -> None:
    student, teacher, positives, valid = batch(4)
    arguments = {"positives_B": positives, "valid_BN": valid, "temperature": TEMPERATURE, "smoothing": 0.0}
    before = objective_loss("cross_encoder", student, teacher_scores_BN=teacher, **arguments)
    for value in (torch.nan, 1e30):
        other = torch.where(valid, teacher, value)
        assert torch.equal(objective_loss("cross_encoder", student, teacher_scores_BN=other, **arguments), before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_that_are_not_finite_stop_with_the_cause(value: float) -> None:
    student, teacher, positives, _ = batch(5)
    broken = teacher.clone()
    broken[2, 5] = value
    arguments = {"positives_B": positives, "temperature": TEMPERATURE, "smoothing": 0.0}
    with pytest.raises(FloatingPointError, match="teacher"):
        objective_loss("collective", student, teacher_scores_BN=broken, **arguments)
    with pytest.raises(FloatingPointError, match="student"):
        objective_loss("contrastive", broken, **arguments)


def test_unknown_objective_and_missing_teacher() -> None:
    student, _, positives, _ = batch(6)
    with pytest.raises(ValueError, match="contrastive"):
        objective_loss("margin", student, positives_B=positives, temperature=1.0, smoothing=0.0)
    with pytest.raises(ValueError, match="teacher"):
        objective_loss("collective", student, positives_B=positives, temperature=1.0, smoothing=0.0)


@pytest.mark.parametrize("similarity", ["l2", "cosine"])
@pytest.mark.parametrize("floor", [False, True])
def test_teacher_scores_are_two_weighted_sums(similarity: str, floor: bool) -> None:
    random = torch.Generator().manual_seed(7)
    queries, passages = (
        torch.nn.functional.normalize(torch.randn(s, generator=random), dim=-1) for s in ((2, 5, 8), (4, 6, 8))
    )
    expansions, weights = (
        0.5 * torch.randn(2, 3, 8, generator=random),
        torch.tensor([[4.0, 2.0, 0.0], [1.0, 0.0, 0.0]]),
    )
    mask = torch.rand(4, 6, generator=random) < 0.7
    mask[:, 0] = True
    scores = teacher_scores(queries, expansions, weights, passages, mask, similarity=similarity, zero_row_floor=floor)
    own = maxsim(queries, passages, mask, similarity=similarity, zero_row_floor=floor)
    extra = torch.stack(
        [
            sum(
                weights[b, e]
                * maxsim(expansions[b : b + 1, e : e + 1], passages, mask, None, similarity, zero_row_floor=floor)[0]
                for e in range(3)
            )
            for b in range(2)
        ]
    )
    torch.testing.assert_close(scores, own + extra)
    none = teacher_scores(queries, expansions[:, :0], weights[:, :0], passages, mask, similarity=similarity)
    torch.testing.assert_close(none, maxsim(queries, passages, mask, similarity=similarity))
