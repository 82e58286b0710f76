"""Labels as a training set of other libraries: every format has the scores that inspect shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from ckd_ray.cross_encoder.candidates import CandidateReader
from ckd_ray.cross_encoder.score_file import PassageIndex, import_scores
from ckd_ray.cross_encoder.scores import CrossScores
from ckd_ray.errors import UserError
from ckd_ray.inspection.export_labels import FORMATS, Block, export_labels, score_block
from ckd_ray.inspection.labelled_run import LabelledRun
from ckd_ray.runs.exports import LABELS_FILE
from tests.labelled import labelled_run

WIDTH = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, tiny_collection: str) -> str:
    """A labelled run of 24 queries, ranked to a depth of 20, of which training draws from 15."""
    return labelled_run(tmp_path_factory.mktemp("exported"), tiny_backbone, tiny_collection)


def wanted(run: str, query: int) -> list[tuple[str, float, bool]]:
    """(passage id, raw score, labelled) of the first WIDTH candidates, by a sort of what inspect shows."""
    opened = LabelledRun.open(run)
    passages = opened.with_labelled(query, opened.rankings[query][:15])
    scores = opened.distributions(query, passages).collective_scores.tolist()
    known = set(opened.positives.of(query).tolist())
    rows = [
        (opened.collection.passage_ids([p])[0], s, p in known) for p, s in zip(passages.tolist(), scores, strict=True)
    ]
    return sorted(rows, key=lambda row: (not row[2], -row[1]))[:WIDTH]


@pytest.mark.parametrize("fmt", ["pylate", "sentence-transformers"])
def test_lists_hold_labelled_passages_first_and_scaled_scores(run: str, tmp_path: Path, fmt: str) -> None:
    written = export_labels(run, fmt, out=str(tmp_path / "out"), width=WIDTH)
    assert (written["queries"], written["left_out"]) == (24, 0)
    rows = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert [row["query_id"] for row in rows] == [f"q{i}" for i in range(24)]
    for query in (0, 7, 23):
        expected = wanted(run, query)
        raw = np.array([score for _, score, _ in expected])
        assert rows[query]["document_ids"] == [passage for passage, _, _ in expected]
        assert expected[0][2] and not expected[1][2]
        assert rows[query]["scores"] == pytest.approx((raw - raw.min()) / (raw.max() - raw.min()), abs=1e-5)
    documents = dict(zip(*pq.read_table(tmp_path / "out" / "documents.parquet").to_pydict().values(), strict=True))
    queries = pq.read_table(tmp_path / "out" / "queries.parquet").to_pydict()
    assert len(documents) == 60 and len(queries["text"]) == 24
    assert {p for row in rows for p in row["document_ids"]} <= set(documents)
    assert "24 queries with 6 candidates" in (tmp_path / "out" / "README.md").read_text()


def test_raw_scores_of_the_other_formats(run: str, tmp_path: Path) -> None:
    opened = LabelledRun.open(run)
    expected = wanted(run, 5)
    scores = [score for _, score, _ in expected]
    texts = opened.collection.texts([int(passage[1:]) for passage, _, _ in expected])

    def lines(fmt: str) -> list:
        folder = tmp_path / fmt
        export_labels(run, fmt, out=str(folder), width=WIDTH, scaling="raw")
        return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]

    query, *pairs = lines("colbert")[5]
    assert query == 5 and [p for p, _ in pairs] == [int(passage[1:]) for passage, _, _ in expected]
    assert [s for _, s in pairs] == pytest.approx(scores)
    assert (tmp_path / "colbert" / "collection.tsv").read_text().splitlines()[
        pairs[0][0]
    ] == f"{pairs[0][0]}\t{texts[0]}"
    flag = lines("flagembedding")[5]
    assert (flag["query"], flag["pos"], flag["neg"]) == (opened.queries.texts[5], texts[:1], texts[1:])
    assert flag["pos_scores"] + flag["neg_scores"] == pytest.approx(scores)
    tevatron = lines("tevatron")[5]
    assert (tevatron["query"], len(tevatron["positive_passages"])) == (opened.queries.texts[5], 1)
    passages = tevatron["positive_passages"] + tevatron["negative_passages"]
    assert [(p["docid"], p["text"]) for p in passages] == list(zip([p for p, _, _ in expected], texts, strict=True))
    assert [p["score"] for p in passages] == pytest.approx(scores)
    triples = [row for row in lines("triples") if row["query"] == opened.queries.texts[5]]
    assert [row["margin"] for row in triples] == pytest.approx([scores[0] - s for s in scores[1:]])
    assert [row["negative"] for row in triples] == texts[1:]


def test_scores_are_those_of_the_distributions(run: str) -> None:
    """The score without padding against the one of training, for every query."""
    opened = LabelledRun.open(run)
    for query in range(24):
        passages = opened.with_labelled(query, opened.rankings[query][:15])
        expected = opened.distributions(query, passages).collective_scores
        torch.testing.assert_close(opened.collective_scores(query, passages), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_card_says_how_the_set_is_loaded(run: str, tmp_path: Path, fmt: str) -> None:
    """What `datasets.load_dataset(folder, name)` reads by the head; the columns are those of the text."""
    export_labels(run, fmt, out=str(tmp_path), width=WIDTH)
    start, head, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    configs = yaml.safe_load(head)["configs"]
    assert not start and [c.get("default", False) for c in configs] == [len(configs) > 1] + [False] * (len(configs) - 1)
    assert f'load_dataset("FOLDER", "{configs[0]["config_name"]}"' in text
    for config in configs:
        path = tmp_path / config["data_files"]
        if path.suffix == ".tsv":
            lines = [line.split(config["sep"]) for line in path.read_text().splitlines()]
            assert {len(line) for line in lines} == {len(config["names"])} and lines[0][0] == "0"
            continue
        columns = pq.read_schema(path).names if path.suffix == ".parquet" else json.loads(path.open().readline())
        assert all(f"`{name}`" in text for name in columns)
    left_out = {"README.md", LABELS_FILE} | ({"train.jsonl"} if fmt == "colbert" else set())
    assert {path.name for path in tmp_path.iterdir()} == left_out | {config["data_files"] for config in configs}


def test_only_an_earlier_export_is_replaced(run: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="this place is in use"):
        export_labels(run, "colbert", out=str(tmp_path / "mine"), width=WIDTH)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    for fmt in ("colbert", "triples"):
        export_labels(run, fmt, out=str(tmp_path / "empty"), width=WIDTH)
    assert not (tmp_path / "empty" / "collection.tsv").exists()


def test_a_set_without_a_query_is_not_written(run: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"every query would be left out(.|\n)*found: 40"):
        export_labels(run, "colbert", out=str(tmp_path / "labels"), width=40)
    assert not (tmp_path / "labels").exists()


def test_a_block_is_the_same_after_a_task(run: str) -> None:
    opened = LabelledRun.open(run)
    for width, queries in ((WIDTH, 5), (40, 0)):
        block = score_block(opened, 3, 8, width, "raw")
        back = Block.from_table(block.to_table(), width)
        assert len(block.queries_B) == queries
        for name in ("queries_B", "positives_B", "passages_BW", "scores_BW"):
            np.testing.assert_array_equal(getattr(back, name), getattr(block, name))


def test_queries_without_a_negative_are_left_out_where_a_format_asks_for_one(
    tmp_path: Path, tiny_backbone: str, tiny_collection: str
) -> None:
    """Two of two candidates labelled, for queries 0 to 5."""
    shutil.copytree(tiny_collection, tmp_path / "collection")
    with open(tmp_path / "collection" / "qrels.train.tsv", "a") as file:
        file.writelines(f"q{q}\t0\tp{q + 1}\t1\n" for q in range(6))
    run = labelled_run(tmp_path, tiny_backbone, str(tmp_path / "collection"))
    for fmt, queries in (("flagembedding", 18), ("tevatron", 18), ("triples", 18), ("pylate", 24), ("colbert", 24)):
        written = export_labels(run, fmt, out=str(tmp_path / fmt), width=2)
        assert (written["queries"], written["left_out"]) == (queries, 24 - queries)
        card = (tmp_path / fmt / "README.md").read_text()
        assert ("or labelled ones only, and are left out" in card) == (queries == 18)
        if queries == 18:
            lines = [json.loads(line) for line in (tmp_path / fmt / "train.jsonl").read_text().splitlines()]
            assert len(lines) == 18 and all(row.get("neg", row.get("negative_passages", True)) for row in lines)


def test_wrong_options_are_named(run: str, tmp_path: Path) -> None:
    for options, where in (({"fmt": "onnx"}, "--format"), ({"scaling": "log"}, "--scores"), ({"width": 1}, "--width")):
        with pytest.raises(UserError) as caught:
            export_labels(run, **{"fmt": "pylate", "out": str(tmp_path / "no"), **options})
        assert caught.value.where == where
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt != "colbert"])
def test_exported_labels_come_in_as_scores_of_a_teacher(run: str, tmp_path: Path, fmt: str) -> None:
    """`cross_encoder.scores` reads what is exported; triples up to a constant of the query."""
    export_labels(run, fmt, out=str(tmp_path / "labels"), width=WIDTH, scaling="raw")
    file = next(path for path in (tmp_path / "labels").iterdir() if path.stem == "train")
    size, coverage = import_scores(str(file), str(tmp_path / "scores"), CandidateReader(run, 1, 5), run)
    assert (coverage.pairs, coverage.queries, coverage.skipped) == (24 * WIDTH, 24, 0)
    index = PassageIndex.of_ids(LabelledRun.open(run).collection)
    scores = CrossScores(str(tmp_path / "scores"), "train", size)
    for query in (0, 7, 23):
        expected = wanted(run, query)
        passages = index.find([passage for passage, _, _ in expected])
        found, there = scores.scores_and_mask(np.array([query]), passages)
        shift = expected[0][1] if fmt == "triples" else 0.0
        assert there.all() and found[0].tolist() == pytest.approx([s - shift for _, s, _ in expected], abs=1e-4)
