"""The score scale: the spread by hand, and what it follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ckd_ray.checks import load_config
from ckd_ray.collective.scores import expansion_weights
from ckd_ray.data import Collection, build_collection
from ckd_ray.data.positives import Positives
from ckd_ray.distill.scale import TRAINED, UNTRAINED, measured_scale, spread
from ckd_ray.model import ColBERT, ColBERTSettings
from ckd_ray.model.maxsim import counted_rows
from tests.support import overrides


def test_spread_by_hand() -> None:
    scores = torch.tensor([[1.0, 3.0, 99.0], [0.0, 0.0, 6.0], [5.0, 7.0, 9.0]])
    counted = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    # Standard deviations with n - 1: sqrt(2), and sqrt(12); the third query has a single score.
    assert spread(scores, counted) == pytest.approx((2**0.5 + 12**0.5) / 2)
    assert spread(scores[2:], counted[2:]) == 0.0


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> Collection:
    run = tmp_path_factory.mktemp("scale")
    build_collection(load_config(None, overrides(run, tiny_backbone, tiny_collection)).collection, str(run))
    return Collection.open(str(run))


def measure(
    collection: Collection, backbone: str, *, trained: bool = False, seed: int = 3, **settings: object
) -> float:
    wanted = replace(ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48), **settings)
    model = ColBERT.from_backbone(backbone, wanted, seed=1).train()
    qrels = collection.qrels("train")
    positives = Positives.from_qrels(
        collection.num_queries("train"), qrels.query_index, qrels.passage_index, qrels.relevance, 1
    )
    found = measured_scale(model, collection, positives, trained=trained, seed=seed, precision="fp32")
    assert model.training, "the mode is left as it was"
    return found


def test_the_scale_follows_similarity_query_length_and_training(collection: Collection, tiny_backbone: str) -> None:
    plain = measure(collection, tiny_backbone)
    assert plain == measure(collection, tiny_backbone) and plain > 0.01
    assert measure(collection, tiny_backbone, seed=4) == pytest.approx(plain, rel=0.5)
    # l2 is 2 cosine - 2 a row.
    assert measure(collection, tiny_backbone, similarity="cosine") == pytest.approx(plain / 2, rel=1e-3)
    assert measure(collection, tiny_backbone, trained=True) == pytest.approx(plain * TRAINED / UNTRAINED, rel=1e-3)
    assert measure(collection, tiny_backbone, query_maxlen=24) > 1.2 * plain
    # The scale is for training, whatever queries have where they are searched with.
    assert measure(collection, tiny_backbone, query_expansion=False, training_expansion=True) == plain
    assert measure(collection, tiny_backbone, query_expansion=False) != plain


def test_the_scale_is_saved_with_the_model(tmp_path: Path, tiny_backbone: str) -> None:
    model = ColBERT.from_backbone(tiny_backbone, ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48), seed=1)
    model.save(tmp_path / "unknown")
    assert ColBERT.from_pretrained(tmp_path / "unknown").settings.score_scale is None
    model.settings = replace(model.settings, score_scale=2.5)
    model.save(tmp_path / "known")
    assert ColBERT.from_pretrained(tmp_path / "known").settings.score_scale == 2.5
    for wrong in (0, -1, "4", True):
        with pytest.raises(ValueError, match="score_scale"):
            ColBERTSettings.from_dict({"score_scale": wrong})


def test_weights_of_an_expansion() -> None:
    idf = torch.tensor([[6.0, 3.0, 1.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    rows = torch.tensor([30, 12, 12])
    assert torch.equal(expansion_weights(idf, rows, beta=0.5), 0.5 * idf)
    weights = expansion_weights(idf, rows, beta="auto", share=0.25)
    torch.testing.assert_close(weights, torch.tensor([[6.0, 3.0, 1.0], [4.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    # The share of the whole weight is as stated, and another unit of idf changes nothing.
    torch.testing.assert_close(weights[:2].sum(1) / (weights[:2].sum(1) + rows[:2]), torch.tensor([0.25, 0.25]))
    torch.testing.assert_close(expansion_weights(7 * idf, rows, beta="auto", share=0.25), weights)
    assert not expansion_weights(idf, rows, beta="auto", share=0.0).any()


def test_rows_that_count_are_those_that_are_not_zero() -> None:
    queries = torch.zeros(2, 4, 3)
    queries[0, :3, 1], queries[1, 0, 2] = 1.0, -1.0
    assert counted_rows(queries).tolist() == [3, 1]
