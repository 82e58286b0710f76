"""The objectives against literal float64 versions, by hand, and through autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ckd_ray.collective import collective_loss, teacher_scores
from ckd_ray.collective.losses import BatchScores, LossRows
from ckd_ray.collective.scores import candidate_scores
from ckd_ray.config.schema import DistillConfig
from ckd_ray.distill.objectives import OBJECTIVES
from ckd_ray.distill.targets import degenerate
from ckd_ray.model.maxsim import maxsim

TEMPERATURE = 0.25
TEACHER = tuple(name for name, objective in OBJECTIVES.items() if objective.has_teacher)


def loss_rows(
    name: str,
    student_BN: Tensor,
    *,
    positives_B: Tensor,
    teacher_scores_BN: Tensor | None = None,
    valid_BN: Tensor | None = None,
    list_size: int = 1,
    scale: float = 1.0,
    **settings: object,
) -> LossRows:
    """The objective on scores, with the published loss unless `settings` names another."""
    valid_BN = torch.ones_like(student_BN, dtype=torch.bool) if valid_BN is None else valid_BN
    scores = BatchScores(student_BN, positives_B, valid_BN, list_size, teacher_scores_BN)
    section = DistillConfig.model_validate({"objective": name, "loss": "kl", "temperature": TEMPERATURE, **settings})
    return OBJECTIVES[name].loss(scores, section, scale)


def objective_loss(name: str, student_BN: Tensor, **arguments: object) -> Tensor:
    return loss_rows(name, student_BN, **arguments).loss_B


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
    if "smoothing" in OBJECTIVES[name].own_keys:
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
        ("contrastive", 0.2, None, [0, 1, 0, 0]),  # it has no smoothing
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


def test_a_missing_teacher_and_shapes_that_do_not_fit() -> None:
    student, teacher, positives, valid = batch(6)
    for loss in ("kl", "margin", "mixture", "decoupled"):
        with pytest.raises(ValueError, match="teacher"):
            objective_loss("collective", student, positives_B=positives, loss=loss)
    with pytest.raises(ValueError, match="teacher_BN"):
        objective_loss("collective", student, positives_B=positives, teacher_scores_BN=teacher[:, :3])
    with pytest.raises(ValueError, match="labelled passage"):
        objective_loss("contrastive", student, positives_B=positives, valid_BN=torch.zeros_like(valid))


def softmax(values: dict[int, float]) -> dict[int, float]:
    top = max(values.values())
    powers = {n: math.exp(v - top) for n, v in values.items()}
    return {n: p / sum(powers.values()) for n, p in powers.items()}


def divergence(target: dict[int, float], model: dict[int, float]) -> float:
    return sum(t * math.log(t / model[n]) for n, t in target.items() if t > 0)


def literal_temperature(teacher: list[float], valid: list[bool], positive: int, size: int) -> float:
    """`temperature: auto`: half the standard deviation (n - 1) of the query's own candidates, or of all others."""
    own = [teacher[n] for n in range(positive + 1, positive + size) if valid[n]]
    values = own if len(own) >= 3 else [s for n, s in enumerate(teacher) if valid[n] and n != positive]
    mean = sum(values) / len(values) if values else 0.0
    squares = sum((v - mean) ** 2 for v in values)
    return 0.5 * max(1e-3, math.sqrt(squares / max(1, len(values) - 1)))


def literal_loss(
    loss: str,
    student: list[float],
    teacher: list[float],
    valid: list[bool],
    positive: int,
    size: int,
    *,
    scale: float,
    temperature: float | str,
    weight: float = 1.0,
    margin: float = 0.0,
    denoise: float | None = None,
) -> float:
    """One row, in Python floats, from the formulas at the top of losses.py."""
    t = literal_temperature(teacher, valid, positive, size) if temperature == "auto" else float(temperature)
    kept = list(valid)
    if denoise is not None:
        kept = [v and (n == positive or teacher[n] < teacher[positive] - denoise * t) for n, v in enumerate(valid)]
    columns = [n for n, keep in enumerate(kept) if keep]
    model = softmax({n: student[n] / scale for n in columns})
    if loss == "decoupled":
        others = [n for n in range(positive + 1, positive + size) if valid[n]]
        total = -math.log(model[positive])
        if len(others) < 2:
            return total
        target = softmax({n: teacher[n] / t for n in others})
        return total + weight * divergence(target, softmax({n: student[n] / scale for n in others}))
    raised = {n: teacher[n] for n in columns}
    best = max((s for n, s in raised.items() if n != positive), default=-math.inf)
    raised[positive] = max(raised[positive], best + (margin * t if loss == "margin" else 0.0))
    target = softmax({n: s / t for n, s in raised.items()})
    if loss == "mixture":
        target = {n: weight * p + (1 - weight) * (n == positive) for n, p in target.items()}
    return divergence(target, model)


