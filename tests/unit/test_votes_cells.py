"""Cells that special tokens crowd: by hand, against the literal nearest neighbours, and in any company."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ckd_ray.collective.special_cells import SpecialCells, choose_cells, sample_passages

DIM = 16


def rows(count: int, topics: int, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Unit rows around `topics` directions; those of every fourth are special."""
    generator = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(topics, DIM, generator=generator), dim=1)
    topic = torch.randint(0, topics, (count,), generator=generator)
    noise = 0.08 * torch.randn(count, DIM, generator=generator)
    return F.normalize(centres[topic] + noise, dim=1).half(), (topic % 4 == 0).numpy()


def test_a_cell_is_special_from_ten_of_eleven_on() -> None:
    points = torch.eye(2).repeat_interleave(22, 0)
    for special, expected in ((20, [False, False]), (21, [True, False])):
        marks = np.arange(44) < special
        cells = SpecialCells.learn(points, marks, seed=1, cells=2)
        assert cells.in_special_cell(torch.eye(2)).tolist() == expected


def test_special_where_the_nearest_neighbours_are_special() -> None:
    points, special = rows(4000, 20)
    cells = SpecialCells.learn(points, special, seed=1, cells=60)
    asked, _ = rows(300, 20)
    near = (asked.float() @ points.float().T).topk(10, 1).indices.numpy()
    exact = special[near].all(1)
    assert 0.1 < exact.mean() < 0.5
    assert (cells.in_special_cell(3 * asked) == exact).mean() > 0.97


def test_company_and_storage_change_nothing(tmp_path: Path) -> None:
    points, special = rows(3000, 30)
    cells = SpecialCells.learn(points, special, seed=1)
    asked = torch.randn(500, DIM, generator=torch.Generator().manual_seed(7))
    whole = cells.in_special_cell(asked)
    assert 0 < whole.mean() < 1
    cells.save(str(tmp_path / "cells"))
    again = SpecialCells.load(str(tmp_path / "cells"))
    assert np.array_equal(again.in_special_cell(asked), whole)
    assert np.array_equal(np.concatenate([cells.in_special_cell(a[None]) for a in asked]), whole)
    assert np.array_equal(cells.in_special_cell(asked.flip(0)), whole[::-1])
    assert cells.in_special_cell(asked[:0]).shape == (0,)


def test_a_tie_is_not_special_whatever_the_product_rounds_to() -> None:
    cells = SpecialCells(torch.eye(DIM)[:1], torch.eye(DIM)[1:2])
    tie = torch.ones(9, DIM)
    assert not cells.in_special_cell(tie).any()
    assert cells.in_special_cell(tie + 1e-3 * torch.eye(DIM)[0]).all()


def test_the_sample_follows_from_passages_and_seed() -> None:
    assert sample_passages(50, 1000, 1000, seed=1).tolist() == list(range(50))
    chosen = sample_passages(100_000, 1_000_000, 100_000, seed=1)
    assert 9000 < len(chosen) <= 10_000 and (np.diff(chosen) > 0).all()
    assert np.array_equal(chosen, sample_passages(100_000, 1_000_000, 100_000, seed=1))
    assert not np.array_equal(chosen, sample_passages(100_000, 1_000_000, 100_000, seed=2))
    assert choose_cells(0) == choose_cells(63) == 1 and choose_cells(10**9) == 4096


def test_stores_without_rows_or_with_special_rows_alone() -> None:
    nothing = SpecialCells.learn(torch.zeros(0, DIM), np.empty(0, bool), seed=1)
    assert not nothing.in_special_cell(torch.ones(2, DIM)).any()
    points, _ = rows(200, 3)
    assert SpecialCells.learn(points, np.ones(200, bool), seed=1).in_special_cell(torch.ones(2, DIM)).all()
    assert not SpecialCells.learn(points, np.zeros(200, bool), seed=1).in_special_cell(torch.ones(2, DIM)).any()
