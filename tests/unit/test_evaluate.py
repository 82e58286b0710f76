"""Measures against hand-computed values and trec_eval's conventions."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ckd_ray.errors import UserError
from ckd_ray.evaluate.measures import Measures, measure_parts, measure_run
from ckd_ray.evaluate.paired import compare_values, render, same_queries
from ckd_ray.evaluate.runs import falling_scores, read_trec_run, without_own_passage, write_trec_run
from ckd_ray.evaluate.significance import bootstrap_interval, holm, paired_difference
from ckd_ray.evaluate.table import build_table, render_table

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
    write_trec_run(path, [run(a=["p1", "p2"]), run(b=["with space"])], "tag")
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
    table = compare_values(teacher.per_query, student.per_query, ("teacher", "student"))
    assert (table["MRR@10"]["teacher"], table["MRR@10"]["student"]) == (0.125, 0.5)
    assert table["MRR@10"]["difference_mean"] == 0.375
    text = render({"dev": table}, ("teacher", "student"))
    assert "dev (4 queries)" in text and "0.1250   0.5000     +0.3750" in text


# A run as trec_eval meets it: two ties (p2 = p9 at 30, p5 = p6 = p7 at 29.5), a query without results (c), one
# without a relevant label (d), one that is not in the qrels (x), and grades 0 to 3.
HAND_QRELS = pd.DataFrame(
    [
        *[("a", "p2", 3), ("a", "p9", 1), ("a", "p4", 0), ("a", "p8", 2)],
        *[("b", "p5", 1), ("b", "p7", 2), ("c", "p1", 1), ("d", "p1", 0)],
    ],
    columns=["query_id", "doc_id", "relevance"],
)
HAND_RUN = pd.DataFrame(
    [
        *[("a", "p2", 1, 30.0), ("a", "p9", 2, 30.0), ("a", "p1", 3, 28.0), ("a", "p8", 4, 27.0)],
        *[("b", "p5", 1, 29.5), ("b", "p6", 2, 29.5), ("b", "p7", 3, 29.5), ("d", "p1", 1, 5.0), ("x", "p1", 1, 9.0)],
    ],
    columns=["query_id", "doc_id", "rank", "score"],
)


def dcg(*gains: int) -> float:
    return sum(gain / math.log2(i + 2) for i, gain in enumerate(gains))


def test_a_hand_made_run_with_ties_missing_queries_and_grades() -> None:
    """As it stands (trec_eval breaks ties by id, descending), and as we measure it (in the order of the ranks)."""
    names = ["nDCG@10", "nDCG@2", "MRR@10", "R@2", "AP@10", "P@2"]
    as_it_stands = measure_run(HAND_RUN, HAND_QRELS, names).per_query
    assert as_it_stands["nDCG@10"]["a"] == pytest.approx(dcg(1, 3, 0, 2) / dcg(3, 2, 1))  # p9 before p2
    assert as_it_stands["nDCG@2"]["b"] == pytest.approx(dcg(2, 0) / dcg(2, 1))  # p7, p6, p5
    ours = measure_run(falling_scores(HAND_RUN), HAND_QRELS, names)
    assert ours.per_query["nDCG@10"]["a"] == pytest.approx(dcg(3, 1, 0, 2) / dcg(3, 2, 1))
    assert ours.per_query["nDCG@2"]["b"] == pytest.approx(dcg(1, 0) / dcg(2, 1))
    assert ours.per_query["MRR@10"] == {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0}
    assert ours.per_query["R@2"] == pytest.approx({"a": 2 / 3, "b": 1 / 2, "c": 0.0, "d": 0.0})
    assert ours.per_query["AP@10"] == pytest.approx({"a": (1 + 1 + 3 / 4) / 3, "b": (1 + 2 / 3) / 2, "c": 0, "d": 0})
    assert ours.per_query["P@2"] == {"a": 1.0, "b": 0.5, "c": 0.0, "d": 0.0}
    assert ours.mean["R@2"] == pytest.approx((2 / 3 + 1 / 2) / 4)


@pytest.mark.parametrize("level", [0.25, 31.9, -120.0, 5000.0])
def test_ties_fall_visibly_in_single_precision_and_in_the_file(level: float, tmp_path: Path) -> None:
    ranks = [f"p{i}" for i in range(50)]
    tied = run(a=ranks).assign(score=level)
    tied.loc[40:, "score"] = level - 1.0
    fallen = falling_scores(tied)
    assert (np.diff(fallen["score"].to_numpy(np.float32)) < 0).all()
    assert fallen["score"].iloc[40] == level - 1.0, "what falls by itself stays"
    write_trec_run(str(tmp_path / "x.run"), [fallen], "t")
    written = [float(line.split()[4]) for line in (tmp_path / "x.run").read_text().splitlines()]
    assert all(a > b for a, b in itertools.pairwise(written))
    for cut in (1, 7, 45):
        qrels = pd.DataFrame([("a", ranks[cut - 1], 1)], columns=list(QRELS.columns))
        assert measure_run(fallen, qrels, ["MRR@50"]).per_query["MRR@50"]["a"] == pytest.approx(1 / cut)


def test_parts_measure_like_the_whole() -> None:
    whole = measure_run(falling_scores(HAND_RUN), HAND_QRELS, ["nDCG@10", "R@2"])
    parts = []
    for names in (["a"], ["b", "c"], ["d"]):
        chosen = [frame[frame["query_id"].isin(names)] for frame in (falling_scores(HAND_RUN), HAND_QRELS)]
        parts.append((chosen[0], chosen[1]))
    assert measure_parts(parts, ["nDCG@10", "R@2"]) == whole
    assert measure_parts([], ["R@2"]).mean == {"R@2": 0.0}


def test_a_query_does_not_find_itself() -> None:
    found = without_own_passage(run(a=["p1", "a", "p2", "p3"], b=["b", "a"], p1=["p2"]), depth=2)
    kept = {q: list(zip(g["doc_id"], g["rank"], strict=True)) for q, g in found.groupby("query_id")}
    assert kept == {"a": [("p1", 1), ("p2", 2)], "b": [("a", 1)], "p1": [("p2", 1)]}


def test_different_queries_are_reported_with_numbers() -> None:
    mine = {"MRR@10": {"a": 1.0, "b": 0.5, "c": 0.0}}
    other = {"MRR@10": {"b": 0.5, "c": 0.0, "d": 1.0, "e": 1.0}}
    with pytest.raises(UserError, match="2 in both, 1 only here, 2 only there") as caught:
        same_queries(mine, other, "--against")
    assert "a, d, e" in str(caught.value)
    same_queries(mine, {"R@5": dict.fromkeys("cab", 0.0)}, "--against")


def test_the_interval_counts_seeds() -> None:
    rng = np.random.default_rng(0)
    queries = rng.normal(0.5, 0.1, 400)
    one = np.array(bootstrap_interval(queries[None]))
    assert one == pytest.approx([queries.mean() - 1.96 * 0.005, queries.mean() + 1.96 * 0.005], abs=0.002)
    same = np.array(bootstrap_interval(np.stack([queries] * 3)))
    assert same == pytest.approx(one, abs=0.001)
    seeds = np.stack([queries - 0.1, queries, queries + 0.1])  # far more between seeds than between queries
    low, high = bootstrap_interval(seeds)
    assert low < queries.mean() - 0.06 and high > queries.mean() + 0.06
    a, b = np.zeros((3, 400)), seeds
    assert paired_difference(a, b).mean == pytest.approx(queries.mean())


def test_holm_s_correction_by_hand() -> None:
    """Smallest first: 0.01 x 4, 0.02 x 3, 0.03 x 2 = 0.06 as well, 0.5 x 1."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.6, 0.8]) == [1.0, 1.0, 1.0]
    assert holm([0.04]) == [0.04] and holm([]) == []


