"""Bad input of every format: nothing ends in a traceback, nothing is dropped without a word, nothing stays behind."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ckd_ray.checks import load_config
from ckd_ray.data import Collection, InputError, build_collection
from ckd_ray.data.docstrings import docstring_source
from ckd_ray.data.problems import Problems
from ckd_ray.errors import UserError
from tests.sound import FORMATS, labels, texts

Content = str | bytes | pa.Table | None


def build(kind: str, tmp_path: Path, files: dict[str, Content], *more: str) -> Collection:
    """A sound small collection with some files replaced (None: removed)."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir(exist_ok=True)
    FORMATS[kind](folder)
    for name, content in files.items():
        if content is None:
            (folder / name).unlink()
        elif isinstance(content, pa.Table):
            pq.write_table(content, folder / name)
        else:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    settings = load_config(
        None, [f"collection.format={kind}", f"collection.path={folder}", "collection.limit=null", *more]
    )
    build_collection(settings.collection, str(out))
    return Collection.open(str(out))


def bad_utf8() -> pa.Table:
    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.int32([0, 2]).tobytes()), pa.py_buffer(b"\xff\xfe")]
    )
    return pa.table({"passage_id": ["p1"], "text": text})


def corrupt(tmp: Path) -> bytes:
    rng = np.random.default_rng(0)
    table = texts("passage_id", [f"p{i}" for i in range(9000)], [rng.bytes(8).hex() for _ in range(9000)])
    pq.write_table(table, tmp, compression="zstd")
    data = bytearray(tmp.read_bytes())
    data[5000:9000] = rng.bytes(4000)
    return bytes(data)


SQUASHED = gzip.compress("".join(f"p{i}\ttext {i * i}\n" for i in range(5000)).encode())

