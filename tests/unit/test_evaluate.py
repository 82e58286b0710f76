"""Measures against hand-computed values and trec_eval's conventions."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ckd_ray.errors import UserError
from ckd_ray.evaluate.compare import compare, render
from ckd_ray.evaluate.measures import measure_run
from ckd_ray.evaluate.runs import falling_scores, read_trec_run, write_trec_run
from ckd_ray.evaluate.significance import paired_difference

QRELS = pd.DataFrame(
    [("a", "p1", 2), ("a", "p2", 1), ("a", "p3", 0), ("b", "p4", 1), ("c", "p5", 3), ("d", "p1", 0)],
    columns=["query_id", "doc_id", "relevance"],
)


def run(**ranked: list[str]) -> pd.DataFrame:
    rows = [(q, p, i + 1, 10.0 - i) for q, passages in ranked.items() for i, p in enumerate(passages)]
    return pd.DataFrame(rows, columns=["query_id", "doc_id", "rank", "score"])


def test_measures_by_hand() -> None:
    """Query c has no results and d no relevant label; both count as zero."""
    found = measure_run(run(a=["p3", "p2", "p1"], b=["p9", "p4"]), QRELS, ["MRR@10", "nDCG@10", "R@1", "R@100"])
    assert found.per_query["MRR@10"] == {"a": 0.5, "b": 0.5, "c": 0.0, "d": 0.0}
    ideal = 2 + 1 / math.log2(3)
    assert found.per_query["nDCG@10"]["a"] == pytest.approx((1 / math.log2(3) + 2 / math.log2(4)) / ideal)
    assert found.per_query["nDCG@10"]["b"] == pytest.approx(1 / math.log2(3))
    assert found.per_query["R@100"] == {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0}
    assert found.mean["MRR@10"] == 0.25 and found.mean["R@1"] == 0.0


def test_threshold_moves_binary_measures_only() -> None:
    ranked = run(a=["p2", "p1"], c=["p5"])
    one = measure_run(ranked, QRELS, ["MRR@10", "nDCG@10"], relevance_threshold=1)
    two = measure_run(ranked, QRELS, ["MRR@10", "nDCG@10"], relevance_threshold=2)
    assert (one.per_query["MRR@10"]["a"], two.per_query["MRR@10"]["a"]) == (1.0, 0.5)
    assert one.per_query["nDCG@10"] == two.per_query["nDCG@10"]


def test_equal_to_trec_eval_on_a_graded_run_with_missing_queries() -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = np.random.default_rng(3)
    qrels = {f"q{q}": {f"p{p}": int(rng.integers(0, 4)) for p in rng.choice(40, 15, False)} for q in range(12)}
    results = {f"q{q}": {f"p{p}": float(rng.normal()) for p in rng.choice(40, 25, False)} for q in range(9)}
    frame = pd.DataFrame(
        [
            (q, p, i + 1, s)
            for q, d in results.items()
            for i, (p, s) in enumerate(sorted(d.items(), key=lambda x: -x[1]))
        ],
        columns=["query_id", "doc_id", "rank", "score"],
    )
    labels = pd.DataFrame([(q, p, g) for q, d in qrels.items() for p, g in d.items()], columns=list(QRELS.columns))
    mine = measure_run(frame, labels, ["nDCG@10", "R@10", "AP@100"])
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.10", "map_cut.100"}).evaluate(results)
    for name, key in (("nDCG@10", "ndcg_cut_10"), ("R@10", "recall_10"), ("AP@100", "map_cut_100")):
        expected = [theirs[q][key] if q in theirs else 0.0 for q in qrels]
        assert [mine.per_query[name][q] for q in qrels] == pytest.approx(expected)
        assert mine.mean[name] == pytest.approx(sum(expected) / 12)


def test_no_results_at_all() -> None:
    assert measure_run(run(), QRELS, ["MRR@10"]).mean == {"MRR@10": 0.0}


def test_ties_are_measured_in_the_order_that_is_shown() -> None:
    """trec_eval would put p9 before p1 on a tie; our rank says p1."""
    tied = run(a=["p1", "p9", "p2"]).assign(score=1.0)
    assert measure_run(tied, QRELS, ["nDCG@1"]).per_query["nDCG@1"]["a"] == 0.0
    fallen = falling_scores(tied)
    assert measure_run(fallen, QRELS, ["nDCG@1"]).per_query["nDCG@1"]["a"] == 1.0
    assert fallen["score"].is_monotonic_decreasing and fallen["score"].is_unique


def test_run_files_round_trip(tmp_path: Path) -> None:
    path = str(tmp_path / "x.run")
    write_trec_run(path, run(a=["p1", "p2"], b=["with space"]), "tag")
    assert Path(path).read_text().splitlines()[0] == "a Q0 p1 1 10.000000 tag"
    back = read_trec_run(path)
    assert back["doc_id"].tolist() == ["p1", "p2", "with%20space"] and back["rank"].tolist() == [1, 2, 1]


def test_a_bad_line_of_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.run").write_text("a Q0 p1 1 2.0 t\na Q0 p1 one 2.0 t\n")
    with pytest.raises(UserError, match=r"x\.run:2: not a line of a TREC run"):
        read_trec_run(str(tmp_path / "x.run"))


def test_randomisation_test_against_all_sign_patterns() -> None:
    a = np.array([0.1, 0.5, 0.3, 0.2, 0.9, 0.4, 0.0, 0.6])
    b = np.array([0.3, 0.6, 0.2, 0.5, 1.0, 0.8, 0.1, 0.6])
    d = b - a
    patterns = itertools.product((-1, 1), repeat=len(d))
    exact = np.mean([abs(np.mean(d * s)) >= abs(d.mean()) - 1e-12 for s in patterns])
    found = paired_difference(a, b)
    assert found.mean == pytest.approx(d.mean())
    assert found.p == pytest.approx(exact, abs=0.01)
    assert found.low < found.mean < found.high
    assert found == paired_difference(a, b)


def test_equal_systems_do_not_differ() -> None:
    same = np.array([0.2, 0.4])
    found = paired_difference(same, same)
    assert (found.mean, found.p, found.low, found.high) == (0.0, 1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="the same queries"):
        paired_difference(same, same[:1])


def test_the_table() -> None:
    teacher = measure_run(run(a=["p3", "p1"]), QRELS, ["MRR@10"])
    student = measure_run(run(a=["p1"], b=["p4"]), QRELS, ["MRR@10"])
    table = compare(teacher, student)
    assert (table["MRR@10"]["teacher"], table["MRR@10"]["student"]) == (0.125, 0.5)
    assert table["MRR@10"]["difference_mean"] == 0.375
    text = render({"dev": table})
    assert "dev (4 queries)" in text and "0.1250   0.5000     +0.3750" in text
