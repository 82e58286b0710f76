"""Own data as it is: columns by any name, titles, fractions as relevance, hub layouts, and the hub's file system."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from ckd_ray.checks import load_config
from ckd_ray.config import ConfigError
from ckd_ray.data import Collection, InputError, build_collection, source_signature
from ckd_ray.errors import UserError
from ckd_ray.evaluate.measures import measure_run

DOCUMENTS = [{"docno": 1, "headline": "A", "story": "one"}, {"docno": 2, "headline": "", "story": 'two "2"\nlines'}]
QUESTIONS = [{"qid": "x", "question": "one?"}, {"qid": "y", "question": "two?"}]
CLICKS = [{"asked": "x", "docno": 1, "rate": 0.75}, {"asked": "x", "docno": 2, "rate": 0.125}]
COLUMNS = (
    "collection.columns={id: [docno, qid], text: [story, question], title: headline, query: asked, passage: docno, "
    "relevance: rate}"
)


def build(out: Path, *values: str) -> Collection:
    build_collection(load_config(None, ["collection.limit=null", *values]).collection, str(out))
    return Collection.open(str(out))


def as_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = Path(f"{path}.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = Path(f"{path}.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = Path(f"{path}.csv.gz")
    with gzip.open(path, "wt", newline="") as file:
        pd.DataFrame(rows).to_csv(file, index=False)
    return path


def as_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    path = Path(f"{path}.tsv")
    lines = ["\t".join(rows[0]), *("\t".join(str(v).replace("\n", " ") for v in row.values()) for row in rows)]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def files(folder: Path, write: Any) -> list[str]:
    folder.mkdir()
    return [
        f"collection.passages={write(folder / 'd', DOCUMENTS)}",
        f"collection.queries.train={write(folder / 'q', QUESTIONS)}",
        f"collection.qrels.train={write(folder / 'c', CLICKS)}",
    ]


@pytest.mark.parametrize("write", [as_json_lines, as_parquet, as_csv, as_tsv])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "beir"])
def test_columns_by_their_roles_in_every_form(tmp_path: Path, write: Any, kind: str) -> None:
    """A file is read by the end of its name, whatever the format calls usual."""
    c = build(tmp_path / "out", f"collection.format={kind}", *files(tmp_path / "in", write), COLUMNS,
              "collection.positive_grade=0.5")  # fmt: skip
    second = 'two "2" lines' if write is as_tsv else 'two "2"\nlines'
    assert c.texts([0, 1]) == ["A one", second] and c.passage_ids([0, 1]) == ["1", "2"]
    assert c.queries("train").texts == (["one?"] if kind == "beir" else ["one?", "two?"])
    assert c.qrels("train").relevance.tolist() == [0.75, 0.125]
    assert c.positives("train", 0.5).of(0).tolist() == [0] and c.positives("train", 0.125).of(0).tolist() == [0, 1]


@pytest.mark.parametrize("write", [as_json_lines, as_parquet, as_csv, as_tsv])
def test_a_wrong_name_is_told_with_the_names_that_are_there(tmp_path: Path, write: Any) -> None:
    values = ["collection.format=jsonl", *files(tmp_path / "in", write), "collection.positive_grade=0.5"]

    def told(role: str, name: str) -> str:
        with pytest.raises(UserError) as caught:
            build(tmp_path / "out", *values, COLUMNS, f"collection.columns.{role}={name}")
        return str(caught.value)

    for role, name, there in (
        ("text", "[question, body]", "docno, headline, story"),
        ("title", "head", "docno, headline, story"),
        ("passage", "doc", "asked, docno, rate"),
        ("relevance", "clicks", "asked, docno, rate"),
    ):
        said = told(role, name)
        assert f"{name.strip('[]').replace(', ', ' or ')} (collection.columns.{role})" in said and there in said


def test_a_column_that_may_be_the_relevance_is_asked_for(tmp_path: Path) -> None:
    """Labels without a grade count as 1 only where the file holds ids alone."""
    values = files(tmp_path / "in", as_parquet)
    pq.write_table(pa.table({"qid": ["x"], "pid": ["1"], "rate": [0.1]}), tmp_path / "in" / "c.parquet")
    columns = "collection.columns={id: [docno, qid], text: [story, question]}"
    with pytest.raises(UserError, match=r"(?s)no column relevance.*found: qid, pid, rate"):
        build(tmp_path / "out", "collection.format=parquet", *values, columns)
    as_json_lines(tmp_path / "in" / "c", [{"qid": "x", "pid": "1", "rate": 0.1}])
    with pytest.raises(InputError, match=r"c\.jsonl:1: no relevance; .* found qid, pid, rate"):
        build(tmp_path / "out", "collection.format=parquet", *values, columns,
              f"collection.qrels.train={tmp_path / 'in' / 'c.jsonl'}")  # fmt: skip


def test_rows_of_one_file_agree_in_their_columns(tmp_path: Path) -> None:
    """JSON lines: a grade that the first row has is expected in all of them; a title is not."""
    values = files(tmp_path / "in", as_json_lines)
    as_json_lines(tmp_path / "in" / "d", [{**DOCUMENTS[0], "headline": None}, {"docno": 2, "story": "b"}])
    as_json_lines(tmp_path / "in" / "c", [{"asked": "x", "docno": 1, "rate": 1}, {"asked": "y", "docno": 2}])
    with pytest.raises(InputError) as caught:
        build(tmp_path / "out", "collection.format=jsonl", *values, COLUMNS)
    assert len(caught.value.problems) == 1 and "c.jsonl:2: no relevance" in caught.value.problems[0]


def test_grades_that_are_no_numbers(tmp_path: Path) -> None:
    values = ["collection.format=jsonl", *files(tmp_path / "in", as_json_lines), COLUMNS]
    given = ['"high"', "true", "null", "NaN", "1" + "0" * 400, "1e999", "[1]", '"0.5"', '"1_0"']
    rows = [f'{{"asked": "x", "docno": {i}, "rate": {grade}}}\n' for i, grade in enumerate(given)]
    (tmp_path / "in" / "c.jsonl").write_text("".join(rows))
    with pytest.raises(InputError) as caught:
        build(tmp_path / "out", *values)
    told = {int(p.partition("c.jsonl:")[2].partition(":")[0]): p for p in caught.value.problems}
    assert sorted(told) == [1, 2, 3, 4, 5, 6, 7, 9]  # the eighth is a number in quotation marks
    assert all(("out of range" if n in (5, 6) else "not a number") in told[n] for n in told)


def test_csv_that_is_broken(tmp_path: Path) -> None:
    values = ["collection.format=csv", *files(tmp_path / "in", as_json_lines), COLUMNS, "collection.positive_grade=0.5"]
    values.append(f"collection.passages={tmp_path / 'd.csv'}")
    (tmp_path / "d.csv").write_text('docno,headline,story\n1,A,"one\ntwo"\n2,B\n\n3,C,x\n')
    with pytest.raises(InputError) as caught:
        build(tmp_path / "out", *values)
    assert [p.partition(";")[0].rpartition("d.csv")[2] for p in caught.value.problems[:2]] == [
        ":4: wrong number of columns",
        ":5: wrong number of columns",
    ]
    (tmp_path / "d.csv").write_text('docno,headline,story\n1,A,one\n2,B,"without an end\n')
    with pytest.raises(UserError, match=r"d\.csv:3: the file cannot be read"):
        build(tmp_path / "out", *values)


def nano(folder: Path) -> Path:
    """A collection in the layout of NanoBEIR's repositories: a folder of Parquet a part, labels without a grade."""
    parts = {
        "corpus": {"_id": ["d1", "d2", "d3"], "text": ["one", "two", "three"]},
        "queries": {"_id": ["q1", "q2"], "text": ["1?", "2?"]},
        "qrels": {"query-id": ["q1", "q2", "q2"], "corpus-id": ["d1", "d2", "d3"]},
    }
    for name, columns in parts.items():
        (folder / name).mkdir(parents=True)
        pq.write_table(pa.table(columns), folder / name / "train-00000-of-00001.parquet")
    return folder


