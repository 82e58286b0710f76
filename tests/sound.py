"""The smallest sound collection in each format, for tests that spoil one file of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def msmarco(folder: Path) -> None:
    (folder / "collection.tsv").write_text("p1\tone\np2\ttwo\n")
    (folder / "queries.train.tsv").write_text("q1\ta?\nq2\tb?\n")
    (folder / "qrels.train.tsv").write_text("q1\t0\tp1\t1\n")


def beir(folder: Path) -> None:
    (folder / "qrels").mkdir()
    (folder / "corpus.jsonl").write_text('{"_id": "p1", "title": "T", "text": "one"}\n')
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "a?"}\n{"_id": "q2", "text": "b?"}\n')
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\tp1\t1\n")


def parquet(folder: Path) -> None:
    pq.write_table(texts("passage_id", ["p1"], ["one"]), folder / "passages.parquet")
    pq.write_table(texts("query_id", ["q1"], ["a?"]), folder / "queries.train.parquet")
    pq.write_table(labels(["q1"], ["p1"], [1]), folder / "qrels.train.parquet")


def jsonl(folder: Path) -> None:
    (folder / "passages.jsonl").write_text('{"id": "p1", "text": "one"}\n')
    (folder / "queries.train.jsonl").write_text('{"id": "q1", "text": "a?"}\n')
    (folder / "qrels.train.jsonl").write_text('{"query_id": "q1", "passage_id": "p1", "score": 1}\n')


def csv(folder: Path) -> None:
    (folder / "passages.csv").write_text('id,title,text\np1,T,"one, and more"\n')
    (folder / "queries.train.csv").write_text("id,text\nq1,a?\n")
    (folder / "qrels.train.csv").write_text("query_id,passage_id,score\nq1,p1,1\n")


def texts(name: str, ids: object, values: object) -> pa.Table:
    return pa.table({name: ids, "text": values})


def labels(queries: object, passages: object, grades: object) -> pa.Table:
    return pa.table({"query_id": queries, "passage_id": passages, "relevance": grades})


FORMATS: dict[str, Callable[[Path], None]] = {
    "msmarco": msmarco,
    "beir": beir,
    "parquet": parquet,
    "jsonl": jsonl,
    "csv": csv,
}