@pytest.mark.parametrize("loss", ["kl", "margin", "mixture", "decoupled"])
@pytest.mark.parametrize("temperature", [0.7, "auto"])
@pytest.mark.parametrize("denoise", [None, 0.5])
def test_losses_equal_the_literal_version(loss: str, temperature: float | str, denoise: float | None) -> None:
    random = torch.Generator().manual_seed(11)
    student = 9 * torch.randn(3, 12, dtype=torch.float64, generator=random)
    teacher = 3 * torch.randn(3, 12, dtype=torch.float64, generator=random)
    positives = torch.tensor([0, 4, 8])  # lists of four: a label and three candidates
    valid = torch.rand(3, 12, generator=random) < 0.8
    valid[torch.arange(3), positives] = True
    valid[0, 1:4] = True
    valid[1, 5:8] = torch.tensor([True, False, False])  # too few candidates: the whole row gives the spread
    rows = loss_rows(
        "collective", student, positives_B=positives, teacher_scores_BN=teacher, valid_BN=valid, list_size=4, scale=3.0,
        loss=loss, temperature=temperature, denoise=denoise, teacher_weight=0.4, margin=0.8,
    )  # fmt: skip
    wanted = [
        literal_loss(
            loss, student[b].tolist(), teacher[b].tolist(), valid[b].tolist(), int(positives[b]), 4,
            scale=3.0, temperature=temperature, weight=0.4, margin=0.8, denoise=denoise,
        )
        for b in range(3)
    ]  # fmt: skip
    assert rows.loss_B.tolist() == pytest.approx(wanted, abs=1e-9)


def test_the_decoupled_loss_by_hand() -> None:
    """The student's scores over the scale 2 are the logarithms of 4, 1, 2, 1, the label first; the teacher's over T = 1
    are those of 3 and 1 for the candidates 1 and 2, and column 3 is another query's."""
    student = 2 * torch.tensor([[4.0, 1.0, 2.0, 1.0]]).log()
    teacher = torch.tensor([[-50.0, math.log(3.0), 0.0, 70.0]])
    rows = loss_rows(
        "self_distillation", student, positives_B=torch.tensor([0]), teacher_scores_BN=teacher, list_size=3, scale=2.0,
        loss="decoupled", temperature=1.0, teacher_weight=0.5,
    )  # fmt: skip
    among = 0.75 * math.log(0.75 / (1 / 3)) + 0.25 * math.log(0.25 / (2 / 3))
    assert rows.loss_B.item() == pytest.approx(math.log(8 / 4) + 0.5 * among, abs=1e-6)
    assert rows.entropy_B.item() == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-6)
    assert rows.uniform_B.item() == pytest.approx(math.log(2))
    assert rows.mass_B.item() == pytest.approx(0.0, abs=1e-12)


def test_the_second_part_of_the_decoupled_loss_leaves_the_label_alone() -> None:
    student, teacher, _, _ = batch(8)
    positives = torch.zeros(6, dtype=torch.int64)
    shared = {"positives_B": positives, "teacher_scores_BN": teacher, "list_size": 5, "loss": "decoupled"}
    gradients = []
    for weight in (0.0, 3.0):
        leaf = student.clone().requires_grad_()
        objective_loss("collective", leaf, teacher_weight=weight, **shared).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0][:, 0], gradients[1][:, 0])
    assert (gradients[0][:, 1:5] - gradients[1][:, 1:5]).abs().max() > 0.01


