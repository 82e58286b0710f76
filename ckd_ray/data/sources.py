"""Readers: every format becomes the same three streams, passages, queries and qrels.

They check the form of every row (tabs, columns, JSON, numbers). build.py checks what depends on the whole collection
(duplicates, unknown ids).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ckd_ray.config import CollectionConfig
from ckd_ray.config.schema import Split
from ckd_ray.data.lines import read_lines, unreadable
from ckd_ray.data.problems import Problems, shorten
from ckd_ray.errors import UserError, first_line
from ckd_ray.files import exists, filesystem_of, is_folder, join, list_files, list_folders

SPLITS: tuple[Split, ...] = ("train", "dev", "test")


class TextRow(NamedTuple):
    """A passage or a query with its place, `file:` or `file: row `, and the number of its line or row."""

    id: str
    text: str
    place: str
    number: int | None = None

    @property
    def where(self) -> str:
        """`file:line`; a property, since it is needed for few rows."""
        return self.place if self.number is None else f"{self.place}{self.number}"


class QrelRow(NamedTuple):
    """A label with its place, as in `TextRow`."""

    query_id: str
    passage_id: str
    relevance: int
    place: str
    number: int | None = None

    @property
    def where(self) -> str:
        """`file:line`."""
        return self.place if self.number is None else f"{self.place}{self.number}"


@dataclass(frozen=True)
class Source:
    """The streams of a collection; each call reads from the start.

    Attributes:
        splits: those that have both queries and qrels.
        files: for the fingerprint of the input.
        shared_queries: the queries of all splits are in one file; a split's queries are those that its qrels name.
    """

    passages: Callable[[Problems], Iterator[TextRow]]
    queries: Callable[[str, Problems], Iterator[TextRow]]
    qrels: Callable[[str, Problems], Iterator[QrelRow]]
    splits: tuple[str, ...]
    files: tuple[str, ...]
    shared_queries: bool = False


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


# File names of passages, queries and qrels of each format.
_NAMES = {
    "msmarco": ("collection.tsv", "queries.{}.tsv", "qrels.{}.tsv"),
    "beir": ("corpus.jsonl", "queries.jsonl", "qrels/{}.tsv"),
    "parquet": ("passages.parquet", "queries.{}.parquet", "qrels.{}.parquet"),
}
# Endings of the files in a folder that is given in the place of one file: of texts, of qrels.
_LINES = (".tsv", ".tsv.gz", ".txt", ".txt.gz")
_JSON = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_ENDINGS = {"msmarco": (_LINES, _LINES), "beir": (_JSON, _LINES), "parquet": ((".parquet",), (".parquet",))}


def _file_source(settings: CollectionConfig) -> Source:
    kind = settings.format
    if settings.path is not None and not exists(settings.path):
        raise UserError("this folder does not exist", where="collection.path", found=settings.path)
    of_passages, of_queries, of_qrels = _NAMES[kind]
    passages = settings.passages or _find(settings, of_passages, required=True)
    assert passages is not None
    queries: dict[str, str] = {}
    qrels: dict[str, str] = {}
    for split in SPLITS:
        name, required = getattr(settings, split), split == "train"
        found_queries = settings.queries.get(split) or _find(settings, of_queries.format(name), required)
        found_qrels = settings.qrels.get(split) or _find(settings, of_qrels.format(name), required)
        if found_queries and found_qrels:
            queries[split], qrels[split] = found_queries, found_qrels
    text_endings, qrel_endings = _ENDINGS[kind]
    parts = {file: _parts(file, text_endings) for file in (passages, *queries.values())}
    parts |= {file: _parts(file, qrel_endings) for file in qrels.values()}
    read_passages, read_queries, read_qrels = _READERS[kind]
    return Source(
        passages=lambda problems: _one_by_one(read_passages, parts[passages], problems),
        queries=lambda split, problems: _one_by_one(read_queries, parts[queries[split]], problems),
        qrels=lambda split, problems: _one_by_one(read_qrels, parts[qrels[split]], problems),
        splits=tuple(queries),
        files=tuple(dict.fromkeys(file for some in parts.values() for file in some)),
        shared_queries=kind == "beir",
    )


def _parts(uri: str, endings: tuple[str, ...]) -> tuple[str, ...]:
    """The file itself, or the files of a folder, as Spark and others write it, in the order of their names.

    Names that begin with `_` or `.` are markers and checksums, and are left out.
    """
    if not is_folder(uri):
        if not exists(uri):
            raise UserError("this file does not exist", where="collection", found=uri)
        return (uri,)
    names = [name for name in list_files(uri) if not name.startswith(("_", "."))]
    others = [name for name in names if not name.endswith(endings)]
    # Partitions (`year=2024/`) are refused: the values in their names are no columns.
    others += [f"{name}/" for name in list_folders(uri) if not name.startswith(("_", "."))]
    if others or not names:
        raise UserError(
            "a folder in the place of a file holds what cannot be read" if others else "a folder without files",
            where=uri,
            expected=f"files whose names end with {', '.join(endings)}, and no folders",
            found=", ".join(shorten(name) for name in others[:8]) or "none",
            fix="move the rest out of it, or let the names begin with _" if others else None,
        )
    return tuple(join(uri, name) for name in names)


def _one_by_one(read: Callable[[str, Problems], Iterator[Any]], files: tuple[str, ...], problems: Problems) -> Any:
    for file in files:
        yield from read(file, problems)


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
    place = f"{uri}:"
    for first, lines in read_lines(uri, problems):
        for number, line in enumerate(lines, first):
            name, tab, text = line.partition("\t")
            if not tab:
                problems.add(f"{place}{number}", "a line without a tab", expected="id TAB text", found=shorten(line))
                continue
            yield TextRow(name, text, place, number)


def _json_texts(uri: str, problems: Problems) -> Iterator[TextRow]:
    """BEIR: `_id`, `text`, and for passages `title`, which goes in front of the text."""
    place = f"{uri}:"
    for first, lines in read_lines(uri, problems):
        for number, line in enumerate(lines, first):
            row = _json_row(line, place, number, problems)
            if row is not None:
                yield row


def _json_row(line: str, place: str, number: int, problems: Problems) -> TextRow | None:
    where = f"{place}{number}"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        problems.add(where, "not valid JSON", expected="one object a line", found=f"{shorten(line)} ({reason})")
        return None
    name = value.get("_id") if isinstance(value, dict) else None
    if not isinstance(name, str | int) or isinstance(name, bool):
        problems.add(where, "no _id", expected='an object with "_id" and "text"', found=shorten(line))
        return None
    if "text" not in value:
        problems.add(where, "no text", expected='an object with "_id" and "text"', found=shorten(line))
        return None
    name, text, title = str(name), value["text"], value.get("title") or ""
    if not isinstance(text, str) or not isinstance(title, str):
        problems.add(where, "text or title is not a string", expected="strings", found=shorten(line))
        return None
    if any("\ud800" <= character <= "\udfff" for character in name):
        problems.add(where, "half a surrogate pair in an id", expected="an id that UTF-8 can hold", found=shorten(name))
        return None
    return TextRow(name, f"{title} {text}".strip() if title else text, place, number)


_HEADERS = {"query-id", "query_id", "queryid", "qid", "query"}


def _tsv_qrels(uri: str, problems: Problems) -> Iterator[QrelRow]:
    """TREC's four columns (query, 0, passage, grade) by tabs or spaces, or BEIR's three with a header line."""
    place = f"{uri}:"
    for first, lines in read_lines(uri, problems):
        for number, line in enumerate(lines, first):
            columns = line.split("\t") if "\t" in line else line.split()
            if len(columns) not in (3, 4):
                found = f"{len(columns)}: {shorten(line)}"
                where = f"{place}{number}"
                problems.add(where, "wrong number of columns", expected="query, 0, passage, grade", found=found)
                continue
            query_id, passage_id, grade = columns[0], columns[-2], columns[-1]
            if number == 1 and query_id.strip().lower() in _HEADERS and not _is_integer(grade):
                continue  # BEIR's header: query-id, corpus-id, score
            if not _is_integer(grade):
                where, problem = f"{place}{number}", "the grade is not a whole number"
                problems.add(where, problem, expected="an integer", found=shorten(grade))
            elif grade_fits(grade, f"{place}{number}", problems):
                yield QrelRow(query_id, passage_id, int(grade), place, number)


def grade_fits(grade: str | int, where: str, problems: Problems) -> bool:
    """Notes a grade of more than 32 bits. The length is checked first: Python refuses to read very long numbers."""
    if len(str(grade)) <= 20 and -(2**31) <= int(grade) < 2**31:
        return True
    problems.add(where, "the grade is out of range", expected="32 bits", found=shorten(str(grade)))
    return False


def _is_integer(text: str) -> bool:
    return text.strip().removeprefix("-").isdecimal() and text.isascii()


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_id(kind: pa.DataType) -> bool:
    return _is_text(kind) or pa.types.is_integer(kind)


@dataclass(frozen=True)
class _Column:
    """A column under one of several names, and the types that it may have."""

    names: tuple[str, ...]
    accepts: Callable[[pa.DataType], bool]
    expected: str


def _id_column(*names: str) -> _Column:
    return _Column(names, _is_id, "strings or integers")


def _parquet(uri: str, wanted: dict[str, _Column]) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Batches of the wanted columns, with the number of their first row."""
    fs, path = filesystem_of(uri)
    try:
        file = pq.ParquetFile(path, filesystem=fs)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a type of Ray's with strange contents
        raise UserError("not a Parquet file", where=uri, found=first_line(error)) from None
    with file:
        columns = {name: _column(uri, file.schema_arrow, name, column) for name, column in wanted.items()}
        row = 1
        try:
            for batch in file.iter_batches(batch_size=4096, columns=list(columns.values())):
                for column in columns.values():
                    batch[column].validate(full=True)  # Arrow accepts undecodable bytes, Python does not
                yield row, {name: batch[column].to_pylist() for name, column in columns.items()}
                row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise unreadable(f"{uri}: after row {row - 1}", error) from None