# format, file, what it holds, what the message says
WRONG_TYPE = "column {} has the wrong type\n  expected: {}\n  found: {}".format
REFUSED: list[tuple[str, str, Content, str]] = [
    # The first line of qrels is a header only if it names its columns.
    ("msmarco", "qrels.train.tsv", "q1\tp1\tnan\nq2\tp2\t1\n", "qrels.train.tsv:1: the grade is not a number"),
    ("msmarco", "qrels.train.tsv", "q1\tp1\t1e999\nq2\tp2\t1\n", "qrels.train.tsv:1: the grade is out of range"),
    ("msmarco", "qrels.train.tsv", "q1\tp1\t0.5\n", "no training query has a positive label; expected a label of"),
    ("msmarco", "qrels.train.tsv", "q1\tp1\thigh\nq2\tp2\t1\n", ":1: the grade is not a number"),
    ("msmarco", "qrels.train.tsv", "q1 0 p1 1\nqid 0 pid rel\n", "qrels.train.tsv:2: the grade is not a number"),
    ("msmarco", "qrels.train.tsv", "q1\t0\tp1\t" + "9" * 5000, "qrels.train.tsv:1: the grade is out of range"),
    ("msmarco", "qrels.train.tsv", "q1\t0\tp1\t-2147483649", "qrels.train.tsv:1: the grade is out of range"),
    ("msmarco", "qrels.train.tsv", "q1\t0\tp1\t²\n", "the grade is not a number"),
    ("msmarco", "qrels.train.tsv", "q1\t0\tp1\t1\n\n", "qrels.train.tsv:2: wrong number of columns"),
    ("msmarco", "qrels.train.tsv", "q1\t0\tp1\t1\textra\n", "expected query, 0, passage, grade, found 5"),
    ("msmarco", "qrels.train.tsv", "", "no training query has a positive label; expected a label of grade 1"),
    ("msmarco", "qrels.train.tsv", "q1\t0\tp1\t-1\n", "no training query has a positive label"),
    ("msmarco", "queries.train.tsv", "", "a label of an unknown query"),
    ("msmarco", "queries.train.tsv", b"q1\ta\nq2\t\xc3(\n", "queries.train.tsv:2: byte 4 of the line is not UTF-8"),
    ("msmarco", "collection.tsv", "p1\tx\n".encode("utf-16"), "collection.tsv:1: byte 1 of the line is not UTF-8"),
    ("msmarco", "collection.tsv", "p1\tx\np2\ty\n\n", "collection.tsv:3: a line without a tab"),
    ("msmarco", "collection.tsv", "bad\np1\tx\np1\tz\n", ":3: a duplicate passage id; expected unique ids"),
    ("beir", "corpus.jsonl", '{"_id": "p\\ud800", "text": "x"}\n', "corpus.jsonl:1: half a surrogate pair in an id"),
    ("beir", "queries.jsonl", '{"_id": "q\\udfff", "text": "x"}\n', "queries.jsonl:1: half a surrogate pair in an id"),
    ("beir", "corpus.jsonl", "[" * 200_000, "corpus.jsonl:1: not valid JSON; expected one object a line"),
    ("beir", "corpus.jsonl", '{"_id": ' + "9" * 6000 + ', "text": "x"}', "corpus.jsonl:1: not valid JSON"),
    ("beir", "corpus.jsonl", '{"_id": "p1", "title": "only"}\n', "corpus.jsonl:1: no text"),
    ("beir", "queries.jsonl", '{"_id": "q1"}\n', "queries.jsonl:1: no text"),
    ("beir", "corpus.jsonl", '{"_id": "p1", "text": null}\n', "corpus.jsonl:1: text or title is not a string"),
    ("beir", "corpus.jsonl", '{"name": "p1", "text": "x"}\n', "corpus.jsonl:1: no id; expected passage_id or pid"),
    ("beir", "corpus.jsonl", '{"_id": true, "text": "x"}\n', "corpus.jsonl:1: not an id"),
    ("beir", "corpus.jsonl", '{"_id": 1.5, "text": "x"}\n', "corpus.jsonl:1: not an id"),
    ("beir", "corpus.jsonl", '{"_id": "", "text": "x"}\n', "corpus.jsonl:1: an empty passage id"),
    ("beir", "corpus.jsonl", '{"_id": "p1", "text": "x"}\r\n\r\n', "corpus.jsonl:2: not valid JSON"),
    ("beir", "qrels/train.tsv", "query-id\tcorpus-id\tscore\nq1\tp1\tyes\n", ":2: the grade is not a number"),
    ("beir", "qrels/train.tsv", "query-id\tcorpus-id\tscore\n", "no training query has a positive label"),
    ("parquet", "qrels.train.parquet", labels(["q1"], ["p1"], [2**40]), "row 1: the grade is out of range"),
    ("parquet", "qrels.train.parquet", labels(["q1", "q1"], ["p1", None], [1, 1]), "row 2: not an id"),
    ("parquet", "qrels.train.parquet", labels(["q1", "q1"], ["p1", "p2"], [1, None]), "row 2: the grade is"),
    ("parquet", "qrels.train.parquet", labels(["q1"], ["p1"], [True]), WRONG_TYPE("relevance", "numbers", "bool")),
    ("parquet", "qrels.train.parquet", labels(["q1"], ["p1"], ["1"]), "found: string"),
    ("parquet", "passages.parquet", texts("passage_id", ["p1"], [b"x"]), WRONG_TYPE("text", "strings", "binary")),
    ("parquet", "passages.parquet", texts("passage_id", ["p1"], [["x"]]), "column text has the wrong type"),
    ("parquet", "passages.parquet", texts("passage_id", [1.0], ["x"]), "strings or integers\n  found: double"),
    ("parquet", "passages.parquet", texts("passage_id", ["p1", "p1"], ["x", "y"]), "row 2: a duplicate passage id"),
    ("parquet", "passages.parquet", bad_utf8(), "Invalid UTF8 sequence"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"), REFUSED, ids=[f"{i}-{r[1]}" for i, r in enumerate(REFUSED)]
)
def test_refused(tmp_path: Path, kind: str, name: str, content: Content, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(kind, tmp_path, {name: content})
    assert message in str(caught.value)
    assert len(str(caught.value)) < 4000
    assert list((tmp_path / "out").glob("**/*")) == []  # neither a result nor a temporary folder


def test_both_lines_of_a_duplicate_are_named_even_with_a_limit(tmp_path: Path) -> None:
    rows = "".join(f"x{i}\tother\n" for i in range(5)) + "p1\tone\nx9\tother\np1\tagain\n"
    with pytest.raises(InputError) as caught:
        build("msmarco", tmp_path, {"collection.tsv": rows}, "collection.limit=2")
    place = tmp_path / "in" / "collection.tsv"
    assert caught.value.problems == [
        f"{place}:8: a duplicate passage id; expected unique ids, found 'p1', also at {place}:6"
    ]


def test_ids_of_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every hash alike, only the ids decide, wherever the twins stand."""
    monkeypatch.setattr("pandas.util.hash_array", lambda names, categorize: np.zeros(len(names), np.uint64))
    assert build("msmarco", tmp_path, {"collection.tsv": "p1\tx\np2\tx\np3\tx\n"}).num_passages == 3
    with pytest.raises(InputError, match=r":4: a duplicate passage id.*found 'p1', also at .*:1"):
        build("msmarco", tmp_path, {"collection.tsv": "p1\tx\np2\tx\np3\tx\np1\tx\n"})


def test_thousands_of_duplicates_fill_one_message(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the first 20 problems"):
        build("msmarco", tmp_path, {"collection.tsv": "".join(f"p{i % 3000}\tx\n" for i in range(6000))})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SQUASHED[:4000], "Truncated"),
        (SQUASHED[:-8], "Truncated"),
        (b"p1\tplain\n", "incorrect header"),
        (b"", "no passages"),
    ],
)
def test_broken_gzip(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build("msmarco", tmp_path, {"collection.tsv": None, "collection.tsv.gz": content})


def test_gzip_in_several_members(tmp_path: Path) -> None:
    members = gzip.compress(b"p1\tone\n") + gzip.compress(b"p2\ttwo\n")
    assert build("msmarco", tmp_path, {"collection.tsv": None, "collection.tsv.gz": members}).num_passages == 2


def test_a_damaged_page_of_parquet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"passages\.parquet: after row \d+: the file cannot be read"):
        build("parquet", tmp_path, {"passages.parquet": corrupt(tmp_path / "whole.parquet")})


@pytest.mark.parametrize("kind", ["msmarco", "parquet"])
def test_an_empty_folder_where_a_file_belongs(tmp_path: Path, kind: str) -> None:
    (tmp_path / "somewhere").mkdir()
    with pytest.raises(UserError, match="somewhere: a folder without files"):
        build(kind, tmp_path, {}, f"collection.passages={tmp_path / 'somewhere'}")


def test_a_failed_build_leaves_the_former_one(tmp_path: Path) -> None:
    before = build("msmarco", tmp_path, {}).manifest
    with pytest.raises(InputError):
        build("msmarco", tmp_path, {"collection.tsv": "p1\tx\nbad\n"})
    assert Collection.open(str(tmp_path / "out")).manifest == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["corpus", "queries"]


def test_what_a_killed_build_has_left_beside_the_queries_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "out" / ".queries.tmp-killed"
    left.mkdir(parents=True)
    build("msmarco", tmp_path, {})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["corpus", "queries"]


def test_half_surrogates_are_mended_and_counted(tmp_path: Path) -> None:
    rows = '{"_id": "p1", "text": "a\\ud800b"}\n{"_id": "p2", "text": "\\ud83d\\ude00"}\n'
    c = build("beir", tmp_path, {"corpus.jsonl": rows})
    assert c.texts([0, 1]) == ["a?b", "\U0001f600"]
    assert c.manifest["mended_passages"] == 1


def test_counts_of_the_manifest_add_up(tmp_path: Path) -> None:
    c = build(
        "msmarco", tmp_path, {"collection.tsv": "".join(f"p{i}\t{'' if i % 10 == 5 else i}\n" for i in range(5000))}
    )
    rows = {f["name"]: f["rows"] for f in c.manifest["files"]}
    assert rows == {"_ids.arrow": 5000, "part-00000.parquet": 5000} and c.manifest["rows"] == 5000
    assert c.manifest["empty_passages"] == 500 and c.manifest["limit"] is None
    assert c.manifest["bytes"] == sum(f["bytes"] for f in c.manifest["files"])


def test_parquet_ids_may_be_integers_and_strings_dictionaries(tmp_path: Path) -> None:
    passages = pa.table({"pid": [7, 8], "text": pa.array(["x", "y"]).dictionary_encode()})
    c = build("parquet", tmp_path, {"passages.parquet": passages, "qrels.train.parquet": labels(["q1"], [8], [1])})
    assert c.passage_ids([0, 1]) == ["7", "8"] and c.qrels("train").passage_index.tolist() == [1]


def test_a_name_documented_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The getter and the setter of a property have one name; the first stands."""
    rest = "It goes on for long enough to say what the value is good for, and when."
    doc = f'"""{{}} of the thing in so many words.\n\n        {rest}\n        """'
    (tmp_path / "m.py").write_text(
        "class A:\n    @property\n    def kwargs(self):\n        " + doc.format("The value") + "\n"
        "    @kwargs.setter\n    def kwargs(self, value):\n        " + doc.format("Another value") + "\n"
    )
    monkeypatch.setattr("ckd_ray.data.docstrings._sources", lambda package: [("m", tmp_path / "m.py")])
    source = docstring_source(load_config(None, ["collection.packages=[m]"]).collection)
    passages = list(source.passages(Problems()))
    assert [row.id for row in passages] == ["m.A.kwargs"]
    queries = [row for split in source.splits for row in source.queries(split, Problems())]
    assert [row.text for row in queries] == ["The value of the thing in so many words."]


def test_the_embedded_quick_start_names_each_thing_once() -> None:
    """On what is installed here; pydantic alone, since torch takes seconds to parse."""
    source = docstring_source(load_config(None, ["collection.packages=[pydantic, pyarrow]"]).collection)
    rows = list(source.passages(Problems()))
    names = [row.id for row in rows]
    assert len(names) == len(set(names)) > 100
    sentences = {q.id: q.text for split in source.splits for q in source.queries(split, Problems())}
    assert not [row.id for row in rows if sentences[row.id] in row.text]


def test_without_training_labels_the_passages_are_still_checked(tmp_path: Path) -> None:
    files: dict[str, Content] = {"queries.train.tsv": "", "qrels.train.tsv": "", "collection.tsv": "no tab\n"}
    with pytest.raises(InputError, match=r"collection\.tsv:1: a line without a tab") as caught:
        build("msmarco", tmp_path, files)
    assert "no training query" not in str(caught.value)