def test_pairs_that_the_teacher_has_not_scored_count_for_the_label_alone() -> None:
    student, teacher, _, _ = batch(10)
    positives = torch.zeros(6, dtype=torch.int64)
    scored = torch.zeros(6, 9, dtype=torch.bool)
    scored[:, 1:4] = True
    unknown = torch.where(scored, teacher, torch.nan)
    unknown[:, 0] = teacher[:, 0]
    valid = torch.ones(6, 9, dtype=torch.bool)
    settings = DistillConfig(objective="cross_encoder", temperature=0.5)
    found = OBJECTIVES["cross_encoder"].loss(BatchScores(student, positives, valid, 9, unknown, scored), settings, 2.0)
    # The label against all nine passages; the order of the three scored ones.
    own = OBJECTIVES["cross_encoder"].loss(
        BatchScores(student[:, :4], positives, valid[:, :4], 4, teacher[:, :4]), settings, 2.0
    )
    whole, part = (
        torch.nn.functional.cross_entropy(s / 2, positives, reduction="none") for s in (student, student[:, :4])
    )
    torch.testing.assert_close(found.loss_B, own.loss_B - part + whole)
    kl = settings.model_copy(update={"loss": "kl"})
    torch.testing.assert_close(
        OBJECTIVES["cross_encoder"].loss(BatchScores(student, positives, valid, 9, unknown, scored), kl, 2.0).loss_B,
        OBJECTIVES["cross_encoder"]
        .loss(BatchScores(student[:, :4], positives, valid[:, :4], 4, teacher[:, :4]), kl, 2.0)
        .loss_B,
    )


def test_a_teacher_of_another_scale_gives_the_same_loss_under_auto() -> None:
    student, teacher, _, valid = batch(9)
    positives, valid = torch.zeros(6, dtype=torch.int64), valid | (torch.arange(9) < 5)
    shared = {"positives_B": positives, "valid_BN": valid, "list_size": 5, "temperature": "auto", "denoise": 0.5}
    for loss in ("kl", "margin", "mixture", "decoupled"):
        plain = objective_loss("cross_encoder", student, teacher_scores_BN=teacher, loss=loss, **shared)
        scaled = objective_loss("cross_encoder", student, teacher_scores_BN=40 * teacher - 7, loss=loss, **shared)
        torch.testing.assert_close(plain, scaled)


def test_the_rows_tell_entropy_and_mass() -> None:
    teacher = torch.tensor([[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    rows = loss_rows(
        "self_distillation", torch.zeros(2, 4, dtype=torch.float64), positives_B=torch.tensor([0, 0]),
        teacher_scores_BN=teacher, temperature=1.0,
    )  # fmt: skip
    assert rows.entropy_B.tolist() == pytest.approx([math.log(4), 0.0], abs=1e-9)
    assert rows.uniform_B.tolist() == pytest.approx([math.log(4)] * 2)
    assert rows.mass_B.tolist() == pytest.approx([0.25, 1.0])


def test_a_target_that_is_the_bare_label_in_every_row_stops() -> None:
    teacher = torch.tensor([[0.0, -400.0], [0.0, -900.0]])
    with pytest.raises(FloatingPointError, match="temperature"):
        objective_loss("collective", torch.zeros(2, 2), positives_B=torch.tensor([0, 0]), teacher_scores_BN=teacher)


@pytest.mark.parametrize(("share", "words"), [(0.001, "one-hot"), (0.4, None), (0.995, "uniform"), (None, None)])
def test_degenerate_targets_are_told(share: float | None, words: str | None) -> None:
    targets = {} if share is None else {"target_entropy": 2 * share, "target_entropy_share": share, "label_mass": 0.5}
    told = degenerate(targets, 0.25)
    assert (told is None) == (words is None)
    if words and told:
        assert words in told and "distill.temperature" in told and f"{2 * share:.3f} nats" in told


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
    # The same without padding; one passage has no row.
    mask[2] = False
    padded = teacher_scores(queries, expansions, weights, passages, mask, similarity=similarity, zero_row_floor=floor)
    for b in range(2):
        found = candidate_scores(
            queries[b], expansions[b], weights[b], passages[mask], mask.sum(1).numpy(), similarity, zero_row_floor=floor
        )
        torch.testing.assert_close(found, padded[b])
    mask[2, 0] = True
    none = teacher_scores(queries, expansions[:, :0], weights[:, :0], passages, mask, similarity=similarity)
    torch.testing.assert_close(none, maxsim(queries, passages, mask, similarity=similarity))
