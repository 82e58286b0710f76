"""The ensemble: fitted weights, shares, and BM25 of single pairs."""

from __future__ import annotations

import numpy as np
import pytest

from ckd_ray.ensemble.bm25 import Statistics
from ckd_ray.ensemble.weights import ScorerWeight, factor, fit_weights, spreads
from ckd_ray.evaluate.bm25 import K1, B, words


def _drawn(weights: list[float], queries: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels drawn from a conditional logit with these weights; lists of 3 to 8 candidates."""
    rng = np.random.default_rng(seed)
    x_BKF = rng.normal(size=(queries, 8, len(weights))) * np.array([5.0, 0.1, 2.0])[: len(weights)]
    valid_BK = np.arange(8) < rng.integers(3, 9, queries)[:, None]
    scores_BK = np.where(valid_BK, x_BKF @ np.array(weights), -np.inf)
    return x_BKF, (scores_BK + rng.gumbel(size=scores_BK.shape)).argmax(1), valid_BK


def test_the_weights_that_drew_the_labels_are_found() -> None:
    wanted = [0.3, 8.0, 0.25]
    assert fit_weights(*_drawn(wanted, 20000)) == pytest.approx(wanted, rel=0.1)


def test_the_weights_are_where_the_literal_likelihood_is_highest() -> None:
    features_BKF, label_B, valid_BK = _drawn([0.3, 8.0], 200)

    def likelihood(weights: np.ndarray) -> float:
        total = 0.0
        for x_KF, label, valid_K in zip(features_BKF, label_B, valid_BK, strict=True):
            scores_K = (x_KF @ weights)[valid_K]
            total += float((x_KF @ weights)[label] - np.log(np.exp(scores_K).sum()))
        return total

    found = fit_weights(features_BKF, label_B, valid_BK)
    best = likelihood(found)
    for change in ([0.02, 0], [-0.02, 0], [0, 0.5], [0, -0.5], [0.02, -0.5]):
        assert likelihood(found + np.array(change)) < best


def test_a_scorer_that_knows_nothing_or_the_opposite_gets_no_weight() -> None:
    features_BKF, label_B, valid_BK = _drawn([0.3, 0.0, -0.5], 20000)
    found = fit_weights(features_BKF, label_B, valid_BK)
    assert found[2] == 0.0
    assert abs(found[1] * 0.1) < 0.03  # in standard deviations of its scores
    assert 0.2 < found[0] < 0.3  # less than what drew the labels: what the third one says is noise to it now


def test_a_constant_scorer_and_an_empty_sample_get_no_weight() -> None:
    features_BKF, label_B, valid_BK = _drawn([0.3, 8.0], 100)
    features_BKF[:, :, 1] = 7.0
    assert fit_weights(features_BKF, label_B, valid_BK)[1] == 0.0
    nothing = np.zeros((0, 1, 2)), np.zeros(0, np.int64), np.zeros((0, 1), bool)
    assert fit_weights(*nothing).tolist() == [0.0, 0.0]


def test_spreads_by_hand() -> None:
    features_BKF = np.array([[[1.0], [3.0], [99.0]], [[0.0], [0.0], [4.0]]])
    valid_BK = np.array([[True, True, False], [True, True, True]])
    assert spreads(features_BKF, valid_BK)[0] == pytest.approx((2**0.5 + (16 / 3) ** 0.5) / 2)


def test_factors_by_hand() -> None:
    scorer = ScorerWeight(fitted=20.0, spread=0.1)
    assert factor(scorer, "auto", 0.0, 4.0, 1.0) == 20.0
    assert factor(scorer, "auto", 0.2, 4.0, 1 / 0.7) == pytest.approx(20 / 0.7)
    # A share of 0.2 beside another of 0.3: 0.2 / 0.5 of the teacher's spread of 4.
    assert factor(scorer, 0.2, 0.5, 4.0, 1.0) == pytest.approx(0.4 * 4 / 0.1)
    assert factor(ScorerWeight(1.0, 0.0), 0.2, 0.2, 4.0, 1.0) == 0.0


def test_bm25_of_pairs_is_that_of_the_baseline() -> None:
    bm25s = pytest.importorskip("bm25s")
    texts = [
        "Glaucoma is a disease of the eye", "Treatment of glaucoma: drops, laser, surgery",
        "The flu is an infection, and flu shots prevent the flu", "Nothing of the kind", "eye eye eye drops",
    ]  # fmt: skip
    queries = ["what are treatments for glaucoma of the eye", "flu flu shots", "unknown words alone"]
    corpus = [words(text) for text in texts]
    vocabulary: dict[str, int] = {}
    numbers = [[vocabulary.setdefault(word, len(vocabulary)) for word in passage] for passage in corpus]
    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index((numbers, vocabulary), show_progress=False)
    wanted = {word for query in queries for word in words(query)}
    statistics = Statistics(
        passages=len(texts),
        mean_length=sum(map(len, corpus)) / len(corpus),
        frequencies={word: sum(word in passage for passage in corpus) for word in wanted},
    )
    for query in queries:
        known = [vocabulary[word] for word in words(query) if word in vocabulary]
        literal = index.get_scores_from_ids(known) if known else np.zeros(len(texts))
        assert statistics.scores(words(query), corpus) == pytest.approx(literal, abs=1e-5)
