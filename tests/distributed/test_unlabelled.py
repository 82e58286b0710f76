"""Queries without labels in a whole small run: ranked, labelled and exported like others; training goes on without."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ckd_ray.inspection.export_labels import export_labels
from ckd_ray.inspection.labelled_run import LabelledRun
from tests.finished import UNLABELLED, Finished

ALL = [f"q{i}" for i in range(24)]


@pytest.fixture(scope="session")
def run(finished_run: Finished) -> Path:
    """The run that all share, where three of 24 training queries have no label."""
    return finished_run.run


def test_they_are_ranked_labelled_and_scored_by_the_ensemble(run: Path) -> None:
    for stage, pattern in (("rankings", "train-*.parquet"), ("labels", "train-*.parquet")):
        rows = [
            row for path in sorted((run / stage).glob(pattern)) for row in pq.read_table(path)["query_id"].to_pylist()
        ]
        assert list(dict.fromkeys(rows)) == ALL, stage
    for scorer in ("encoder", "bm25"):
        pairs = [r for p in sorted((run / "ensemble" / scorer).glob("*.parquet")) for r in pq.read_table(p).to_pylist()]
        counts = {query: sum(r["query_id"] == query for r in pairs) for query in ALL}
        assert {counts[query] for query in UNLABELLED} == {15}  # distill.negatives_depth, and no labelled passage


def test_the_student_is_trained_on_the_others(run: Path) -> None:
    manifest = json.loads((run / "student" / "_manifest.json").read_text())
    assert manifest["figures"]["count"] == 6 and (run / "student" / "model.safetensors").is_file()
    opened = LabelledRun.open(str(run))
    left = {opened.queries.ids[q] for q in opened.positives.labelled_queries}
    assert left == set(ALL) - UNLABELLED


def test_their_exported_labels_are_the_teacher_s(run: Path, tmp_path: Path) -> None:
    """In the order of the whole score; where a format asks for a positive, it is the teacher's best."""
    opened = LabelledRun.open(str(run))
    written = export_labels(str(run), "pylate", out=str(tmp_path / "lists"), width=6, scaling="raw")
    assert (written["queries"], written["unlabelled"], written["left_out"]) == (24, 3, 0)
    lists = {row["query_id"]: row for row in pq.read_table(tmp_path / "lists" / "train.parquet").to_pylist()}
    export_labels(str(run), "tevatron", out=str(tmp_path / "tevatron"), width=6)
    lines = [json.loads(line) for line in (tmp_path / "tevatron" / "train.jsonl").read_text().splitlines()]
    sides = {
        line["query_id"]: tuple([p["docid"] for p in line[f"{side}_passages"]] for side in ("positive", "negative"))
        for line in lines
    }
    assert list(lists) == list(sides) == ALL
    for query in UNLABELLED:
        number = opened.queries.ids.index(query)
        passages = opened.with_labelled(number, opened.rankings[number][:15])
        scores = opened.distributions(number, passages).collective_scores.tolist()
        best = sorted(zip(scores, opened.collection.passage_ids(passages), strict=True), key=lambda pair: -pair[0])[:6]
        assert lists[query]["document_ids"] == [passage for _, passage in best]
        assert lists[query]["scores"] == pytest.approx([score for score, _ in best], rel=1e-5)
        assert sides[query] == ([best[0][1]], [passage for _, passage in best[1:]])
    card = (tmp_path / "tevatron" / "README.md").read_text()
    assert (
        "3 of the queries have no label: their order is the teacher's, and the passage that it scores highest" in card
    )
