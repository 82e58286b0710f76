"""Bad input for every reader, made on the spot: what is wrong, and the call that a command makes of it.

`python -m tests.fault.bad_files --write docs/reference/bad_input.md` writes the table of what each is told.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ckd_ray.errors import JobError, UserError
from tests.sound import FORMATS, labels, msmarco, texts

Content = str | bytes | pa.Table | None


@dataclass(frozen=True)
class Given:
    """What the cases build on: a tiny encoder, a finished run made by hand, and a folder of their own."""

    backbone: str
    run: Path
    folder: Path


@dataclass(frozen=True)
class BadFile:
    """One case: the reader, what is wrong, and the call that meets it."""

    reader: str
    what: str
    meet: Callable[[Given], Any]

    @property
    def name(self) -> str:
        """For the test's id."""
        return re.sub(r"\W+", "-", f"{self.reader} {self.what}")[:90]


def outcome(case: BadFile, given: Given) -> str:
    """The message of the case in one line, without the folders of this machine. Raises whatever is no message."""
    try:
        told = case.meet(given)
    except (UserError, JobError) as error:
        text, kind = str(error), "2" if isinstance(error, UserError) else "1"
    else:
        text, kind = str(told), "0"
    for folder, short in ((given.folder, "DIR"), (given.run, "RUN"), (Path(given.backbone), "ENCODER")):
        text = text.replace(str(folder), short)
    text = "; ".join(line.strip() for line in text.splitlines())
    return f"{kind}: {text}"


# -- collections ------------------------------------------------------------------------------------------------------


def _put(path: Path, content: Content) -> None:
    if content is None:
        path.unlink()
    elif isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def _collection(kind: str, name: str, content: Content, *more: str) -> Callable[[Given], Any]:
    """Build a sound small collection in which one file is replaced (None: is missing); says what came of it."""

    def meet(given: Given) -> str:
        from ckd_ray.checks import load_config
        from ckd_ray.data import build_collection

        folder = given.folder / "in"
        folder.mkdir()
        FORMATS[kind](folder)
        _put(folder / name, content)
        values = [f"collection.format={kind}", f"collection.path={folder}", "collection.limit=null"]
        settings = load_config(None, [*values, *(m.replace("DIR", str(folder)) for m in more)]).collection
        built = build_collection(settings, str(given.folder / "out"))
        counts = {"passages": built.num_passages, "empty": built.empty_passages, "mended": built.mended_passages}
        return f"read: {json.dumps({**counts, **built.splits['train']})}"

    return meet


def _undecodable() -> pa.Array:
    offsets = pa.py_buffer(np.int32([0, 2]).tobytes())
    return pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])


def _squashed(cut: int | None) -> bytes:
    return gzip.compress("".join(f"p{i}\ttext {i * i}\n" for i in range(500)).encode(), mtime=0)[:cut]