def measured(**values: list[float]) -> dict[str, Measures]:
    """A system of one measure, a value a query."""
    return {
        name: Measures.of({"MRR@10": {f"q{i}": value for i, value in enumerate(column)}})
        for name, column in values.items()
    }


def test_the_closing_table_by_hand() -> None:
    better = np.linspace(0.3, 1.0, 20)
    systems = measured(student=list(better), encoder=list(better - 0.1), bm25=[0.0] * 20, teacher=list(better))
    table = build_table({"dev": systems})
    row = table["splits"]["dev"]["MRR@10"]
    assert list(row["systems"]) == ["encoder", "bm25", "teacher", "student"]
    assert row["systems"]["student"]["mean"] == pytest.approx(0.65) and row["systems"]["student"]["n"] == 20
    assert row["systems"]["encoder"]["low"] < 0.55 < row["systems"]["encoder"]["high"]
    assert row["systems"]["bm25"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 20}
    differences = row["student_minus"]
    assert {name: round(d["mean"], 6) for name, d in differences.items()} == {
        "encoder": 0.1,
        "bm25": 0.65,
        "teacher": 0,
    }
    assert [d["p_holm"] for d in differences.values()] == holm([d["p"] for d in differences.values()])
    assert differences["encoder"]["p_holm"] == pytest.approx(3 / 10_001) and differences["teacher"]["p_holm"] == 1.0
    assert table["verdict"]["better"] and table["verdict"]["text"].startswith("The student is better than the encoder")

    text = render_table({**table, "left_out": {"bm25": "too large"}})
    assert max(map(len, text.splitlines())) <= 100
    assert "dev (20 queries)" in text and "Holm-corrected over the comparisons of one measure and split" in text
    lines = [line.split() for line in text.splitlines()]
    encoder, student = (next(line for line in lines if line[0] == name) for name in ("encoder", "student"))
    assert encoder[:5] == ["encoder", "as", "it", "is", "0.5500"]
    assert encoder[-4:] == ["+0.1000", "[+0.1000,", "+0.1000]", "0.0003"]
    assert student[:2] == ["student", "0.6500"] and len(student) == 4
    assert text.endswith("BM25: left out: too large")
    assert "nothing was measured" in render_table(build_table({}))


