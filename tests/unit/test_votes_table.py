"""The token table: counts by hand, seats by hand, and votes that do not depend on company or storage."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ckd_ray.collective import token_table
from ckd_ray.collective.token_table import TokenTable, choose_cells, sample_passages, seats

DIM = 16


def rows(count: int, topics: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Unit rows around `topics` directions; the token of a row is its topic, but one row in five has token 1000."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(topics, DIM, generator=generator), dim=1)
    topic = torch.randint(0, topics, (count,), generator=generator)
    noise = 0.08 * torch.randn(count, DIM, generator=generator)
    tokens = torch.where(torch.rand(count, generator=generator) < 0.2, 1000, topic)
    return F.normalize(centres[topic] + noise, dim=1).half(), tokens.numpy()


def test_seats_by_hand() -> None:
    # Quotients of 7: 7, 3.5, 2.33, 1.75; of 3: 3, 1.5; of 2: 2. Five seats: 7 3.5 3 2.33 2.
    found = seats(torch.tensor([[4, 9, 2]]), torch.tensor([[3.0, 7.0, 2.0]]), 5)
    assert found.tolist() == [[9, 9, 4, 9, 2]]
    # Equal counts: the smaller id first. Nobody there: -1.
    assert seats(torch.tensor([[8, 3]]), torch.tensor([[1.0, 1.0]]), 2).tolist() == [[3, 8]]
    assert seats(torch.tensor([[-1, -1]]), torch.zeros(1, 2), 3).tolist() == [[-1, -1, -1]]
    assert seats(torch.tensor([[5]]), torch.tensor([[1.0]]), 3).tolist() == [[5, 5, 5]]


def test_cells_count_their_own_rows() -> None:
    points, tokens = rows(600, 8)
    table = TokenTable.learn(points, tokens, seed=1, cells=12)
    nearest = (points.float() @ table.cells_KD.T).argmax(1).numpy()
    for cell in range(12):
        expected = Counter(tokens[nearest == cell].tolist())
        ids, counts = table.token_ids_KT[cell], table.counts_KT[cell]
        kept = ids >= 0
        assert dict(zip(ids[kept].tolist(), counts[kept].tolist(), strict=True)) == expected
        assert (counts[kept].diff() <= 0).all() and not counts[~kept].any()


def test_the_same_token_in_several_cells_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cells at the same distance: 3.5 x token 1 and 2 x token 2 beside 4 x token 2 make token 2 the first."""
    cells = F.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]]), dim=1)
    ids = torch.tensor([[1, 2], [2, -1], [7, -1]])
    table = TokenTable(cells, ids, torch.tensor([[3.5, 2.0], [4.0, 0.0], [99.0, 0.0]]))
    monkeypatch.setattr(token_table, "_CELLS_ASKED", 2)
    assert table.votes(torch.tensor([[5.0, 0.0]]), 3).tolist() == [[2, 1, 2]]  # 6, 3.5 and half of 6
    assert table.votes(torch.tensor([[-1.0, 0.0]]), 2).tolist() == [[7, 7]]


def test_most_votes_are_those_of_the_nearest_neighbours() -> None:
    points, tokens = rows(4000, 12)
    table = TokenTable.learn(points, tokens, seed=1, cells=64)
    asked = points[::37].float()
    winners = table.votes(asked, 10)[:, 0]
    near = (asked @ points.float().T).topk(10, 1).indices.numpy()
    exact = np.array([Counter(tokens[n].tolist()).most_common(1)[0][0] for n in near])
    assert (winners == exact).mean() > 0.95


def test_company_storage_and_threads_change_no_vote(tmp_path: Path) -> None:
    points, tokens = rows(3000, 30)
    table = TokenTable.learn(points, tokens, seed=1)
    asked = torch.randn(500, DIM, generator=torch.Generator().manual_seed(7))
    whole = table.votes(asked, 10)
    table.save(str(tmp_path / "table"))
    again = TokenTable.load(str(tmp_path / "table"))
    assert np.array_equal(again.votes(asked, 10), whole)
    for at in (0, 17, 499):
        assert np.array_equal(table.votes(asked[at : at + 1], 10)[0], whole[at])
    assert np.array_equal(table.votes(asked.flip(0), 10), whole[::-1])
    assert table.votes(asked[:0], 10).shape == (0, 10)


def test_the_sample_follows_from_passages_and_seed() -> None:
    assert sample_passages(50, 1000, 1000, seed=1).tolist() == list(range(50))
    chosen = sample_passages(100_000, 1_000_000, 100_000, seed=1)
    assert 9000 < len(chosen) <= 10_000 and (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, sample_passages(100_000, 1_000_000, 100_000, seed=1))
    assert not np.array_equal(chosen, sample_passages(100_000, 1_000_000, 100_000, seed=2))
    assert choose_cells(0) == choose_cells(127) == 1
    assert choose_cells(10**9) == 8192


def test_a_store_without_rows_has_no_votes() -> None:
    table = TokenTable.learn(torch.zeros(0, DIM), np.empty(0, np.int32), seed=1)
    assert (table.votes(torch.ones(2, DIM), 4) == -1).all()


def test_crowded_where_only_silent_tokens_are_seated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_table, "_CELLS_ASKED", 1)
    counts = torch.tensor([[99.0, 1.0], [80.0, 20.0], [5.0, 0.0]])
    table = TokenTable(torch.eye(3), torch.tensor([[0, 7], [0, 7], [8, -1]]), counts)
    assert table.crowded(torch.eye(3), 10, np.array([0, 1])).tolist() == [True, False, False]
