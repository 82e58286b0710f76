"""`ckd-ray init`: what it recognises, what it writes is what the pipeline reads, and the files of the user stay."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from ckd_ray.checks import load_config
from ckd_ray.cli import app
from ckd_ray.data import Collection, build_collection
from ckd_ray.errors import UserError
from ckd_ray.init import Draft, Options, as_json, draft_config, render
from ckd_ray.init.roles import role_of, split_of
from ckd_ray.init.tables import is_header
from tests import sound

N = 240  # queries, enough to set 50 aside twice
PASSAGES = {f"p{i}": f"the passage about thing {i}" for i in range(N)}
QUERIES = {f"q{i}": f"what is thing {i}?" for i in range(N)}
LABELS = [(f"q{i}", f"p{i}", 1) for i in range(N)]


def _tsv(path: Path, rows: object, header: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) + "\n" for row in rows]  # type: ignore[attr-defined]
    text = header + "".join(lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def _csv(path: Path, header: list[str], rows: object, delimiter: str = ",") -> None:
    with open(path, "w", newline="") as out:
        writer = csv.writer(out, delimiter=delimiter)
        writer.writerow(header)
        writer.writerows(rows)  # type: ignore[arg-type]


def _jsonl(path: Path, rows: object) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))  # type: ignore[attr-defined]


def _trec(labels: list[tuple[str, str, int]] = LABELS) -> list[tuple[str, str, str, int]]:
    return [(query, "0", passage, grade) for query, passage, grade in labels]


def _plain(folder: Path) -> None:
    """The msmarco layout without splits."""
    _tsv(folder / "collection.tsv", PASSAGES.items())
    _tsv(folder / "queries.tsv", QUERIES.items())
    _tsv(folder / "qrels.tsv", _trec())


def _draft(folder: Path, **options: object) -> Draft:
    return draft_config(str(folder), Options(output=str(folder.parent / "config.yaml"), **options))  # type: ignore[arg-type]


def _built(draft: Draft) -> tuple[int, dict[str, dict[str, int]]]:
    """What the pipeline makes of the configuration as it was written."""
    config = load_config(draft.options.output)
    built = build_collection(config.collection, str(Path(draft.options.output).parent / "built"))
    return built.num_passages, built.splits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "mine"
    path.mkdir()
    return path


# -- layouts: each is written so that the pipeline reads all of it ----------------------------------------------------


def _with_splits(folder: Path) -> None:
    _tsv(folder / "collection.tsv", PASSAGES.items())
    for split, some in (("train", range(0, 200)), ("dev", range(200, 220)), ("test", range(220, 240))):
        _tsv(folder / f"queries.{split}.tsv", [(f"q{i}", QUERIES[f"q{i}"]) for i in some])
        _tsv(folder / f"qrels.{split}.tsv", _trec([LABELS[i] for i in some]))


def _beir(folder: Path, header: str = "query-id\tcorpus-id\tscore\n") -> None:
    _jsonl(folder / "corpus.jsonl", [{"_id": k, "title": "T", "text": v, "metadata": {}} for k, v in PASSAGES.items()])
    _jsonl(folder / "queries.jsonl", [{"_id": k, "text": v} for k, v in QUERIES.items()])
    for split, some in (("train", LABELS[:200]), ("dev", LABELS[200:220]), ("test", LABELS[220:])):
        _tsv(folder / "qrels" / f"{split}.tsv", some, header)


def _parquet(folder: Path) -> None:
    _with_splits(folder)
    for path in list(folder.glob("*.tsv")):
        rows = [line.split("\t") for line in path.read_text().splitlines()]
        ids = [row[0] for row in rows]
        if path.stem.startswith("qrels"):
            table = sound.labels(ids, [row[2] for row in rows], [int(row[3]) for row in rows])
        else:
            key = "passage_id" if path.stem == "collection" else "query_id"
            table = sound.texts(key, ids, [row[1] for row in rows])
        pq.write_table(table, path.with_suffix(".parquet"))
        path.unlink()


def _csv_with_other_names(folder: Path) -> None:
    rows = [(k, f"Title {k}", f'{v}, with "quotes"\nand a line end') for k, v in PASSAGES.items()]
    _csv(folder / "documents.csv", ["Doc ID", "Title", "Body"], rows)
    _csv(folder / "questions.csv", ["qid", "question"], QUERIES.items())
    _csv(folder / "labels.csv", ["qid", "docid"], [row[:2] for row in LABELS])


def _semicolons_with_unknown_names(folder: Path) -> None:
    _csv(folder / "corpus.csv", ["nummer", "inhalt"], PASSAGES.items(), ";")
    _csv(folder / "queries.csv", ["nummer", "frage"], QUERIES.items(), ";")
    _csv(folder / "qrels.csv", ["frage", "absatz", "note"], LABELS, ";")


def _names_say_nothing(folder: Path) -> None:
    """Only the ids tell which is which, and the labels have the passage first."""
    _tsv(folder / "a.tsv", QUERIES.items())
    _tsv(folder / "b.tsv", [*PASSAGES.items(), ("p999", "one more")])
    _tsv(folder / "c.tsv", [(passage, query, grade) for query, passage, grade in LABELS])


def _headers_in_tsv(folder: Path) -> None:
    _tsv(folder / "passages.tsv", PASSAGES.items(), "pid\tpassage\n")
    _tsv(folder / "queries.tsv", QUERIES.items(), "qid\tquery\n")
    _tsv(folder / "qrels.tsv", LABELS, "query_id\tpassage_id\tgrade\n")


def _gz_and_bom(folder: Path) -> None:
    _tsv(folder / "collection.tsv.gz", PASSAGES.items())
    _tsv(folder / "queries.tsv", QUERIES.items(), "\ufeff")
    (folder / "qrels.txt").write_text("".join(f"{q} 0 {p} {g}\r\n" for q, p, g in LABELS))


def _among_other_files(folder: Path) -> None:
    _names_say_nothing(folder)
    (folder / "README.txt").write_text("my data\nfrom here\n")
    (folder / "package.json").write_text('{\n  "name": "x"\n}\n')
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / ".git").mkdir()
    (folder / ".git" / "queries.tsv").write_text("q1\tnot this one\n")


def _mixed(folder: Path) -> None:
    _jsonl(folder / "corpus.jsonl", [{"_id": k, "text": v} for k, v in PASSAGES.items()])
    _tsv(folder / "topics.tsv", QUERIES.items())
    pq.write_table(sound.labels(*map(list, zip(*LABELS, strict=True))), folder / "qrels.parquet")


def _one_file_of_queries_and_numbers(folder: Path) -> None:
    """JSON numbers as ids, grades that pandas has made fractions, one file of queries for two splits of labels."""
    _jsonl(folder / "passages.jsonl", [{"id": i, "contents": text} for i, text in enumerate(PASSAGES.values())])
    _jsonl(folder / "queries.jsonl", [{"id": i, "query": text} for i, text in enumerate(QUERIES.values())])
    for split, some in (("train", range(200)), ("test", range(200, 240))):
        _csv(folder / f"qrels_{split}.csv", ["query_id", "passage_id", "score"], [(i, i, "1.0") for i in some])


def _parts(folder: Path) -> None:
    _plain(folder)
    (folder / "collection.tsv").unlink()
    items = list(PASSAGES.items())
    _tsv(folder / "collection" / "part-00000.tsv", items[:100])
    _tsv(folder / "collection" / "part-00001.tsv", items[100:])


LAYOUTS: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    # how it is made, the format of the configuration, and whether the files are read as they are
    "msmarco": (_with_splits, "msmarco", True),
    "beir": (_beir, "beir", True),
    "beir with another header": (lambda folder: _beir(folder, "Query ID\tCorpus ID\tScore\n"), "beir", False),
    "parquet": (_parquet, "parquet", True),
    "msmarco without splits": (_plain, "msmarco", False),
    "CSV with other names": (_csv_with_other_names, "parquet", False),
    "semicolons and unknown names": (_semicolons_with_unknown_names, "parquet", False),
    "names that say nothing": (_names_say_nothing, "msmarco", False),
    "files of other kinds": (_among_other_files, "msmarco", False),
    "headers in TSV": (_headers_in_tsv, "parquet", False),
    "gz, a byte-order mark, spaces": (_gz_and_bom, "msmarco", False),
    "three formats": (_mixed, "beir", False),
    "one file of queries, numbers": (_one_file_of_queries_and_numbers, "parquet", False),
    "a folder of parts": (_parts, "msmarco", False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_pipeline_reads_the_configuration_as_it_is(name: str, folder: Path) -> None:
    make, fmt, as_they_are = LAYOUTS[name]
    make(folder)
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}
    draft = _draft(folder)
    after = {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}
    assert before == after, "the sources are never changed"
    assert (draft.made.format, draft.made.written == []) == (fmt, as_they_are)
    passages, splits = _built(draft)
    more = name in ("names that say nothing", "files of other kinds")  # a passage without a label
    assert passages == N + more and set(splits) == {"train", "dev", "test"}
    assert sum(split["queries"] for split in splits.values()) == N
    assert sum(split["labels"] for split in splits.values()) == N
    assert all(split["unlabelled"] == 0 for split in splits.values())
    counted = as_json(draft)
    assert counted["passages"] == passages and not counted["unknown"]
    assert {s: c["queries"] for s, c in counted["splits"].items()} == {s: c["queries"] for s, c in splits.items()}


def test_texts_of_csv_keep_their_quotes_line_ends_and_title(folder: Path) -> None:
    _csv_with_other_names(folder)
    _built(_draft(folder))
    collection = Collection.open(str(folder.parent / "built"))
    assert collection.texts([0]) == ['Title p0 the passage about thing 0, with "quotes"\nand a line end']


# -- splits -----------------------------------------------------------------------------------------------------------


def test_dev_and_test_are_set_aside_by_text_and_seed_alone(folder: Path) -> None:
    _plain(folder)
    first = _draft(folder).facts.parts
    _tsv(folder / "queries.tsv", reversed(QUERIES.items()))
    _tsv(folder / "qrels.tsv", reversed(_trec()))
    again, other = _draft(folder, force=True).facts.parts, _draft(folder, force=True, seed=18).facts.parts
    chosen = {split: set(part.queries) for split, part in first.items()}
    assert {split: len(names) for split, names in chosen.items()} == {"train": 140, "dev": 50, "test": 50}
    assert chosen == {split: set(part.queries) for split, part in again.items()}
    assert chosen["test"] != set(other["test"].queries)
    assert not chosen["train"] & chosen["test"] and not chosen["dev"] & chosen["test"]


def test_queries_of_one_text_stay_on_one_side(folder: Path) -> None:
    _plain(folder)
    _tsv(folder / "queries.tsv", [(name, f"What  is thing {int(name[1:]) // 2}?") for name in QUERIES])
    parts = _draft(folder).facts.parts
    sides = [set(part.queries.values()) for part in parts.values()]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]


@pytest.mark.parametrize(
    ("labelled", "splits"), [(99, {"train"}), (100, {"train", "test"}), (200, {"train", "dev", "test"})]
)
def test_few_queries_are_left_for_training(labelled: int, splits: set[str], folder: Path) -> None:
    _plain(folder)
    _tsv(folder / "qrels.tsv", _trec(LABELS[:labelled]))
    draft = _draft(folder)
    assert set(draft.facts.parts) == splits
    assert {len(part.queries) for split, part in draft.facts.parts.items() if split != "train"} <= {50}
    assert any("no dev split" in note for note in draft.notes) == ("dev" not in splits)
    assert set(_built(draft)[1]) == splits


def test_a_missing_dev_is_taken_from_train_and_test_stays(folder: Path) -> None:
    _with_splits(folder)
    (folder / "queries.dev.tsv").unlink()
    (folder / "qrels.dev.tsv").unlink()
    draft = _draft(folder)
    assert draft.made.queries["test"] == str(folder / "queries.test.tsv")
    assert {split: len(part.queries) for split, part in draft.facts.parts.items()} == {
        "train": 150,
        "test": 20,
        "dev": 50,
    }


def test_labels_of_test_alone_are_split_when_the_option_says_so(folder: Path) -> None:
    _plain(folder)
    (folder / "qrels.tsv").rename(folder / "qrels.test.tsv")
    with pytest.raises(UserError, match="no split to train on") as error:
        _draft(folder)
    assert "--qrels FILE" in str(error.value)
    assert len(_draft(folder, qrels=["qrels.test.tsv"]).facts.parts["train"].queries) == 140


def test_shared_queries_and_repeated_passages_are_told(folder: Path) -> None:
    _with_splits(folder)
    _tsv(folder / "queries.test.tsv", [("q220", "WHAT is thing 7?"), *[(f"q{i}", f"w {i}") for i in range(221, 240)]])
    _tsv(folder / "collection.tsv", [*PASSAGES.items(), ("x1", "The passage about thing 3"), ("x2", "")])
    draft = _draft(folder)
    text = render(draft)
    assert "1 queries of test are in train, too, such as 'WHAT is thing 7?'" in text
    assert "1 passages repeat the text of another" in text and "1 passages are empty" in text
    found = as_json(draft)
    assert (found["shared_queries"], found["repeated_passages"], found["empty_passages"]) == ({"test": 1}, 1, 1)


# -- what does not fit ------------------------------------------------------------------------------------------------


def test_a_few_unknown_ids_are_left_out_and_told(folder: Path) -> None:
    _plain(folder)
    _tsv(folder / "qrels.tsv", _trec([*LABELS, ("q0", "p777", 1), ("nobody", "p1", 1)]))
    draft = _draft(folder)
    assert "1 labels name a passage that is not there, such as 'p777'; they are left out" in render(draft)
    assert as_json(draft)["unknown"]["query"] == {"labels": 1, "examples": ["nobody"]}
    assert sum(split["labels"] for split in _built(draft)[1].values()) == N


def test_queries_without_text_are_left_out_and_told(folder: Path) -> None:
    _with_splits(folder)
    _tsv(folder / "queries.train.tsv", [(f"q{i}", QUERIES[f"q{i}"] if i > 1 else " ") for i in range(200)])
    draft = _draft(folder)
    assert "2 queries of train have no text; they are left out" in render(draft)
    assert _built(draft)[1]["train"]["queries"] == 198


SPELLINGS = {
    "a prefix": (lambda name: f"doc-{name}", "a prefix or leading zeros"),
    "leading zeros": (lambda name: f"p000{name[1:]}", "a prefix or leading zeros"),
    "fractions": (lambda name: f"{name}.0", ".0 at the end, as pandas writes"),
    "capitals": (lambda name: name.upper(), "capital letters differ"),
    "other ids": (lambda name: f"{name}-{name}", "--corpus FILE or --qrels FILE"),
}


@pytest.mark.parametrize("what", SPELLINGS)
def test_ids_that_do_not_match_come_with_examples(what: str, folder: Path) -> None:
    change, fix = SPELLINGS[what]
    _plain(folder)
    ids = {name: name.removeprefix("p") if what in ("a prefix",) else name for name in PASSAGES}
    _tsv(folder / "collection.tsv", [(ids[name], text) for name, text in PASSAGES.items()])
    _tsv(folder / "qrels.tsv", _trec([(q, change(ids[p]), g) for q, p, g in LABELS]))
    with pytest.raises(UserError) as error:
        _draft(folder)
    message = str(error.value)
    assert "240 of 240 labels name a passage that is not there" in message and fix in message
    assert repr(change(ids["p0"])) in message and repr(ids["p0"]) in message
    assert not (folder.parent / "config.yaml").exists() and not (folder.parent / "config-data").exists()


def _spoil(name: str, text: str | bytes | None) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / name
        path.unlink() if text is None else path.write_bytes(text.encode() if isinstance(text, str) else text)

    return spoil


WRONG: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no labels": (_spoil("qrels.tsv", None), ["no labels (qrels)", "--qrels FILE names it", "queries.tsv (2 columns"]),
    "no queries": (_spoil("queries.tsv", None), ["no queries", "--queries FILE names it"]),
    "no corpus": (_spoil("collection.tsv", None), ["no passages (corpus)", "--corpus FILE names it"]),
    "an empty corpus": (_spoil("collection.tsv", ""), ["no passages (corpus)", "collection.tsv: the file is empty"]),
    "empty labels": (_spoil("qrels.tsv", ""), ["no labels (qrels)", "qrels.tsv: the file is empty"]),
    "a passage twice": (_spoil("collection.tsv", "p0\ta\np1\tb c\np0\td e\n"), ["row 3", "'p0', also in row 1"]),
    "a query twice": (_spoil("queries.tsv", "q0\ta b\nq0\tc d\n"), ["queries.tsv: row 2", "a duplicate query id"]),
    "no grade": (_spoil("qrels.tsv", "q0\t0\tp0\t1\n" * 250 + "q1\t0\tp1\thigh\n"), ["row 251", "not a whole number"]),
    "two grades": (_spoil("qrels.tsv", "q0\t0\tp0\t1\nq0\t0\tp0\t2\n"), ["a second grade for the same"]),
    "not UTF-8": (_spoil("collection.tsv", b"p0\tab\xff\n"), ["collection.tsv: 1 problem in collection.tsv"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_told_and_nothing_is_written(what: str, folder: Path) -> None:
    spoil, words = WRONG[what]
    _plain(folder)
    spoil(folder)
    with pytest.raises(UserError) as error:
        _draft(folder)
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["mine"]


def test_of_two_corpora_the_ids_decide(folder: Path) -> None:
    _plain(folder)
    _spoil("passages.tsv", "x\ty z\nw\tv u\n")(folder)
    assert _draft(folder).layout.corpus.table.name == "collection.tsv"
    (folder / "passages.tsv").write_bytes((folder / "collection.tsv").read_bytes())
    with pytest.raises(UserError, match="several files may be the corpus"):
        _draft(folder, force=True)
    assert _draft(folder, force=True, corpus="passages.tsv").layout.corpus.table.name == "passages.tsv"


def test_answers_without_texts_are_labels(folder: Path) -> None:
    """Their name is one of a corpus, and none of their columns is known."""
    _jsonl(folder / "pages.jsonl", [{"page": p, "body": text} for p, text in PASSAGES.items()])
    _csv(folder / "questions.csv", ["question_id", "question"], QUERIES.items())
    _csv(folder / "answers.csv", ["question_id", "page", "useful"], LABELS)
    layout = _draft(folder).layout
    labels = layout.qrels[None]
    assert (layout.corpus.table.name, layout.queries[None].table.name) == ("pages.jsonl", "questions.csv")
    assert (labels.table.name, labels.query, labels.passage, labels.grade) == (
        "answers.csv", "question_id", "page", "useful"
    )  # fmt: skip


def test_the_plain_name_is_taken_of_several(folder: Path) -> None:
    """The folder of MS MARCO, where queries.dev.small.tsv lies beside queries.dev.tsv."""
    _with_splits(folder)
    for name in ("queries", "qrels"):
        (folder / f"{name}.dev.small.tsv").write_bytes((folder / f"{name}.dev.tsv").read_bytes())
    (folder / "queries.eval.tsv").write_text("q900\tan unlabelled query\n")
    draft = _draft(folder)
    assert draft.made.queries["dev"] == str(folder / "queries.dev.tsv")
    assert sum("not used" in note for note in draft.notes) == 3


def test_nothing_of_the_user_is_replaced(folder: Path) -> None:
    _plain(folder)
    config = folder.parent / "config.yaml"
    config.write_text("mine")
    with pytest.raises(UserError, match="this is there already"):
        _draft(folder)
    assert config.read_text() == "mine"
    (folder.parent / "config-data").mkdir()
    (folder.parent / "config-data" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="the place of the new files is in use"):
        _draft(folder, force=True)
    assert (folder.parent / "config-data" / "thesis.tex").read_text() == "years"
    with pytest.raises(UserError, match="this is a folder"):
        draft_config(str(folder), Options(str(folder)))
    inside = folder / "config-data"
    draft_config(str(folder), Options(str(folder / "config.yaml")))
    draft_config(str(folder), Options(str(folder / "config.yaml"), force=True))
    with pytest.raises(UserError, match="would replace the folder that is read"):
        draft_config(str(inside), Options(str(folder / "config.yaml"), force=True))
    assert len(list(inside.glob("*.tsv"))) == 6


def test_the_command(folder: Path) -> None:
    _plain(folder)
    arguments = ["init", str(folder), "--output", str(folder.parent / "a.yaml")]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["splits"]["test"] == {"queries": 50, "labels": 50}
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "--force" in again.output
    nowhere = CliRunner().invoke(app, ["init", str(folder / "nowhere")])
    assert nowhere.exit_code == 2 and "this is no folder" in nowhere.output
    unknown = CliRunner().invoke(app, [*arguments, "--force", "--queries", "nowhere.tsv"])
    assert unknown.exit_code == 2 and "--queries: this file does not exist" in unknown.output


def test_names_and_headers() -> None:
    assert [role_of(n) for n in ("qrels/train.tsv", "data/corpus.jsonl", "query_relevance.tsv", "notes.txt")] == [
        "qrels", "corpus", "qrels", None,
    ]  # fmt: skip
    assert [split_of(n) for n in ("qrels/train.tsv", "dev/queries.tsv", "queries-validation.csv", "q.tsv")] == [
        "train", "dev", "dev", None,
    ]  # fmt: skip
    assert is_header(("id", "text"), []) and is_header(("nr", "satz"), [("1", "a b"), ("2", "c d")])
    assert not is_header(("q1", "p1", "1"), [("q2", "p2", "1")]) and not is_header(("7", "text"), [("8", "a b")])
    assert not is_header(("p0", "a"), [("p1", "b c")]) and not is_header(("ab", "word"), [("cd", "e f")])


def test_parquet_of_other_types(folder: Path) -> None:
    """Nulls become empty texts, lists are no columns, and fractions as grades are whole numbers when they are."""
    _plain(folder)
    (folder / "collection.tsv").unlink()
    texts = pa.array([*list(PASSAGES.values())[:-1], None], pa.string())
    tags = pa.array([[1]] * N)
    pq.write_table(pa.table({"passage_id": list(PASSAGES), "tags": tags, "text": texts}), folder / "corpus.parquet")
    (folder / "qrels.tsv").unlink()
    grades = {"query_id": list(QUERIES), "passage_id": list(PASSAGES), "relevance": [1.0] * N}
    pq.write_table(pa.table(grades), folder / "qrels.parquet")
    draft = _draft(folder)
    assert draft.facts.empty == 1 and _built(draft)[0] == N