def test_the_verdict_is_on_the_split_with_the_most_queries() -> None:
    worse = measured(student=[0.4, 0.5], encoder=[0.5, 0.5], teacher=[0.1, 0.1])
    good = measured(student=[1.0] * 12, encoder=[0.5] * 12)
    larger = build_table({"dev": worse, "test": good})["verdict"]
    assert larger["better"] and larger["split"] == "test"
    verdict = build_table({"test": measured(student=[1.0] * 2, encoder=[0.5] * 2), "dev": worse})["verdict"]
    assert not verdict["better"] and (verdict["split"], verdict["measure"]) == ("dev", "MRR@10")
    assert (verdict["student"], verdict["encoder"]) == (pytest.approx(0.45), 0.5)
    assert "The student is not better than the encoder as it is: MRR@10 0.4500 against 0.5000 on dev" in verdict["text"]
    assert "ckd-ray tune" in verdict["text"]
    assert build_table({"dev": measured(student=[0.5] * 20), "test": good})["verdict"]["split"] == "test"
    equal = build_table({"dev": measured(student=[0.5, 1.0], encoder=[1.0, 0.5])})["verdict"]
    assert not equal["better"]
    lucky = build_table({"dev": measured(student=[0.5, 1.0], encoder=[0.5, 0.9])})["verdict"]
    assert lucky["better"] and "no more than chance" in lucky["text"]
    assert build_table({"dev": measured(student=[1.0], teacher=[0.5])})["verdict"] is None


def test_systems_of_different_queries_are_no_table() -> None:
    systems = {**measured(student=[1.0, 0.0]), **measured(encoder=[1.0])}
    with pytest.raises(ValueError, match="not measured on the same queries"):
        build_table({"dev": systems})
