"""Collections: four formats read alike, and bad input is refused with its place and the way out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ckd_ray.checks import load_config
from ckd_ray.data import Collection, InputError, build_collection, source_signature
from ckd_ray.data.docstrings import Entry, read_docstrings, split_docstring
from ckd_ray.data.lines import read_lines
from ckd_ray.data.problems import Problems
from ckd_ray.errors import UserError

PASSAGES = {"p1": "the first passage", "p2": "ein zweiter, größer", "p3": "", "p4": "tab\tinside"}
QUERIES = {"train": {"q1": "first?", "q2": "second?"}, "dev": {"q3": "third?"}}
QRELS = {"train": [("q1", "p1", 1), ("q2", "p2", 0)], "dev": [("q3", "p4", 3)]}


def write_msmarco(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "collection.tsv").write_text("".join(f"{k}\t{v}\n" for k, v in PASSAGES.items()))
    for split, queries in QUERIES.items():
        (folder / f"queries.{split}.tsv").write_text("".join(f"{k}\t{v}\n" for k, v in queries.items()))
        rows = "".join(f"{q}\t0\t{p}\t{g}\n" for q, p, g in QRELS[split])
        (folder / f"qrels.{split}.tsv").write_text(rows)
    return folder


def write_beir(folder: Path) -> Path:
    (folder / "qrels").mkdir(parents=True)
    corpus = [
        {"_id": k, "title": v.split(" ", 1)[0], "text": v[len(v.split(" ", 1)[0]) + 1 :]} for k, v in PASSAGES.items()
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    queries = [{"_id": k, "text": v} for split in QUERIES.values() for k, v in split.items()]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    for split, labels in QRELS.items():
        rows = "".join(f"{q}\t{p}\t{g}\n" for q, p, g in labels)
        (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return folder


def write_parquet(folder: Path) -> Path:
    folder.mkdir()
    pq.write_table(
        pa.table({"passage_id": list(PASSAGES), "text": list(PASSAGES.values())}), folder / "passages.parquet"
    )
    for split, queries in QUERIES.items():
        table = pa.table({"query_id": list(queries), "text": list(queries.values())})
        pq.write_table(table, folder / f"queries.{split}.parquet")
        columns = dict(zip(("query_id", "passage_id", "relevance"), zip(*QRELS[split], strict=True), strict=True))
        pq.write_table(pa.table({k: list(v) for k, v in columns.items()}), folder / f"qrels.{split}.parquet")
    return folder


def build(kind: str, folder: Path | str, out: Path, *more: str) -> Collection:
    config = load_config(
        None, [f"collection.format={kind}", f"collection.path={folder}", "collection.limit=null", *more]
    )
    build_collection(config.collection, str(out))
    return Collection.open(str(out))


@pytest.mark.parametrize(
    ("kind", "write"), [("msmarco", write_msmarco), ("beir", write_beir), ("parquet", write_parquet)]
)
def test_formats_read_alike(tmp_path: Path, kind: str, write: object) -> None:
    c = build(kind, write(tmp_path / "in"), tmp_path / "out")  # type: ignore[operator]
    assert c.num_passages == 4 and c.splits == ["train", "dev"]
    assert c.texts([3, 0, 3]) == [PASSAGES["p4"], PASSAGES["p1"], PASSAGES["p4"]]
    assert c.iter_passages(1, 3) == [PASSAGES["p2"], ""]
    assert c.passage_ids([2, 0]) == ["p3", "p1"]
    assert c.queries("train").ids == ["q1", "q2"] and c.queries("dev").texts == ["third?"]
    labels = c.qrels("train")
    assert labels.query_index.tolist() == [0, 1] and labels.passage_index.tolist() == [0, 1]
    assert labels.relevance.tolist() == [1, 0]
    assert c.manifest["empty_passages"] == 1
    train = {"queries": 2, "labels": 2, "unlabelled": 1}
    # BEIR has one file of queries: those of the other splits are counted as such.
    assert c.manifest["splits"]["train"] == (train | {"queries_elsewhere": 1} if kind == "beir" else train)


def split_into_parts(path: Path, pieces: list[str | pa.Table], suffix: str) -> None:
    """Put a folder in the place of a file, with what Spark leaves in it."""
    path.unlink(missing_ok=True)
    path.mkdir()
    for name in ("_SUCCESS", f".part-00000{suffix}.crc"):
        (path / name).write_text("")
    for i, piece in enumerate(pieces):
        part = path / f"part-{i:05d}{suffix}"
        part.write_text(piece) if isinstance(piece, str) else pq.write_table(piece, part)


def test_folders_in_the_place_of_files(tmp_path: Path) -> None:
    """Many small files are read in the order of their names, and are the same collection as one."""
    whole = build("msmarco", write_msmarco(tmp_path / "a"), tmp_path / "oa")
    lines = write_msmarco(tmp_path / "b")
    for name in ("collection.tsv", "queries.train.tsv", "qrels.train.tsv"):
        split_into_parts(lines / name, [*(lines / name).read_text().splitlines(True), ""], ".tsv")
    with gzip.open(lines / "collection.tsv" / "part-00003.tsv.gz", "wb") as file:
        file.write((lines / "collection.tsv" / "part-00003.tsv").read_bytes())
    (lines / "collection.tsv" / "part-00003.tsv").unlink()
    columns = write_parquet(tmp_path / "c")
    for name in ("passages.parquet", "qrels.train.parquet"):
        table = pq.read_table(columns / name)
        split_into_parts(columns / name, [table.slice(i, 1) for i in range(len(table))], ".parquet")
    corpus = write_beir(tmp_path / "d")
    split_into_parts(corpus / "corpus.jsonl", (corpus / "corpus.jsonl").read_text().splitlines(True), ".jsonl")
    for kind, folder in (("msmarco", lines), ("parquet", columns), ("beir", corpus)):
        c = build(kind, folder, tmp_path / f"out-{kind}")
        assert c.passage_ids(range(4)) == list(PASSAGES)
        if kind != "beir":  # it numbers its queries otherwise
            assert c.manifest["fingerprint"] == whole.manifest["fingerprint"]
    named = tmp_path / "elsewhere"
    (lines / "collection.tsv").rename(named)
    c = build("msmarco", lines, tmp_path / "named", f"collection.passages={named}")
    assert c.manifest["fingerprint"] == whole.manifest["fingerprint"]


def test_a_folder_of_other_files_is_no_collection(tmp_path: Path) -> None:
    folder = write_msmarco(tmp_path / "in")
    split_into_parts(folder / "collection.tsv", ["p1\tone\n", "p1 two\n"], ".tsv")
    with pytest.raises(InputError, match=r"part-00001.tsv:1: a line without a tab"):
        build("msmarco", folder, tmp_path / "out")
    (folder / "collection.tsv" / "README.md").write_text("about")
    with pytest.raises(
        UserError, match=r"expected: files whose names end with .tsv, .tsv.gz[^\n]*\n  found: 'README.md'\n"
    ):
        build("msmarco", folder, tmp_path / "out")
    (folder / "collection.tsv" / "README.md").unlink()
    inner = folder / "collection.tsv" / "year=2024"
    inner.mkdir()
    with pytest.raises(UserError, match=r"and no folders\n  found: 'year=2024/'\n"):
        build("msmarco", folder, tmp_path / "out")
    inner.rename(inner.with_name("_temporary"))
    for file in (folder / "collection.tsv").glob("[!_.]*"):
        file.unlink()
    with pytest.raises(UserError, match=r"collection\.tsv: a folder without files"):
        build("msmarco", folder, tmp_path / "out")


def test_many_small_files_have_one_signature(tmp_path: Path) -> None:
    folder = write_msmarco(tmp_path / "in")
    split_into_parts(folder / "collection.tsv", [f"p{i}\ttext {i}\n" for i in range(1, 40)], ".tsv")
    settings = load_config(None, ["collection.format=msmarco", f"collection.path={folder}"]).collection
    before = source_signature(settings)
    assert before == source_signature(settings) and before.count("part-000") == 39
    (folder / "collection.tsv" / "part-00007.tsv").write_text("p8\tchanged\n")
    assert source_signature(settings) != before
    assert build("msmarco", folder, tmp_path / "out").num_passages == 39


def test_a_part_of_the_queries_is_read_alone(tmp_path: Path) -> None:
    """Across row groups of 4,096; any cut gives what the whole gives."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "collection.tsv").write_text("p\tx\n")
    (folder / "queries.train.tsv").write_text("".join(f"q{i}\ttext {i}\n" for i in range(9000)))
    (folder / "qrels.train.tsv").write_text("q0\t0\tp\t1\n")
    c = build("msmarco", folder, tmp_path / "out")
    whole = c.queries("train")
    assert c.num_queries("train") == len(whole.ids) == 9000
    for first, stop in ((0, 9000), (0, 1), (4095, 4097), (4096, 8192), (8999, 9000), (5000, 5000)):
        part = c.queries_between("train", first, stop)
        assert (part.ids, part.texts) == (whole.ids[first:stop], whole.texts[first:stop])


