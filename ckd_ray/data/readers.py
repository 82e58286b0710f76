"""Readers of single files: passages or queries as `TextRow`, labels as `QrelRow`.

They check the form of every row (tabs, ids, numbers); tables.py reads columns by their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from ckd_ray.config import CollectionConfig
from ckd_ray.config.schema import ColumnRole
from ckd_ray.data.lines import read_lines
from ckd_ray.data.problems import Problems, shorten
from ckd_ray.data.tables import REQUIRED, Column, place_of, read_rows
from ckd_ray.progress import say

# Endings of files of lines without a header.
LINES = (".tsv", ".tsv.gz", ".txt", ".txt.gz")
# By `collection.format`: the ending to assume for a file whose name has no known one.
_USUAL = {"beir": ".jsonl", "jsonl": ".jsonl", "parquet": ".parquet", "csv": ".csv"}


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
    relevance: int | float
    place: str
    number: int | None = None

    @property
    def where(self) -> str:
        """`file:line`."""
        return self.place if self.number is None else f"{self.place}{self.number}"


TextReader = Callable[[str, Problems], Iterator[TextRow]]
QrelReader = Callable[[str, Problems], Iterator[QrelRow]]


def _tsv_texts(uri: str, problems: Problems) -> Iterator[TextRow]:
    """`id TAB text`; further tabs belong to the text."""
    place = f"{uri}:"
    for first, lines in read_lines(uri, problems):
        for number, line in enumerate(lines, first):
            name, tab, text = line.partition("\t")
            if not tab:
                fix = "`ckd-ray init DIR` reads CSV" if number == 1 and "," in line else None
                where = f"{place}{number}"
                problems.add(where, "a line without a tab", expected="id TAB text", found=shorten(line), fix=fix)
                continue
            yield TextRow(name, text, place, number)


# What the header line of qrels may begin with, in lower case.
HEADERS = {"query-id", "query_id", "queryid", "qid", "query"}


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
            if number == 1 and query_id.strip().lower() in HEADERS and _number(grade) is None:
                continue  # BEIR's header: query-id, corpus-id, score
            value = read_grade(grade, f"{place}{number}", problems)
            if value is not None:
                yield QrelRow(query_id, passage_id, value, place, number)


def read_grade(grade: object, where: str, problems: Problems) -> int | float | None:
    """A grade of at most 32 bits, an integer unless it is a fraction; anything else is noted, and gives None."""
    value = _number(grade)
    if value is None:
        problems.add(where, "the grade is not a number", expected="a number", found=shorten(str(grade)))
        return None
    if not -(2**31) <= value < 2**31:  # also infinity
        problems.add(where, "the grade is out of range", expected="32 bits", found=shorten(str(grade)))
        return None
    return int(value) if value == int(value) else value


def _number(value: object) -> int | float | None:
    """The number, of a text too; None for anything else and for NaN."""
    if isinstance(value, str) and value.isascii() and "_" not in value:
        try:
            value = float(value)  # an integer of thousands of digits becomes infinite; `int` refuses to read it
        except ValueError:
            return None
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return value if isinstance(value, int) and not isinstance(value, bool) else None


# The usual names of columns in files of passages, queries and labels, by role.
_PASSAGES: dict[ColumnRole, tuple[str, ...]] = {
    "id": ("passage_id", "pid", "_id", "corpus-id", "corpus_id", "document_id", "doc_id", "docid", "id"),
    "text": ("text", "contents", "passage", "body"),
    "title": ("title",),
}
_QUERIES: dict[ColumnRole, tuple[str, ...]] = {
    "id": ("query_id", "qid", "_id", "query-id", "id"),
    "text": ("text", "query", "question"),
    "title": ("title",),
}
_LABELS: dict[ColumnRole, tuple[str, ...]] = {
    "query": ("query_id", "qid", "query-id", "query"),
    "passage": ("passage_id", "pid", "corpus-id", "corpus_id", "document_id", "doc_id", "docid"),
    "relevance": ("relevance", "grade", "score", "label", "rel"),
}
_NO_RELEVANCE = object()
_DEFAULTS: dict[ColumnRole, object] = {"title": None, "relevance": _NO_RELEVANCE}


def _columns(settings: CollectionConfig, usual: dict[ColumnRole, tuple[str, ...]]) -> tuple[Column, ...]:
    """What the columns of a file may be called: the names that the user gives, else the usual ones."""
    given = settings.columns
    return tuple(
        Column(role, tuple(given.get(role, names)), role in given, _DEFAULTS.get(role, REQUIRED), role == "relevance")
        for role, names in usual.items()
    )


def readers_of(settings: CollectionConfig) -> tuple[TextReader, TextReader, QrelReader]:
    """The readers of passages, queries and qrels of a format."""
    if settings.format == "msmarco":
        return _tsv_texts, _tsv_texts, _tsv_qrels
    usual = _USUAL[settings.format]
    # A configured title column belongs to the passages, so files of queries need not have it.
    queries = tuple(replace(c, given=c.given and c.role != "title") for c in _columns(settings, _QUERIES))
    return (
        partial(_texts, _columns(settings, _PASSAGES), usual),
        partial(_texts, queries, usual),
        partial(_qrels, _columns(settings, _LABELS), usual),
    )


def _texts(columns: tuple[Column, ...], usual: str, uri: str, problems: Problems) -> Iterator[TextRow]:
    """One row a passage or query. The title, where there is one, goes in front of the text."""
    place = place_of(uri, usual)
    for number, (name, text, title) in read_rows(uri, columns, problems, usual):
        if not _usable_id(name, f"{place}{number}", problems):
            continue
        if not isinstance(text, str) or not isinstance(title, str | None):
            found = shorten(f"{text!r}, {title!r}" if title is not None else repr(text))
            problems.add(f"{place}{number}", "text or title is not a string", expected="strings", found=found)
            continue
        yield TextRow(str(name), f"{title} {text}".strip() if title else text, place, number)


def _usable_id(name: object, where: str, problems: Problems) -> bool:
    """Notes what cannot be an id: other types, and half a surrogate pair, which UTF-8 cannot hold."""
    if isinstance(name, bool) or not isinstance(name, str | int):
        problems.add(where, "not an id", expected="a string or a whole number", found=shorten(str(name)))
        return False
    if isinstance(name, str) and not name.isascii() and any("\ud800" <= c <= "\udfff" for c in name):
        problems.add(where, "half a surrogate pair in an id", expected="an id that UTF-8 can hold", found=shorten(name))
        return False
    return True


def _qrels(columns: tuple[Column, ...], usual: str, uri: str, problems: Problems) -> Iterator[QrelRow]:
    """One row a label, or a list of passages with one grade. Where a file has columns of ids alone, the grade is 1."""
    if _by_position(uri, columns):
        yield from _tsv_qrels(uri, problems)
        return
    place, told = place_of(uri, usual), False
    for number, (query, passage, grade) in read_rows(uri, columns, problems, usual):
        where = f"{place}{number}"
        passages = passage if isinstance(passage, list) else [passage]
        if not all(_usable_id(name, where, problems) for name in (query, *passages)):
            continue
        if grade is _NO_RELEVANCE:
            grade = 1
            if not told:
                say(f"collection: {uri} has no column of relevance; every row counts as grade 1")
                told = True
        value = read_grade(grade, where, problems)
        if value is not None:
            yield from (QrelRow(str(query), str(name), value, place, number) for name in passages)


def _by_position(uri: str, columns: tuple[Column, ...]) -> bool:
    """Whether a TSV file of labels is read by position: no columns are given, and its first line names none."""
    if not uri.endswith(LINES) or any(column.given for column in columns):
        return False
    _, lines = next(read_lines(uri, Problems(most=None)), (1, [""]))
    header = lines[0].split("\t")
    return any(column.among(header) is None for column in columns if column.default is REQUIRED)