def check_nano(c: Collection) -> None:
    assert c.passage_ids(range(3)) == ["d1", "d2", "d3"] and c.queries("train").ids == ["q1", "q2"]
    assert c.qrels("train").relevance.tolist() == [1, 1, 1] and c.texts([2]) == ["three"]


def test_the_layout_of_nanobeir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nano(tmp_path / "in")
    check_nano(build(tmp_path / "out", "collection.format=beir", f"collection.path={folder}", "collection.test=train"))
    said = capsys.readouterr().err
    assert "has no column of relevance; every row counts as grade 1" in said
    assert "2 of 2 test queries are training queries, too" in said


def test_labels_with_a_list_of_passages(tmp_path: Path) -> None:
    """Some data sets have a row a query; a list with something else in it is refused with its row."""
    folder = nano(tmp_path / "in")
    path = folder / "qrels" / "train-00000-of-00001.parquet"
    pq.write_table(pa.table({"query-id": ["q1", "q2"], "corpus-id": [["d1"], ["d2", "d3"]]}), path)
    check_nano(build(tmp_path / "out", "collection.format=beir", f"collection.path={folder}"))
    pq.write_table(pa.table({"query-id": ["q1", "q2"], "corpus-id": [["d1"], ["d2", None]]}), path)
    with pytest.raises(InputError, match="row 2: not an id"):
        build(tmp_path / "out", "collection.format=beir", f"collection.path={folder}")


