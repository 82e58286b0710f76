"""Readers: every format becomes the same three streams, passages, queries and qrels.

They check the form of what they read (tabs, columns, JSON, numbers); what depends on the whole (duplicates, unknown
ids) is checked in `build.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ckd_ray.config import CollectionConfig
from ckd_ray.config.schema import Split
from ckd_ray.data.lines import read_lines
from ckd_ray.data.problems import Problems, shorten
from ckd_ray.errors import UserError
from ckd_ray.store.files import exists, filesystem_of, join, list_files

SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True)
class TextRow:
    """A passage or a query, and where it stands (file:line)."""

    id: str
    text: str
    where: str


@dataclass(frozen=True)
class QrelRow:
    """A label, and where it stands."""

    query_id: str
    passage_id: str
    relevance: int
    where: str


@dataclass(frozen=True)
class Source:
    """The streams of a collection; each call reads from the start.

    Attributes:
        files: what is read, for the fingerprint of the input.
        splits: those that have both queries and qrels.
    """

    passages: Callable[[Problems], Iterator[TextRow]]
    queries: Callable[[str, Problems], Iterator[TextRow]]
    qrels: Callable[[str, Problems], Iterator[QrelRow]]
    splits: tuple[str, ...]
    files: tuple[str, ...]


def open_source(settings: CollectionConfig) -> Source:
    """The source that the configuration names.

    Raises:
        UserError: a file or folder is missing.
    """
    if settings.format == "docstrings":
        from ckd_ray.data.docstrings import docstring_source

        return docstring_source(settings)
    if settings.format == "ir_datasets":
        from ckd_ray.data.irds import ir_datasets_source

        return ir_datasets_source(settings)
    return _file_source(settings)


_PASSAGES = {"msmarco": ("collection.tsv",), "beir": ("corpus.jsonl",), "parquet": ("passages.parquet",)}
_QUERIES = {"msmarco": ("queries.{}.tsv",), "beir": ("queries.jsonl",), "parquet": ("queries.{}.parquet",)}
_QRELS = {"msmarco": ("qrels.{}.tsv",), "beir": ("qrels/{}.tsv",), "parquet": ("qrels.{}.parquet",)}


def _file_source(settings: CollectionConfig) -> Source:
    kind = settings.format
    if settings.path is not None and not exists(settings.path):
        raise UserError("this folder does not exist", where="collection.path", found=settings.path)
    passages = settings.passages or _find(settings, _PASSAGES[kind][0], required=True)
    assert passages is not None
    queries: dict[str, str] = {}
    qrels: dict[str, str] = {}
    for split in SPLITS:
        name = getattr(settings, split)
        found_queries = settings.queries.get(split) or _find(settings, _QUERIES[kind][0].format(name), split == "train")
        found_qrels = settings.qrels.get(split) or _find(settings, _QRELS[kind][0].format(name), split == "train")
        if found_queries and found_qrels:
            queries[split], qrels[split] = found_queries, found_qrels
    files = (passages, *queries.values(), *qrels.values())
    for file in files:
        if not exists(file):
            raise UserError("this file does not exist", where="collection", found=file)
    readers: dict[str, tuple[Any, Any, Any]] = {
        "msmarco": (_tsv_texts, _tsv_texts, _tsv_qrels),
        "beir": (_json_texts, _json_texts, _tsv_qrels),
        "parquet": (_parquet_passages, _parquet_queries, _parquet_qrels),
    }
    read_passages, read_queries, read_qrels = readers[kind]
    return Source(
        passages=lambda problems: read_passages(passages, problems),
        queries=lambda split, problems: read_queries(queries[split], problems),
        qrels=lambda split, problems: read_qrels(qrels[split], problems),
        splits=tuple(queries),
        files=tuple(dict.fromkeys(files)),
    )


def _find(settings: CollectionConfig, name: str, required: bool) -> str | None:
    """`name` in the folder, or the same with .gz."""
    for candidate in (name, f"{name}.gz") if settings.path else ():
        if exists(join(str(settings.path), candidate)):
            return join(str(settings.path), candidate)
    if not required:
        return None
    have = ", ".join(list_files(settings.path)[:12]) if settings.path else "nothing: collection.path is not set"
    raise UserError(
        f"the collection has no {name}",
        where=settings.path or "collection",
        expected=f"{name} or {name}.gz",
        found=have or "an empty folder",
        fix="name the file under collection.passages, collection.queries or collection.qrels",
    )


def _tsv_texts(uri: str, problems: Problems) -> Iterator[TextRow]:
    """`id TAB text`; further tabs belong to the text."""
    for first, lines in read_lines(uri, problems):
        for i, line in enumerate(lines):
            where = f"{uri}:{first + i}"
            name, tab, text = line.partition("\t")
            if not tab:
                problems.add(where, "a line without a tab", expected="id TAB text", found=shorten(line))
                continue
            yield TextRow(name, text, where)


def _json_texts(uri: str, problems: Problems) -> Iterator[TextRow]:
    """BEIR: `_id`, `text`, and for passages `title`, which goes in front of the text."""
    for first, lines in read_lines(uri, problems):
        for i, line in enumerate(lines):
            where = f"{uri}:{first + i}"
            try:
                value = json.loads(line)
            except ValueError as error:
                problems.add(where, "not valid JSON", expected="one object a line", found=f"{shorten(line)} ({error})")
                continue
            if not isinstance(value, dict) or not isinstance(value.get("_id"), str | int):
                problems.add(where, "no _id", expected='an object with "_id" and "text"', found=shorten(line))
                continue
            text = value.get("text", "")
            title = value.get("title") or ""
            if not isinstance(text, str) or not isinstance(title, str):
                problems.add(where, "text or title is not a string", expected="strings", found=shorten(line))
                continue
            yield TextRow(str(value["_id"]), f"{title} {text}".strip() if title else text, where)


def _tsv_qrels(uri: str, problems: Problems) -> Iterator[QrelRow]:
    """TREC's four columns (query, 0, passage, grade) by tabs or spaces, or BEIR's three with a header line."""
    for first, lines in read_lines(uri, problems):
        for i, line in enumerate(lines):
            where, number = f"{uri}:{first + i}", first + i
            columns = line.split("\t") if "\t" in line else line.split()
            if len(columns) == 4:
                query_id, _, passage_id, grade = columns
            elif len(columns) == 3:
                query_id, passage_id, grade = columns
                if number == 1 and not _is_integer(grade):
                    continue  # BEIR's header: query-id, corpus-id, score
            else:
                problems.add(
                    where,
                    "wrong number of columns",
                    expected="query, 0, passage, grade",
                    found=f"{len(columns)}: {shorten(line)}",
                )
                continue
            if not _is_integer(grade):
                problems.add(where, "the grade is not a whole number", expected="an integer", found=shorten(grade))
                continue
            if not -(2**31) <= int(grade) < 2**31:
                problems.add(where, "the grade is out of range", expected="32 bits", found=shorten(grade))
                continue
            yield QrelRow(query_id, passage_id, int(grade), where)


def _is_integer(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal() and text.isascii()


def _parquet(uri: str, wanted: dict[str, tuple[str, ...]]) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Batches of the wanted columns (each under one of several names), with the number of their first row."""
    fs, path = filesystem_of(uri)
    try:
        file = pq.ParquetFile(path, filesystem=fs)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError("not a Parquet file", where=uri, found=str(error).splitlines()[0]) from None
    have = file.schema_arrow.names
    columns = {}
    for name, spellings in wanted.items():
        match = next((s for s in spellings if s in have), None)
        if match is None:
            raise UserError(f"no column {name}", where=uri, expected=" or ".join(spellings), found=", ".join(have))
        columns[name] = match
    row = 1
    for batch in file.iter_batches(batch_size=4096, columns=list(columns.values())):
        yield row, {name: batch[column].to_pylist() for name, column in columns.items()}
        row += batch.num_rows