def test_contents_and_not_the_format_make_the_fingerprint(tmp_path: Path) -> None:
    a = build("msmarco", write_msmarco(tmp_path / "a"), tmp_path / "oa").manifest["fingerprint"]
    b = build("parquet", write_parquet(tmp_path / "b"), tmp_path / "ob").manifest["fingerprint"]
    folder = write_msmarco(tmp_path / "c")
    (folder / "qrels.dev.tsv").write_text("q3\t0\tp4\t2\n")
    c = build("msmarco", folder, tmp_path / "oc").manifest["fingerprint"]
    assert a == b != c


def test_gzip_byte_order_mark_and_windows_ends(tmp_path: Path) -> None:
    folder = write_msmarco(tmp_path / "in")
    text = (folder / "collection.tsv").read_text().replace("\n", "\r\n")
    (folder / "collection.tsv").unlink()
    with gzip.open(folder / "collection.tsv.gz", "wb") as file:
        file.write(b"\xef\xbb\xbf" + text.rstrip().encode())  # and no line end at the end of the file
    c = build("msmarco", folder, tmp_path / "out")
    assert c.passage_ids(range(4)) == list(PASSAGES) and c.texts([3]) == ["tab\tinside"]


def test_ir_datasets(tmp_path: Path) -> None:
    ir_datasets = pytest.importorskip("ir_datasets")
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.formats import TrecQrels, TsvDocs, TsvQueries

    folder = write_msmarco(tmp_path / "in")
    (folder / "collection.tsv").write_text("p1\tfirst\np2\tsecond\np4\tfourth\n")

    class Local:
        def __init__(self, path: Path) -> None:
            self._path = path

        def stream(self) -> object:
            return self._path.open("rb")

        def path(self, force: bool = True) -> str:
            return str(self._path)

    docs = TsvDocs(Local(folder / "collection.tsv"), namespace="tiny", lang="en")
    registry = ir_datasets.registry
    names = {"ckd-test": Dataset(docs)}
    for split in QUERIES:
        queries = TsvQueries(Local(folder / f"queries.{split}.tsv"), namespace="tiny", lang="en")
        names[f"ckd-test/{split}"] = Dataset(docs, queries, TrecQrels(Local(folder / f"qrels.{split}.tsv"), {}))
    for name, dataset in names.items():
        if name not in registry._registered:
            registry.register(name, dataset)
    c = build("ir_datasets", "ckd-test", tmp_path / "out")
    assert c.passage_ids(range(3)) == ["p1", "p2", "p4"] and c.queries("train").ids == ["q1", "q2"]
    with pytest.raises(UserError, match="knows no such id"):
        build("ir_datasets", "no-such-dataset", tmp_path / "out2")