class FakeHub(DirFileSystem):
    """A folder as the hub's file system: paths without the protocol, no times of change."""

    protocol = "hf"
    folder = ""

    def __init__(self, **options: Any) -> None:
        super().__init__(path=self.folder, fs=LocalFileSystem(), **options)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("hf://").rstrip("/")

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        if "unreachable" in path:
            raise ConnectionError("no network here")
        found: dict[str, Any] = super().info(path, **options)
        return {key: found[key] for key in ("name", "size", "type")}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder behind hf://."""
    monkeypatch.setattr(FakeHub, "folder", str(tmp_path / "hub"))
    before = fsspec.get_filesystem_class("hf")
    fsspec.register_implementation("hf", FakeHub, clobber=True)
    FakeHub.clear_instance_cache()
    yield tmp_path / "hub"
    fsspec.register_implementation("hf", before, clobber=True)


def test_data_sets_of_the_hub(tmp_path: Path, hub: Path) -> None:
    """By the file system that the protocol hf:// has in fsspec: folders, patterns, lines, gzip."""
    nano(hub / "datasets" / "someone" / "NanoX")
    values = ["collection.format=beir", "collection.path=hf://datasets/someone/NanoX"]
    check_nano(build(tmp_path / "out", *values))
    before = source_signature(load_config(None, values).collection)
    with gzip.open(hub / "datasets" / "someone" / "NanoX" / "lines.jsonl.gz", "wt") as file:
        file.write('{"_id": "d1", "text": "x"}\n{"_id": "d2", "text": "y"}\n{"_id": "d3", "text": "three"}\n')
    values.append("collection.passages=hf://datasets/someone/NanoX/lines.jsonl.gz")
    check_nano(build(tmp_path / "out", *values))
    assert source_signature(load_config(None, values).collection) != before
    pattern = "collection.qrels.train=hf://datasets/someone/NanoX/qrels/{}-*.parquet"
    check_nano(build(tmp_path / "out", *values, pattern.format("train")))
    with pytest.raises(UserError, match=r"(?s)no file has such a name.*found: train-00000-of-00001.parquet"):
        build(tmp_path / "out", *values, pattern.format("test"))
    with pytest.raises(UserError, match="this folder does not exist"):
        build(tmp_path / "out", "collection.format=beir", "collection.path=hf://datasets/someone/else")
    with pytest.raises(UserError, match=r"hf://datasets/unreachable: the hub cannot be read\n  found: no network here"):
        build(tmp_path / "out", "collection.format=beir", "collection.path=hf://datasets/unreachable")