_MEGABYTE = "word " * 200_000
_COLLECTIONS: list[tuple[str, str, str, Content, tuple[str, ...]]] = [
    ("msmarco", "a line without a tab", "collection.tsv", "p1\tone\np2 two\n", ()),
    ("msmarco", "an empty line in the middle", "collection.tsv", "p1\tone\n\np2\ttwo\n", ()),
    ("msmarco", "an empty passage id", "collection.tsv", "\tone\n", ()),
    ("msmarco", "a passage id of spaces", "collection.tsv", "p1\tone\n  \ttwo\n", ()),
    ("msmarco", "a NUL in a passage id", "collection.tsv", "p1\tone\np\x002\ttwo\n", ()),
    ("msmarco", "a passage twice", "collection.tsv", "p1\tone\np2\ttwo\np1\tthree\n", ()),
    ("msmarco", "an empty collection", "collection.tsv", "", ()),
    ("msmarco", "no collection", "collection.tsv", None, ()),
    ("msmarco", "UTF-16", "collection.tsv", "p1\tone\n".encode("utf-16"), ()),
    ("msmarco", "a byte that is not UTF-8", "collection.tsv", b"p1\tone\np2\tab\xff\n", ()),
    ("msmarco", "a line of 65 MiB without an end", "collection.tsv", b"p1\t" + bytes(65 << 20), ()),
    ("msmarco", "gzip cut off in the middle", "collection.tsv.gz", _squashed(400), ("collection.passages=DIR/collection.tsv.gz",)),
    ("msmarco", "a .gz that is none", "collection.tsv.gz", "p1\tone\n", ("collection.passages=DIR/collection.tsv.gz",)),
    ("msmarco", "an empty query id", "queries.train.tsv", "q1\ta?\n\tb?\n", ()),
    ("msmarco", "a query twice", "queries.train.tsv", "q1\ta?\nq1\tb?\n", ()),
    ("msmarco", "0 queries", "queries.train.tsv", "", ()),
    ("msmarco", "0 queries and 0 labels", "qrels.train.tsv", "", ("collection.queries.train=DIR/qrels.train.tsv",)),
    ("msmarco", "a label of an unknown query", "qrels.train.tsv", "q9\t0\tp1\t1\n", ()),
    ("msmarco", "a label of an unknown passage", "qrels.train.tsv", "q1\t0\tp9\t1\n", ()),
    ("msmarco", "two grades for one pair", "qrels.train.tsv", "q1\t0\tp1\t1\nq1\t0\tp1\t2\n", ()),
    ("msmarco", "a grade that is no number", "qrels.train.tsv", "q1\t0\tp1\t1\nq2\t0\tp2\thigh\n", ()),
    ("msmarco", "NaN as grade", "qrels.train.tsv", "q1\t0\tp1\tnan\n", ()),
    ("msmarco", "fractions below the positive grade", "qrels.train.tsv", "q1\t0\tp1\t0.5\n", ()),
    ("msmarco", "kept: fractions from the positive grade on", "qrels.train.tsv", "q1\t0\tp1\t0.5\n", ("collection.positive_grade=0.5",)),
    ("msmarco", "a grade of 5,000 digits", "qrels.train.tsv", "q1\t0\tp1\t" + "9" * 5000, ()),
    ("msmarco", "negative grades only", "qrels.train.tsv", "q1\t0\tp1\t-1\n", ()),
    ("msmarco", "two columns", "qrels.train.tsv", "q1\tp1\n", ()),
    ("msmarco", "a folder in place of the file", "qrels.train.tsv", None, ("collection.qrels.train=DIR",)),
    ("msmarco", "kept: a NUL, a line of 1 MB, right-to-left, emoji", "collection.tsv", f"p1\ta\x00b\np2\t{_MEGABYTE}\np3\tשלום ‮x\np4\t🦄\n", ()),
    ("msmarco", "kept: ids with quotes, spaces and other scripts", "qrels.train.tsv", "q1\t0\tp1\t1\n", ()),
    ("msmarco", "kept: a negative grade and the largest one", "qrels.train.tsv", "q1\t0\tp1\t2147483647\nq2\t0\tp2\t-2147483648\n", ()),
    ("msmarco", "kept: the same label twice", "qrels.train.tsv", "q1\t0\tp1\t1\nq1\t0\tp1\t1\n", ()),
    ("msmarco", "kept: an empty passage, Windows line ends, a byte-order mark", "collection.tsv", b"\xef\xbb\xbfp1\tone\r\np2\t\r\n", ()),
    ("beir", "not JSON", "corpus.jsonl", "p1\tone\n", ()),
    ("beir", "a list in place of an object", "corpus.jsonl", '["p1", "one"]\n', ()),
    ("beir", "JSON nested 200,000 deep", "corpus.jsonl", "[" * 200_000, ()),
    ("beir", "no id", "corpus.jsonl", '{"name": "p1", "text": "one"}\n', ()),
    ("beir", "no text", "queries.jsonl", '{"_id": "q1"}\n', ()),
    ("beir", "a text that is a number", "corpus.jsonl", '{"_id": "p1", "text": 5}\n', ()),
    ("beir", "an id that is a fraction", "corpus.jsonl", '{"_id": 1.5, "text": "x"}\n', ()),
    ("beir", "half a surrogate pair in an id", "corpus.jsonl", '{"_id": "p\\ud800", "text": "x"}\n', ()),
    ("beir", "a NUL in a query id", "queries.jsonl", '{"_id": "q\\u0000", "text": "x"}\n', ()),
    ("beir", "a grade that is no number", "qrels/train.tsv", "query-id\tcorpus-id\tscore\nq1\tp1\tyes\n", ()),
    ("beir", "a header alone", "qrels/train.tsv", "query-id\tcorpus-id\tscore\n", ()),
    ("beir", "no such folder", "corpus.jsonl", "", ("collection.path=DIR/nowhere",)),
    ("beir", "kept and counted: half a surrogate pair in a text", "corpus.jsonl", '{"_id": "p1", "text": "a\\ud800b"}\n', ()),
    ("beir", "kept and counted: half a surrogate pair in a query", "queries.jsonl", '{"_id": "q1", "text": "a\\ud800"}\n', ()),
    ("parquet", "not Parquet", "passages.parquet", b"PAR1 but not really PAR1", ()),
    ("parquet", "an empty file", "passages.parquet", b"", ()),
    ("parquet", "no text column", "passages.parquet", pa.table({"passage_id": ["p1"]}), ()),
    ("parquet", "bytes in place of strings", "passages.parquet", texts("passage_id", ["p1"], [b"x"]), ()),
    ("parquet", "a null text", "passages.parquet", texts("passage_id", ["p1"], pa.array([None], pa.string())), ()),
    ("parquet", "undecodable strings", "passages.parquet", pa.table([pa.array(["p1"]), _undecodable()], ["passage_id", "text"]), ()),
    ("parquet", "fractions as ids", "passages.parquet", texts("passage_id", [1.0], ["x"]), ()),
    ("parquet", "words as grades", "qrels.train.parquet", labels(["q1"], ["p1"], ["high"]), ()),
    ("parquet", "no column of relevance among others", "qrels.train.parquet", pa.table({"query_id": ["q1"], "passage_id": ["p1"], "rate": [0.1]}), ()),
    ("parquet", "a given column that is not there", "passages.parquet", texts("passage_id", ["p1"], ["x"]), ("collection.columns={title: headline}",)),
    ("parquet", "kept: whole numbers as fractions", "qrels.train.parquet", labels(["q1"], ["p1"], [1.0]), ()),
    ("parquet", "a grade beyond 32 bits", "qrels.train.parquet", labels(["q1"], ["p1"], [2**40]), ()),
    ("jsonl", "a row without the relevance that others have", "qrels.train.jsonl", '{"qid": "q1", "pid": "p1", "score": 1}\n{"qid": "q1", "pid": "p1"}\n', ()),
    ("jsonl", "a key of another name", "passages.jsonl", '{"id": "p1", "content": "x"}\n', ()),
    ("jsonl", "a given key that no row has", "passages.jsonl", '{"id": "p1", "text": "x"}\n', ("collection.columns={title: headline}",)),
    ("jsonl", "a pattern that no file matches", "passages.jsonl", '{"id": "p1", "text": "x"}\n', ("collection.passages=DIR/parts-*.jsonl",)),
    ("csv", "no header line", "passages.csv", "p1,T,one\n", ()),
    ("csv", "a column too few", "passages.csv", "id,title,text\np1,T\n", ()),
    ("csv", "a quotation mark without an end", "passages.csv", 'id,title,text\np1,T,"one\n', ()),
    ("csv", "an empty file", "passages.csv", "", ()),
    ("parquet", "0 rows", "passages.parquet", pa.table({"passage_id": pa.array([], pa.string()), "text": pa.array([], pa.string())}), ()),
]  # fmt: skip


