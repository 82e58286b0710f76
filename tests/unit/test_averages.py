"""Averages of weights, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ckd_ray.config import Config
from ckd_ray.distill.averages import MovingAverage, UntrainedAverage
from ckd_ray.errors import UserError
from ckd_ray.model import ColBERT
from ckd_ray.pipeline.loading import load_backbone
from ckd_ray.pipeline.training import _untrained


def test_the_moving_average_forgets_the_start_of_a_short_training() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    average = MovingAverage([weight], 0.9)
    with torch.no_grad():
        weight.copy_(torch.tensor([12.0, 13.0]))
    average.update(0)  # the decay is 2 / 11, not 0.9
    with average.in_place():
        assert torch.allclose(weight, torch.tensor([10.0, 11.0]))
    assert weight.tolist() == [12.0, 13.0]


def test_weights_averaged_with_the_untrained_ones_lie_between_and_are_put_back() -> None:
    weights = [torch.nn.Parameter(torch.tensor([4.0, 8.0])), torch.nn.Parameter(torch.tensor([[0.0]]))]
    average = UntrainedAverage(weights, [torch.tensor([0.0, 4.0]), torch.tensor([[-1.0]])], 0.25)
    with average.in_place():
        assert weights[0].tolist() == [3.0, 7.0] and weights[1].tolist() == [[-0.25]]
    assert weights[0].tolist() == [4.0, 8.0] and weights[1].tolist() == [[0.0]]


def test_both_averages_together_take_the_moving_one_towards_the_untrained_weights() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.0]))
    moving, start = MovingAverage([weight], 0.5), UntrainedAverage([weight], [torch.tensor([1.0])], 0.5)
    with torch.no_grad():
        weight.fill_(22.0)
    moving.update(0)  # 2 / 11 * 0 + 9 / 11 * 22
    with moving.in_place(), start.in_place():
        assert torch.allclose(weight, torch.tensor([9.5]))
    assert weight.tolist() == [22.0]


def test_an_encoder_that_is_not_made_like_the_backbone_is_refused(tmp_path: Path, tiny_backbone: str) -> None:
    config = Config.model_validate({"model": {"backbone": tiny_backbone, "dim": 16, "doc_maxlen": 48}})
    like, unlike = load_backbone(config), load_backbone(config)
    folder = _untrained(config, like, str(tmp_path / "untrained"), "distill.untrained_share")
    kept = ColBERT.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), like.parameters(), strict=True))
    unlike.backbone = torch.nn.Linear(2, 3)
    with pytest.raises(UserError, match="another architecture or size") as caught:
        _untrained(config, unlike, str(tmp_path / "other"), "distill.untrained_share")
    assert caught.value.where == "distill.untrained_share" and not (tmp_path / "other").exists()