def test_limit_keeps_labelled_passages_and_the_first_others(tmp_path: Path) -> None:
    c = build("msmarco", write_msmarco(tmp_path / "in"), tmp_path / "out", "collection.limit=3")
    assert c.passage_ids(range(3)) == ["p1", "p2", "p4"] and c.num_passages == 3
    assert c.qrels("dev").passage_index.tolist() == [2]


BAD = [
    ("collection.tsv", "p1\tx\np2 no tab\n", ":2: a line without a tab; expected id TAB text, found 'p2 no tab'"),
    ("collection.tsv", "\tx\n", ":1: an empty passage id"),
    ("collection.tsv", "p1\tx\n\np2\ty\n", ":2: a line without a tab"),
    (
        "collection.tsv",
        "p1\tx\np2\ty\np4\tz\np1\tagain\n",
        "collection.tsv:4: a duplicate passage id; expected unique ids, found 'p1', also at ",
    ),
    ("collection.tsv", b"p1\tx\np2\tab\xff\n", ":2: byte 6 of the line is not UTF-8"),
    ("collection.tsv", "", "no passages"),
    ("queries.train.tsv", "q1\ta\nq1\tb\n", ":2: a duplicate query id; expected unique ids, found 'q1', also at"),
    ("queries.train.tsv", " \ta\n", ":1: an empty query id"),
    (
        "qrels.train.tsv",
        "q1\t0\tp9\t1\n",
        ":1: a label of an unknown passage; expected a passage id of the corpus, found 'p9'",
    ),
    (
        "qrels.train.tsv",
        "q9\t0\tp1\t1\n",
        ":1: a label of an unknown query; expected a query of split train, found 'q9'",
    ),
    ("qrels.train.tsv", "q1\tp1\n", ":1: wrong number of columns; expected query, 0, passage, grade, found 2"),
    ("qrels.train.tsv", "q1\t0\tp1\t1,5\n", ":1: the grade is not a number; expected a number, found '1,5'"),
    ("qrels.train.tsv", "q1\t0\tp1\t99999999999\n", ":1: the grade is out of range"),
    (
        "qrels.train.tsv",
        "q1\t0\tp1\t1\nq1\t0\tp1\t2\n",
        ":2: a second grade for the same query and passage; expected 1",
    ),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD, ids=[m.split(";")[0] for *_, m in BAD])