def _ir_datasets(corpus: str, *more: str) -> Callable[[Given], Any]:
    """A data set of ir_datasets on local files; `corpus` is its collection.tsv."""

    def meet(given: Given) -> str:
        import ir_datasets
        from ir_datasets.datasets.base import Dataset
        from ir_datasets.formats import TrecQrels, TsvDocs, TsvQueries

        from ckd_ray.checks import load_config
        from ckd_ray.data import build_collection

        class Local:
            def __init__(self, path: Path) -> None:
                self._path = path

            def stream(self) -> Any:
                return self._path.open("rb")

            def path(self, force: bool = True) -> str:
                return str(self._path)

        name = f"bad-{given.folder.name}"
        msmarco(given.folder)
        (given.folder / "collection.tsv").write_text(corpus)
        docs = TsvDocs(Local(given.folder / "collection.tsv"), namespace=name, lang="en")
        queries = TsvQueries(Local(given.folder / "queries.train.tsv"), namespace=name, lang="en")
        qrels = TrecQrels(Local(given.folder / "qrels.train.tsv"), {})
        for key, dataset in ((name, Dataset(docs)), (f"{name}/train", Dataset(docs, queries, qrels))):
            ir_datasets.registry.register(key, dataset)
        config = load_config(None, ["collection.format=ir_datasets", f"collection.path={name}", *more])
        try:
            built = build_collection(config.collection, str(given.folder / "out"))
        except UserError as error:
            raise UserError(str(error).replace(name, "NAME")) from error
        return f"read: {built.num_passages} passages"

    return meet