def test_without_the_hub_there_is_a_message(tmp_path: Path) -> None:
    """Tests are offline (HF_HUB_OFFLINE), so this is huggingface_hub's own file system refusing."""
    with pytest.raises(UserError, match=r"hf://datasets/no-one/nothing: the hub cannot be read"):
        build(tmp_path / "out", "collection.format=beir", "collection.path=hf://datasets/no-one/nothing")


def test_splits_that_share_a_file_of_queries_take_those_that_their_labels_name(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    as_json_lines(folder / "passages", [{"id": "1", "text": "one"}])
    as_json_lines(folder / "queries", [{"id": i, "text": i} for i in "abc"])
    as_json_lines(folder / "qrels.train", [{"qid": "a", "pid": "1", "score": 1}])
    values = ["collection.format=jsonl", f"collection.path={folder}"]
    assert build(tmp_path / "out", *values).queries("train").ids == ["a", "b", "c"]  # the others have no label
    as_json_lines(folder / "qrels.test", [{"qid": "b", "pid": "1", "score": 1}])
    c = build(tmp_path / "out", *values)
    assert (c.queries("train").ids, c.queries("test").ids) == (["a"], ["b"])


def test_whole_grades_are_integers_whatever_their_type(tmp_path: Path) -> None:
    values = files(tmp_path / "in", as_parquet)
    pq.write_table(pa.table({"asked": ["x"], "docno": [1], "rate": [2.0]}), tmp_path / "in" / "c.parquet")
    c = build(tmp_path / "out", "collection.format=parquet", *values, COLUMNS, "collection.positive_grade=2.0")
    assert c.qrels("train").relevance.dtype == np.int64 and c.qrels("train").relevance.tolist() == [2]
    assert load_config(None, ["collection.positive_grade=2.0"]).collection.positive_grade == 2
    one, other = (load_config(None, [f"evaluate.relevance_threshold={n}"]).evaluate for n in ("2", "2.0"))
    assert json.dumps(one.for_fingerprint()) == json.dumps(other.for_fingerprint())
    assert '"relevance_threshold": 2,' in json.dumps(one.for_fingerprint())


def test_measures_count_fractions_from_the_threshold_on() -> None:
    run = pd.DataFrame({"query_id": ["q"] * 3, "doc_id": ["a", "b", "c"], "score": [3.0, 2.0, 1.0]})
    labels = pd.DataFrame({"query_id": ["q"] * 3, "doc_id": ["a", "b", "c"], "relevance": [0.1, 0.5, 0.9]})
    whole = labels.assign(relevance=[0, 1, 1])
    names = ["MRR@10", "nDCG@10", "R@2"]
    assert measure_run(run, labels, names, 0.5).mean == measure_run(run, whole, names).mean
    assert measure_run(run, labels, names, 0.9).mean["MRR@10"] == pytest.approx(1 / 3)
    assert measure_run(run, labels.assign(relevance=[1, 2, 3]), names, 2.5).mean["MRR@10"] == pytest.approx(1 / 3)


def test_keys_that_have_no_meaning_are_named() -> None:
    for value, key in (
        ("collection.format=msmarco", "collection.columns"),
        ("collection.format=docstrings", "collection.columns"),
        ("run.storage=hf://datasets/me/runs", "run.storage"),
    ):
        values = ["collection.path=x", "collection.columns.text=body"] if "format" in value else []
        with pytest.raises(ConfigError, match=key):
            load_config(None, [*values, value])
    with pytest.raises(ConfigError, match=r"collection\.columns\.titel: "):
        load_config(None, ["collection.format=jsonl", "collection.path=x", "collection.columns.titel=x"])