def _column(uri: str, schema: pa.Schema, name: str, column: _Column) -> str:
    match = next((spelling for spelling in column.names if spelling in schema.names), None)
    if match is None:
        expected = " or ".join(column.names)
        raise UserError(f"no column {name}", where=uri, expected=expected, found=", ".join(schema.names))
    kind = schema.field(match).type
    if not column.accepts(kind):
        raise UserError(f"column {match} has the wrong type", where=uri, expected=column.expected, found=str(kind))
    return match


def _parquet_texts(id_names: tuple[str, ...], uri: str, problems: Problems) -> Iterator[TextRow]:
    """One row a passage or query: an id, which may be an integer, and a text."""
    place = f"{uri}: row "
    wanted = {"id": _id_column(*id_names), "text": _Column(("text",), _is_text, "strings")}
    for first, batch in _parquet(uri, wanted):
        for number, (name, text) in enumerate(zip(batch["id"], batch["text"], strict=True), first):
            if name is None or text is None:
                found = f"{name!r}, {shorten(str(text))}"
                problems.add(f"{place}{number}", "a null", expected="an id and a text", found=found)
                continue
            yield TextRow(str(name), text, place, number)


def _parquet_qrels(uri: str, problems: Problems) -> Iterator[QrelRow]:
    place = f"{uri}: row "
    columns = {
        "query": _id_column("query_id", "qid"),
        "passage": _id_column("passage_id", "pid"),
        "grade": _Column(("relevance", "grade", "score"), pa.types.is_integer, "integers"),
    }
    for first, batch in _parquet(uri, columns):
        rows = zip(batch["query"], batch["passage"], batch["grade"], strict=True)
        for number, (query, passage, grade) in enumerate(rows, first):
            where = f"{place}{number}"
            if query is None or passage is None or grade is None:
                found = f"{query!r}, {passage!r}, {grade!r}"
                problems.add(where, "a null", expected="two ids and a grade", found=found)
            elif grade_fits(grade, where, problems):
                yield QrelRow(str(query), str(passage), grade, place, number)


# The readers of passages, queries and qrels of each format.
_READERS: dict[str, tuple[Any, Any, Any]] = {
    "msmarco": (_tsv_texts, _tsv_texts, _tsv_qrels),
    "beir": (_json_texts, _json_texts, _tsv_qrels),
    "parquet": (
        partial(_parquet_texts, ("passage_id", "pid", "id")),
        partial(_parquet_texts, ("query_id", "qid", "id")),
        _parquet_qrels,
    ),
}