def _parquet_texts(uri: str, problems: Problems, id_names: tuple[str, ...]) -> Iterator[TextRow]:
    for first, batch in _parquet(uri, {"id": id_names, "text": ("text",)}):
        for i, (name, text) in enumerate(zip(batch["id"], batch["text"], strict=True)):
            where = f"{uri}: row {first + i}"
            if name is None or text is None:
                problems.add(where, "a null", expected="an id and a text", found=f"{name!r}, {shorten(str(text))}")
                continue
            yield TextRow(str(name), str(text), where)


def _parquet_passages(uri: str, problems: Problems) -> Iterator[TextRow]:
    return _parquet_texts(uri, problems, ("passage_id", "pid", "id"))


def _parquet_queries(uri: str, problems: Problems) -> Iterator[TextRow]:
    return _parquet_texts(uri, problems, ("query_id", "qid", "id"))


def _parquet_qrels(uri: str, problems: Problems) -> Iterator[QrelRow]:
    columns = {
        "query": ("query_id", "qid"),
        "passage": ("passage_id", "pid"),
        "grade": ("relevance", "grade", "score"),
    }
    for first, batch in _parquet(uri, columns):
        for i, (query, passage, grade) in enumerate(zip(*batch.values(), strict=True)):
            where = f"{uri}: row {first + i}"
            if query is None or passage is None or not isinstance(grade, int):
                problems.add(
                    where,
                    "a null or a grade that is no integer",
                    expected="ids and an integer",
                    found=f"{query!r}, {passage!r}, {grade!r}",
                )
                continue
            yield QrelRow(str(query), str(passage), grade, where)