# -- scores, runs, configuration --------------------------------------------------------------------------------------


def _scores(name: str, content: Content) -> Callable[[Given], Any]:
    def meet(given: Given) -> str:
        from ckd_ray.cross_encoder.candidates import CandidateReader
        from ckd_ray.cross_encoder.score_file import import_scores

        run = _copied(given)
        shutil.copytree(run / "evaluation" / "rankings" / "teacher", run / "rankings")
        for path in (run / "rankings").glob("dev-*"):  # rankings of as many queries will do
            shutil.copy(path, path.with_name(path.name.replace("dev", "train")))
        _put(given.folder / name, content)
        reader = CandidateReader(str(run), 1, 15)
        _, coverage = import_scores(str(given.folder / name), str(given.folder / "out"), reader, str(run))
        return f"read: {json.dumps(coverage.figures())}"

    return meet


def _trec(content: bytes | None) -> Callable[[Given], Any]:
    def meet(given: Given) -> str:
        from ckd_ray.evaluate.runs import read_trec_run

        if content is not None:
            (given.folder / "x.run").write_bytes(content)
        return f"read: {len(read_trec_run(str(given.folder / 'x.run')))} rows"

    return meet


def _config(text: str | bytes | None, *overrides: str) -> Callable[[Given], Any]:
    def meet(given: Given) -> str:
        from ckd_ray.checks import load_config

        path = given.folder / "c.yaml"
        if text is not None:
            path.write_bytes(text.encode() if isinstance(text, str) else text)
        load_config(str(path), list(overrides))
        return "read"

    return meet


_PAIRS = {"query_id": ["q1"], "passage_id": ["p1"]}
_SCORES: list[tuple[str, str, Content]] = [
    ("a name of no known form", "x.csv", "q1,p1,1\n"),
    ("two columns", "x.tsv", "q1\tp1\n"),
    ("a score that is no number", "x.tsv", "q1\tp1\thigh\n"),
    ("NaN and infinity", "x.tsv", "q1\tp1\tnan\nq1\tp2\tinf\n"),
    ("an unknown query", "x.tsv", "nobody\tp1\t1\n"),
    ("an unknown passage", "x.tsv", "q1\tnothing\t1\n"),
    ("two scores for one pair", "x.tsv", "q1\tp1\t1\nq1\tp1\t2\n"),
    ("scores of no candidate", "x.tsv", "q1\tp1\t1\n"),
    ("not UTF-8", "x.tsv", b"q1\tp\xff\t1\n"),
    ("gzip cut off in the middle", "x.tsv.gz", _squashed(400)),
    ("JSON that is no row", "x.jsonl", '{"q1": 1}\n'),
    ("JSON nested 200,000 deep", "x.jsonl", "[" * 200_000),
    ("a score of 400 digits", "x.jsonl", f'["q1", ["p1", {"9" * 400}]]\n'),
    ("half a surrogate pair in an id", "x.jsonl", '["q1", ["p\\ud800", 1.0]]\n'),
    ("not Parquet", "x.parquet", b"PAR1PAR1"),
    ("no column score", "x.parquet", pa.table(_PAIRS)),
    ("lists of different lengths", "x.parquet", pa.table({"query_id": ["q1"], "document_ids": [["p1", "p2"]], "scores": [[1.0]]})),
    ("a text that is no list", "x.parquet", pa.table({"query_id": ["q1"], "document_ids": ["p1 p2"], "scores": ["1 2"]})),
    ("words as scores", "x.parquet", pa.table({**_PAIRS, "score": ["high"]})),
    ("a null id", "x.parquet", pa.table({**_PAIRS, "passage_id": pa.array([None], pa.string()), "score": [1.0]})),
    ("undecodable ids", "x.parquet", pa.table([pa.array(["q1"]), _undecodable(), pa.array([1.0])], ["query_id", "passage_id", "score"])),
]  # fmt: skip