def test_bad_input(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    folder = write_msmarco(tmp_path / "in")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        build("msmarco", folder, tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out" / "corpus").exists()


def test_many_problems_are_reported_together_up_to_twenty(tmp_path: Path) -> None:
    folder = write_msmarco(tmp_path / "in")
    (folder / "collection.tsv").write_text("bad\n" * 3 + "p1\tx\n" + "bad\n" * 3)
    with pytest.raises(InputError) as caught:
        build("msmarco", folder, tmp_path / "out")
    assert sum("without a tab" in line for line in caught.value.problems) == 6
    (folder / "collection.tsv").write_text("bad\n" * 100)
    with pytest.raises(InputError, match="the first 20 problems"):
        build("msmarco", folder, tmp_path / "out")


def test_missing_files_say_what_is_there(tmp_path: Path) -> None:
    folder = write_msmarco(tmp_path / "in")
    (folder / "qrels.train.tsv").unlink()
    with pytest.raises(UserError, match=r"no qrels\.train\.tsv(.|\n)*found: collection\.tsv, qrels\.dev\.tsv"):
        build("msmarco", folder, tmp_path / "out")
    with pytest.raises(UserError, match="this folder does not exist"):
        build("msmarco", tmp_path / "nowhere", tmp_path / "out")


def test_bad_json_and_bad_parquet(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "beir")
    (folder / "corpus.jsonl").write_text(
        '{"_id": "p1", "text": "a"}\n{"text": "b"}\n[1]\nnot json\n{"_id": "p2", "text": 3}\n'
    )
    with pytest.raises(InputError) as caught:
        build("beir", folder, tmp_path / "out")
    text = str(caught.value)
    for part in (":2: no id", ":3: not a JSON object", ":4: not valid JSON", ":5: text or title is not a string"):
        assert part in text
    folder = write_parquet(tmp_path / "parquet")
    pq.write_table(pa.table({"id": ["p1"], "content": ["x"]}), folder / "passages.parquet")
    with pytest.raises(UserError, match=r"no column text(.|\n)*found: id, content"):
        build("parquet", folder, tmp_path / "out")
    (folder / "passages.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a Parquet file"):
        build("parquet", folder, tmp_path / "out")


def test_odd_texts_survive(tmp_path: Path) -> None:
    folder = write_msmarco(tmp_path / "in")
    odd = ["nul \x00 byte", "שלום עולם", "👩‍🚀 emoji", "x" * 1_000_000, '"quoted', "line\u2028separator"]
    (folder / "collection.tsv").write_bytes("".join(f"p{i + 1}\t{t}\n" for i, t in enumerate(odd)).encode())
    c = build("msmarco", folder, tmp_path / "out")
    assert c.texts(range(len(odd))) == odd


def test_a_large_file_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckd_ray.data.lines._BLOCK", 64)
    lines = [f"{i}\t{'y' * (i % 50)}é" for i in range(300)]
    (tmp_path / "x.tsv").write_text("\n".join(lines))
    blocks = list(read_lines(str(tmp_path / "x.tsv"), Problems()))
    assert len(blocks) > 100
    assert [line for _, block in blocks for line in block] == lines
    for first, block in blocks:
        assert block[0] == lines[first - 1]


def test_random_access_reads_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_msmarco(tmp_path / "in")
    (folder / "collection.tsv").write_text("".join(f"p{i}\ttext {i}\n" for i in range(1, 10_001)))
    c = build("msmarco", folder, tmp_path / "out")
    asked = np.random.default_rng(0).integers(0, 10_000, 300)
    assert c.texts(asked) == [f"text {i + 1}" for i in asked]
    assert c.iter_passages(4090, 4110) == [f"text {i + 1}" for i in range(4090, 4110)]
    monkeypatch.setattr("ckd_ray.data.collection._CACHED_GROUPS", 3)
    assert c.texts(asked) == [f"text {i + 1}" for i in asked] and len(c._groups) == 3
    assert c.texts([]) == [] and c.passage_ids([]) == []
    with pytest.raises(IndexError):
        c.texts([10_000])


def test_ids_are_taken_without_a_copy_of_all(tmp_path: Path) -> None:
    folder = write_msmarco(tmp_path / "in")
    (folder / "collection.tsv").write_text("".join(f"p{i}\tx\n" for i in range(1, 20_001)))
    c = build("msmarco", folder, tmp_path / "out")
    asked = np.random.default_rng(0).integers(0, 20_000, 300)
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    try:
        assert c.passage_ids(asked) == [f"p{i + 1}" for i in asked]
    finally:
        pa.set_memory_pool(before)
    assert pool.max_memory() < (tmp_path / "out" / "corpus" / "_ids.arrow").stat().st_size / 4
    with pytest.raises(IndexError):
        c.passage_ids([20_000])


def test_the_signature_follows_the_files(tmp_path: Path) -> None:
    folder = write_msmarco(tmp_path / "in")
    settings = load_config(None, ["collection.format=msmarco", f"collection.path={folder}"]).collection
    before = source_signature(settings)
    assert source_signature(settings) == before
    (folder / "collection.tsv").write_text("p1\tchanged\n")
    assert source_signature(settings) != before


def test_first_sentence_asks_and_the_rest_answers() -> None:
    text = "Sort the rows by the given key. Equal keys keep\ntheir order.\n\n"
    text += "The sort is stable and works in place for lists."
    assert split_docstring("m.f", text) == Entry(
        "m.f",
        "Sort the rows by the given key.",
        "Equal keys keep their order.\nThe sort is stable and works in place for lists.",
    )
    assert split_docstring("m.f", "Too short.") is None


def test_docstrings_are_parsed_and_never_run(tmp_path: Path) -> None:
    rest = "It goes on for long enough to answer a question about what this thing does."
    (tmp_path / "m.py").write_text(
        "raise SystemExit\n"
        f'class A:\n    """A class that is documented well.\n\n    {rest}\n    """\n'
        f'    def b(self):\n        """A method that is documented well.\n\n        {rest}\n        """\n'
        f'    def _c(self):\n        """A private method with some words.\n\n        {rest}\n        """\n'
    )
    assert [e.name for e in read_docstrings("m", tmp_path / "m.py")] == ["m.A", "m.A.b"]
    (tmp_path / "broken.py").write_text("def (")
    assert list(read_docstrings("broken", tmp_path / "broken.py")) == []
