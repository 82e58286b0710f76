"""MaxSim against literal loops, and its gradients against autograd through the literal version."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ckd_ray.model import maxsim as package_maxsim
from ckd_ray.model.maxsim import maxsim


def literal(queries: Tensor, passages: Tensor, mask: Tensor, weights: Tensor, similarity: str, floor: bool) -> Tensor:
    """One pair of rows at a time, by the definition."""
    rows = []
    for query, weight in zip(queries, weights, strict=True):
        scores = []
        for passage, keep in zip(passages, mask, strict=True):
            total = query.new_zeros(())
            for a, w in zip(query, weight, strict=True):
                found = []
                for b in [*passage[keep.bool()], *([torch.zeros_like(a)] if floor else [])]:
                    if similarity == "l2":
                        found.append(-((a - b) ** 2).sum())
                    elif b.any():
                        found.append((a / a.norm()) @ (b / b.norm()))
                    else:
                        found.append(a.new_zeros(()))
                worst = a.new_tensor(-4.0 if similarity == "l2" else -1.0)
                total = total + w * (torch.stack(found).max() if found else worst)
            scores.append(total)
        rows.append(torch.stack(scores))
    return torch.stack(rows)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Float64 rows of any length, ragged passages, and a last passage without rows."""
    random = torch.Generator().manual_seed(seed)
    queries = torch.randn(3, 4, 6, dtype=torch.float64, generator=random)
    passages = torch.randn(5, 7, 6, dtype=torch.float64, generator=random)
    mask = torch.rand(5, 7, generator=random) < 0.6
    mask[0] = True
    mask[4] = False
    return queries, passages, mask, torch.rand(3, 4, dtype=torch.float64, generator=random)


@pytest.mark.parametrize("similarity", ["l2", "cosine"])
@pytest.mark.parametrize("floor", [False, True])
def test_scores_and_gradients_equal_the_literal_version(similarity: str, floor: bool) -> None:
    queries, passages, mask, weights = inputs()
    leaves = [t.clone().requires_grad_() for t in (queries, passages, weights)]
    scores = maxsim(leaves[0], leaves[1], mask, leaves[2], similarity, zero_row_floor=floor)
    twins = [t.clone().requires_grad_() for t in (queries, passages, weights)]
    wanted = literal(twins[0], twins[1], mask, twins[2], similarity, floor)
    torch.testing.assert_close(scores, wanted)
    upstream = torch.randn(scores.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores.backward(upstream)
    wanted.backward(upstream)
    for leaf, twin in zip(leaves, twins, strict=True):
        assert leaf.grad is not None and twin.grad is not None
        torch.testing.assert_close(leaf.grad, twin.grad)
    assert not leaves[1].grad[~mask].any()


@pytest.mark.parametrize("similarity", ["l2", "cosine"])
@pytest.mark.parametrize("floor", [False, True])
def test_gradcheck(similarity: str, floor: bool) -> None:
    queries, passages, mask, weights = (t.requires_grad_() if t.is_floating_point() else t for t in inputs(3))
    assert torch.autograd.gradcheck(
        lambda q, p, w: maxsim(q, p, mask, w, similarity, zero_row_floor=floor), (queries, passages, weights)
    )


def test_values_by_hand() -> None:
    query = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    passages = torch.tensor([[[1.0, 0.0], [0.0, -1.0]], [[0.0, 1.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    # Passage 0: rows find 0 and, at a right angle, -2. Passage 1 has one row only: -2 and 0.
    assert maxsim(query, passages, mask).tolist() == [[-2.0, -2.0]]
    weights = torch.tensor([[3.0, 1.0]])
    assert maxsim(query, passages, mask, weights).tolist() == [[-2.0, -6.0]]
    assert maxsim(query, passages, mask, weights, "cosine").tolist() == [[3.0, 1.0]]
    assert package_maxsim is maxsim


def test_the_floor_is_a_zero_row_beside_the_passage() -> None:
    query = torch.tensor([[[1.0, 0.0]]])
    passages = torch.tensor([[[-1.0, 0.0]], [[0.8, 0.6]]])
    mask = torch.tensor([[True], [True]])
    assert maxsim(query, passages, mask)[0].tolist() == pytest.approx([-4.0, -0.4])
    assert maxsim(query, passages, mask, zero_row_floor=True)[0].tolist() == pytest.approx([-1.0, -0.4])
    cosine = maxsim(query, passages, mask, similarity="cosine", zero_row_floor=True)
    assert cosine[0].tolist() == pytest.approx([0.0, 0.8])


@pytest.mark.parametrize(("similarity", "worst"), [("l2", -4.0), ("cosine", -1.0)])
def test_a_passage_without_rows_is_finite_and_ranks_last(similarity: str, worst: float) -> None:
    queries = F.normalize(torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    passages = F.normalize(torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0]])
    scores = maxsim(queries, passages, mask, similarity=similarity)
    assert scores[:, 1].tolist() == [5 * worst] * 2
    assert (scores.argmin(1) == 1).all()
    assert maxsim(queries, passages[:, :0], mask[:, :0], similarity=similarity).tolist() == [[5 * worst] * 4] * 2


def test_what_stands_in_masked_rows_does_not_count() -> None:
    queries, passages, mask, weights = inputs(5)
    before = maxsim(queries, passages, mask, weights)
    loud = torch.where(mask[:, :, None], passages, 1e3 * queries.mean())
    assert torch.equal(maxsim(queries, loud, mask, weights), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_inputs_are_scored_in_float32(dtype: torch.dtype) -> None:
    """Exactly the score of the rounded rows, not a sum in half precision."""
    random = torch.Generator().manual_seed(2)
    queries = F.normalize(torch.randn(2, 32, 64, generator=random), dim=-1).to(dtype)
    passages = F.normalize(torch.randn(3, 50, 64, generator=random), dim=-1).to(dtype)
    mask = torch.ones(3, 50, dtype=torch.bool)
    scores = maxsim(queries, passages, mask)
    wanted = maxsim(queries.double(), passages.double(), mask)
    assert scores.dtype == torch.float32 and wanted.dtype == torch.float64
    torch.testing.assert_close(scores.double(), wanted, rtol=0, atol=2e-5)
    leaf = passages.clone().requires_grad_()
    maxsim(queries, leaf, mask).sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == dtype and leaf.grad.any()


def test_passages_score_the_same_alone_and_among_many_blocks() -> None:
    random = torch.Generator().manual_seed(4)
    queries = torch.randn(16, 32, 16, generator=random)
    passages = torch.randn(90, 100, 16, generator=random)
    mask = torch.rand(90, 100, generator=random) < 0.8
    scores = maxsim(queries, passages, mask)
    for n in (0, 40, 89):
        torch.testing.assert_close(scores[:, n : n + 1], maxsim(queries, passages[n : n + 1], mask[n : n + 1]))


def test_no_passages() -> None:
    queries, passages, mask, _ = inputs()
    assert maxsim(queries, passages[:0], mask[:0]).shape == (3, 0)


def test_wrong_arguments_say_what_was_expected() -> None:
    queries, passages, mask, weights = inputs()
    with pytest.raises(ValueError, match=r"\(3, 4, 5\)"):
        maxsim(queries[:, :, :5], passages, mask)
    with pytest.raises(ValueError, match=r"\(5, 7\).*got \(5, 6\)"):
        maxsim(queries, passages, mask[:, :6])
    with pytest.raises(ValueError, match=r"\(3, 4\).*got \(3, 3\)"):
        maxsim(queries, passages, mask, weights[:, :3])
    with pytest.raises(ValueError, match="dot"):
        maxsim(queries, passages, mask, similarity="dot")