_RUNS: list[tuple[str, bytes | None]] = [
    ("five columns", b"q1 Q0 p1 1 0.5\n"),
    ("a rank that is no number", b"q1 Q0 p1 first 0.5 tag\n"),
    ("a score that is not finite", b"q1 Q0 p1 1 nan tag\n"),
    ("not UTF-8", b"q1 Q0 p\xff 1 0.5 tag\n"),
    ("no such file", None),
]

_CONFIGS: list[tuple[str, str | bytes | None, tuple[str, ...]]] = [
    ("no such file", None, ()),
    ("not YAML", "run: {name: x\n", ()),
    ("not UTF-8", b"run: {name: \xff}\n", ()),
    ("a list in place of sections", "- run\n- model\n", ()),
    ("an unknown key, and its neighbour", "distill: {temperatur: 0.3}\n", ()),
    ("a key given twice", "run: {seed: 1, seed: 2}\n", ()),
    ("a wrong type", "retrieve: {depth: many}\n", ()),
    ("out of range", "distill: {temperature: 0}\nrun: {seed: -1}\n", ()),
    ("infinity", "distill: {beta: .inf}\n", ()),
    ("yes in place of a number", "retrieve: {depth: yes}\n", ()),
    ("an impossible combination", "retrieve: {depth: 10}\ndistill: {negatives_depth: 100}\n", ()),
    ("a run name that leads out", "run: {name: ../elsewhere}\n", ()),
    ("a tag that would run code", "run: !!python/object/apply:os.system ['true']\n", ()),
    ("nested 5,000 deep", "[" * 5000, ()),
    ("--set without a value", "run: {name: x}\n", ("distill.temperature",)),
    ("a measure that nobody knows", "evaluate: {measures: [MMR@10]}\n", ()),
    ("a measure that nothing computes", "evaluate: {measures: [RBP@10]}\n", ()),
    ("a comparison with a cross-encoder that is not given", "compare: {objectives: [cross_encoder]}\n", ()),
    ("a measure deeper than the ranking", "evaluate: {depth: 10, measures: [R@100]}\n", ()),
]
_SPACES: list[tuple[str, str]] = [
    ("a key that cannot vary", "{run.seed: {choice: [1, 2]}}"),
    ("a key misspelt", "{distill.temperatur: {uniform: [0.1, 1]}}"),
    ("an unknown kind", "{distill.temperature: {normal: [0, 1]}}"),
    ("low above high", "{distill.temperature: {uniform: [1, 0.1]}}"),
    ("a logarithm of 0", "{distill.temperature: {loguniform: [0, 1]}}"),
    ("fractions of a whole number", "{label.clusters: {uniform: [12, 24]}}"),
    ("a value out of range", "{distill.temperature: {choice: [0.1, -1]}}"),
    ("no list", "{distill.beta: {choice: 0.1}}"),
]


# -- models -----------------------------------------------------------------------------------------------------------


def _copied(given: Given) -> Path:
    run = given.folder / "run"
    shutil.copytree(given.run, run)
    return run


def _checkpoint(name: str, content: Content, *, of: str = "teacher") -> Callable[[Given], Any]:
    """Load the run's teacher with one file replaced; `of="backbone"`: a bare encoder."""

    def meet(given: Given) -> str:
        from ckd_ray.model import ColBERTSettings
        from ckd_ray.model.exchange import load_any

        source = given.run / "teacher" if of == "teacher" else Path(given.backbone)
        shutil.copytree(source, given.folder / "m")
        _put(given.folder / "m" / name, content)
        load_any(str(given.folder / "m"), ColBERTSettings(dim=16, query_maxlen=12, doc_maxlen=48))
        return "read"

    return meet


def _dnn(make: Callable[[Path], None]) -> Callable[[Given], Any]:
    def meet(given: Given) -> str:
        from ckd_ray.model import ColBERTSettings
        from ckd_ray.model.exchange import load_any

        make(given.folder / "x.dnn")
        load_any(str(given.folder / "x.dnn"), ColBERTSettings(dim=16), encoder=given.backbone)
        return "read"

    return meet


def _saved(value: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        import torch

        torch.save(value() if callable(value) else value, path)

    return make


def _linear(*shape: int) -> dict[str, Any]:
    import torch

    return {"model_state_dict": {"linear.weight": torch.zeros(shape)}}


_PROJECTION = "projection.safetensors"
_CHECKPOINTS: list[tuple[str, str, Content]] = [
    ("settings that are no JSON", "colbert.json", "{dim: 16"),
    ("settings that are a list", "colbert.json", "[16]"),
    ("a dimension in words", "colbert.json", '{"dim": "sixteen"}'),
    ("a negative length", "colbert.json", '{"dim": 16, "doc_maxlen": -1}'),
    ("an unknown similarity", "colbert.json", '{"dim": 16, "similarity": "dot"}'),
    ("a marker that is no token", "colbert.json", '{"dim": 16, "query_maxlen": 12, "doc_maxlen": 48, "doc_marker": "[nope]"}'),
    ("another dimension than the projection", "colbert.json", '{"dim": 8, "query_maxlen": 12, "doc_maxlen": 48}'),
    ("longer than the encoder holds", "colbert.json", '{"dim": 16, "query_maxlen": 12, "doc_maxlen": 512}'),
    ("no projection", _PROJECTION, None),
    ("a projection cut off", _PROJECTION, b"\x40\x00\x00\x00\x00\x00\x00\x00{"),
    ("a projection that is empty", _PROJECTION, b""),
    ("no configuration", "config.json", None),
    ("a configuration that is no JSON", "config.json", "not JSON"),
    ("an unknown kind of model", "config.json", '{"model_type": "nothing-known"}'),
    ("weights cut off", "model.safetensors", b"\x40\x00\x00\x00\x00\x00\x00\x00{"),
    ("no weights", "model.safetensors", None),
    ("a tokenizer that is no JSON", "tokenizer.json", "{"),
    ("an index that leads out", "model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}'),
    ("an index that is none", "model.safetensors.index.json", "[]"),
]  # fmt: skip
_DNNS: list[tuple[str, Callable[[Path], None]]] = [
    ("an empty file", lambda path: path.write_bytes(b"")),
    ("not a torch file", lambda path: path.write_bytes(b"hello world" * 10)),
    ("a number", _saved(7)),
    ("no model_state_dict", _saved({"weights": {}})),
    ("no projection", _saved({"model_state_dict": {}})),
    ("a projection of three axes", _saved(lambda: _linear(2, 2, 2))),
    ("a projection alone", _saved(lambda: _linear(16, 32))),
    ("an object that would run code", _saved(lambda: {"model_state_dict": Path("x")})),
]
_MODULES: list[tuple[str, str]] = [
    ("modules.json that is no JSON", "["),
    ("modules.json that is an object", "{}"),
    ("a module outside of the folder", '[{"type": "x.Transformer", "path": "../.."}]'),
]


# -- run directories and stores ---------------------------------------------------------------------------------------


def _run(command: str, name: str, content: Content) -> Callable[[Given], Any]:
    """What a command says of a finished run in which one file is replaced (None: is missing)."""

    def meet(given: Given) -> str:
        from ckd_ray.evaluate.against import Side
        from ckd_ray.report.page import write_report
        from ckd_ray.runs.finished import open_finished

        run = _copied(given)
        _put(run / name, content)
        if command == "report":
            write_report(open_finished(str(run)))
        elif command == "against":
            Side.of(open_finished(str(run)), "student")
        elif command == "export":
            from ckd_ray.pipeline.export import export_run

            export_run(str(run), "pylate", out=str(given.folder / "out"))
        else:
            from ckd_ray.search.searcher import Searcher

            Searcher(open_finished(str(run))).search("ban", 3)
        return "read"

    return meet


_FINISHED: list[tuple[str, str, str, Content]] = [
    ("report", "no run.json", "run.json", None),
    ("report", "run.json cut off", "run.json", '{"config": {'),
    ("report", "run.json that is a list", "run.json", "[]"),
    ("report", "a configuration that is a number", "run.json", '{"config": 7}'),
    ("report", "measures without splits", "evaluation/measures.json", '{"split": "dev"}'),
    ("report", "a comparison of words", "evaluation/comparison.json", '{"dev": {"MRR@10": {"teacher": "high"}}}'),
    ("report", "a collection's manifest without rows", "corpus/_manifest.json", '{"splits": {}}'),
    ("report", "losses that are no JSON", "student/metrics.jsonl", "loss 0.5\n"),
    ("report", "a run that is no TREC run", "evaluation/student.dev.run", "PAR1\n"),
    ("evaluate --against", "no values of queries", "evaluation/student.dev.per_query.json", "[]"),
    ("evaluate --against", "values in words", "evaluation/student.dev.per_query.json", '{"MRR@10": {"q1": "high"}}'),
    ("search", "no store", "student_embeddings/passages/manifest.json", None),
    ("search", "a store's manifest without sizes", "student_embeddings/passages/manifest.json", '{"schema_version": 2}'),
    ("search", "a store of another version", "student_embeddings/passages/manifest.json", '{"schema_version": 1}'),
    ("search", "a shard that is empty", "student_embeddings/passages/shard-000001.arrow", b""),
    ("search", "a shard that is text", "student_embeddings/passages/shard-000001.arrow", "hello"),
    ("search", "no student", "student/colbert.json", None),
    ("export", "a student that was not finished", "student/_manifest.json", None),
    ("export", "a student without weights", "student/model.safetensors", None),
]  # fmt: skip


def _shard(change: Callable[[Path], None]) -> Callable[[Given], Any]:
    """Read a passage of a store whose second shard was changed."""

    def meet(given: Given) -> str:
        from ckd_ray.store import EmbeddingStore

        folder = given.folder / "store"
        shutil.copytree(given.run / "embeddings" / "passages", folder)
        change(folder)
        store = EmbeddingStore.open(str(folder))
        store.gather(np.arange(store.num_passages))
        return "read"

    return meet


def _flip(folder: Path) -> None:
    from ckd_ray.store import Shard, shard_name

    path = folder / shard_name(1)
    data, codes = bytearray(path.read_bytes()), Shard(str(path)).codes.tobytes()
    data[data.index(codes) + 5] ^= 1
    path.write_bytes(data)


def _cut(folder: Path) -> None:
    from ckd_ray.store import shard_name

    os.truncate(folder / shard_name(1), (folder / shard_name(1)).stat().st_size - 300)


def _swap(folder: Path) -> None:
    from ckd_ray.store import shard_name

    shutil.copy(folder / shard_name(2), folder / shard_name(1))


def _short(folder: Path) -> None:
    from ckd_ray.store.writing import LENGTHS

    os.truncate(folder / LENGTHS, 8)


_SHARDS = [
    ("one bit flipped", _flip),
    ("cut off", _cut),
    ("another shard in its place", _swap),
    ("lengths cut off", _short),
]


def _all() -> list[BadFile]:
    cases = [BadFile(kind, what, _collection(kind, *rest, *more)) for kind, what, *rest, more in _COLLECTIONS]
    at = next(i for i, case in enumerate(cases) if "ids with quotes" in case.what)
    cases[at] = BadFile("msmarco", cases[at].what, _odd_ids)
    cases += [
        BadFile("ir_datasets", "a line without a tab", _ir_datasets("p1 one\n")),
        BadFile("ir_datasets", "an empty collection", _ir_datasets("")),
        BadFile("ir_datasets", "a passage twice", _ir_datasets("p1\tone\np1\ttwo\n")),
        BadFile("ir_datasets", "an unknown split", _ir_datasets("p1\tone\n", "collection.train=nowhere")),
    ]
    cases += [BadFile("scores", what, _scores(*rest)) for what, *rest in _SCORES]
    cases += [BadFile("scores", "no such file", _missing_scores)]
    cases += [BadFile("TREC run", what, _trec(content)) for what, content in _RUNS]
    cases += [BadFile("configuration", what, _config(text, *more)) for what, text, more in _CONFIGS]
    cases += [BadFile("tune.space", what, _config(f"tune: {{space: {space}}}\n")) for what, space in _SPACES]
    cases += [BadFile("checkpoint", what, _checkpoint(*rest)) for what, *rest in _CHECKPOINTS]
    cases += [BadFile("encoder", "a tokenizer cut off", _checkpoint("tokenizer.json", "{", of="backbone"))]
    cases += [BadFile("encoder", what, _checkpoint("modules.json", text, of="backbone")) for what, text in _MODULES]
    cases += [BadFile(".dnn", what, _dnn(make)) for what, make in _DNNS]
    cases += [BadFile(command, what, _run(command.rpartition("--")[2], *rest)) for command, what, *rest in _FINISHED]
    cases += [BadFile("store", what, _shard(change)) for what, change in _SHARDS]
    return cases


def _odd_ids(given: Given) -> str:
    from ckd_ray.checks import load_config
    from ckd_ray.data import Collection, build_collection

    ids = ['"quoted"', "with space", "ид-7", "😀", "a'b\\c", "<b>"]
    (given.folder / "collection.tsv").write_text("".join(f"{name}\ttext {name}\n" for name in ids))
    (given.folder / "queries.train.tsv").write_text("".join(f"q {name}\tquery\n" for name in ids))
    (given.folder / "qrels.train.tsv").write_text("".join(f"q {name}\t0\t{name}\t1\n" for name in ids))
    config = load_config(None, ["collection.format=msmarco", f"collection.path={given.folder}"])
    built = build_collection(config.collection, str(given.folder / "out"))
    assert Collection.open(str(given.folder / "out")).passage_ids(range(len(ids))) == ids
    return f"read: {json.dumps({'passages': built.num_passages, **built.splits['train']})}"


def _missing_scores(given: Given) -> str:
    from ckd_ray.files import file_signature

    return str(file_signature(str(given.folder / "x.tsv")))


CASES = _all()


def table(outcomes: dict[BadFile, str]) -> str:
    """docs/reference/bad_input.md."""
    lines = [
        "# Bad input, and the message for it",
        "",
        f"{len(outcomes)} inputs, made and read by `pytest tests/fault/test_bad_files.py`. This table is written by",
        "`python -m tests.fault.bad_files --write docs/reference/bad_input.md` and compared by a test. The number is the exit status",
        "of the command: 2, the input is wrong; 1, what a run has written is damaged (the file is named, and `ckd-ray train`",
        "makes broken shards again by itself); 0, the input is taken, with what is counted of it. No input",
        "ends in a traceback, and none is left out without being counted: what is read = what is kept + what is reported.",
        "",
        "| reader | what is wrong | exit | message |",
        "|---|---|---|---|",
    ]
    for case, told in outcomes.items():
        kind, _, text = told.partition(": ")
        lines.append(f"| {case.reader} | {_cell(case.what)} | {kind} | {_cell(text)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str, most: int = 420) -> str:
    """Text fit for a cell of a Markdown table: printable, without bars and tags."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    text = text if len(text) <= most else text[: most - 4] + " ..."
    return text.replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Run all cases and write the table."""
    import logging

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", required=True)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    from tests.evidence import hand_made_run
    from tests.support import tiny_bert, write_collection

    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        backbone = tiny_bert(base / "encoder")
        run = hand_made_run(base / "runs", backbone, write_collection(base / "collection"))
        outcomes = {}
        for i, case in enumerate(CASES):
            folder = base / f"case-{i:03d}"
            folder.mkdir()
            outcomes[case] = outcome(case, Given(backbone, run, folder))
            shutil.rmtree(folder)
    Path(arguments.write).write_text(table(outcomes))


if __name__ == "__main__":
    main()
