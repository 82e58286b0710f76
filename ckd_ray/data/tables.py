"""Rows of tables by role: Parquet, JSON lines, and CSV or TSV with a header line.

Every file may call a column by another name. A `Column` lists the names of a role; the first that a file has counts.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ckd_ray.config.schema import ColumnRole
from ckd_ray.data.lines import read_lines, unreadable
from ckd_ray.data.problems import Problems, shorten
from ckd_ray.errors import UserError, first_line
from ckd_ray.files import filesystem_of

PARQUET, JSON_LINES, DELIMITED = (".parquet",), (".jsonl", ".json"), (".csv", ".tsv", ".txt")
# What a file is, by the end of its name; each but Parquet may also end with .gz.
ENDINGS = (*PARQUET, *(f"{ending}{gz}" for ending in (*JSON_LINES, *DELIMITED) for gz in ("", ".gz")))
REQUIRED = object()
_LONGEST_FIELD = 64 << 20


@dataclass(frozen=True)
class Column:
    """A column by its role.

    Attributes:
        names: the spellings that are looked for, in that order.
        given: whether the user named them (`collection.columns`).
        default: the value of every row of a file without the column; REQUIRED when it has to be there.
        alone: the default counts only if every column of the file has a role; else another column may be the one.
    """

    role: ColumnRole
    names: tuple[str, ...]
    given: bool = False
    default: Any = REQUIRED
    alone: bool = False

    def among(self, present: Iterable[str]) -> str | None:
        """The name that a file uses."""
        held = set(present)
        return next((name for name in self.names if name in held), None)

    @property
    def expected(self) -> str:
        """The accepted names of the column, for messages."""
        return " or ".join(self.names) + (f" (collection.columns.{self.role})" if self.given else "")

    def missing(self, present: Iterable[str]) -> dict[str, str]:
        """The message about a file or row without the column, as keywords."""
        fix = f"name it with collection.columns.{self.role}; a list holds the names of several files"
        return {"expected": self.expected, "found": ", ".join(map(str, present))[:300] or "nothing", "fix": fix}


_TYPES = {"relevance": "numbers", "text": "strings", "title": "strings"}


def is_text(kind: pa.DataType) -> bool:
    """Strings of any width, in a dictionary or not."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _fits(role: ColumnRole, kind: pa.DataType) -> bool:
    """Whether a Parquet column of this type can have the role."""
    if role == "relevance":
        return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))
    if role == "passage" and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        kind = kind.value_type
    return is_text(kind) or (role in ("id", "query", "passage") and pa.types.is_integer(kind))


def place_of(uri: str, usual: str) -> str:
    """The text before a row's number in messages. `usual`: the ending to assume for a name without a known one."""
    return f"{uri}: row " if _reader_of(uri, usual) is _parquet else f"{uri}:"


def read_rows(
    uri: str, columns: tuple[Column, ...], problems: Problems, usual: str
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """(number of the line or row, the values of `columns`). A row that cannot be read is noted and left out.

    Args:
        usual: the ending that counts for a file whose name has none of `ENDINGS`.

    Raises:
        UserError: the file is missing or broken, or has no column of a required role; names the columns it has.
    """
    return _reader_of(uri, usual)(uri, columns, problems)


def _reader_of(uri: str, usual: str) -> Callable[..., Iterator[tuple[int, tuple[Any, ...]]]]:
    for name in (uri.partition("?")[0].removesuffix(".gz"), usual):
        for endings, reader in ((PARQUET, _parquet), (JSON_LINES, _json_lines), (DELIMITED, _delimited)):
            if name.endswith(endings):
                return reader
    raise AssertionError(usual)


def parquet_batches(
    uri: str, chosen: Callable[[pa.Schema], dict[Any, str]], rows: int = 4096
) -> Iterator[tuple[int, dict[Any, pa.Array]]]:
    """Batches of some columns of a Parquet file, with the number of their first row.

    Args:
        chosen: key -> name of the column, by the schema of the file.
        rows: the most rows of a batch.
    """
    fs, path = filesystem_of(uri)
    try:
        file = pq.ParquetFile(path, filesystem=fs)
    except FileNotFoundError:
        raise UserError("this file does not exist", where=uri) from None
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a type of Ray's with strange contents
        raise UserError("not a Parquet file", where=uri, found=first_line(error)) from None
    with file:
        names = chosen(file.schema_arrow)
        row = 1
        try:
            for batch in file.iter_batches(batch_size=rows, columns=list(dict.fromkeys(names.values()))):
                for name in set(names.values()):
                    batch[name].validate(full=True)  # Arrow accepts undecodable bytes, Python does not
                yield row, {key: batch[name] for key, name in names.items()}
                row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise unreadable(f"{uri}: after row {row - 1}", error) from None


def _parquet(uri: str, columns: tuple[Column, ...], problems: Problems) -> Iterator[tuple[int, tuple[Any, ...]]]:
    def chosen(schema: pa.Schema) -> dict[ColumnRole, str]:
        names = _named(uri, columns, schema.names)
        for role, name in names.items():
            kind = schema.field(name).type
            if not _fits(role, kind):
                expected = _TYPES.get(role, "strings or integers")
                raise UserError(f"column {name} has the wrong type", where=uri, expected=expected, found=str(kind))
        return names

    for first, batch in parquet_batches(uri, chosen):
        rows = len(next(iter(batch.values())))
        values = [batch[c.role].to_pylist() if c.role in batch else [c.default] * rows for c in columns]
        yield from enumerate(zip(*values, strict=True), first)


def _named(uri: str, columns: tuple[Column, ...], present: list[str]) -> dict[ColumnRole, str]:
    """The names of the columns that a file has.

    Raises:
        UserError: one that must be there is not.
    """
    found = _names(columns, present)
    wanted = _wanted(columns, present, found) | {column.role for column in columns if column.given}
    for column in columns:
        if column.role in wanted and column.role not in found:
            raise UserError(f"no column {column.role}", where=uri, **column.missing(present))
    return found


def _names(columns: tuple[Column, ...], present: Iterable[str]) -> dict[ColumnRole, str]:
    return {column.role: name for column in columns if (name := column.among(present)) is not None}


def _wanted(columns: tuple[Column, ...], present: Iterable[str], names: dict[ColumnRole, str]) -> set[ColumnRole]:
    """The roles that a file or row with these columns has to have."""
    others = set(present) - set(names.values())
    return {column.role for column in columns if column.default is REQUIRED or (column.alone and others)}


def _json_lines(uri: str, columns: tuple[Column, ...], problems: Problems) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """An object a line. A column that the first row has is expected in all; a title may be left out of any row."""
    unmet = {column.role: column for column in columns if column.given and column.default is not REQUIRED}
    first_row: set[ColumnRole] | None = None
    keys: Iterable[str] = ()
    for first, lines in read_lines(uri, problems):
        for number, line in enumerate(lines, first):
            value = _object(line, f"{uri}:{number}", problems)
            if value is None:
                continue
            keys = value
            names = _names(columns, value)
            first_row = first_row or set(names)
            unmet = {role: column for role, column in unmet.items() if role not in names}
            wanted = _wanted(columns, value, names) | (first_row - {"title"})
            lacking = [c for c in columns if c.role in wanted and c.role not in names]
            if lacking:
                problems.add(f"{uri}:{number}", f"no {lacking[0].role}", **lacking[0].missing(value))
            else:
                yield number, tuple(value[names[c.role]] if c.role in names else c.default for c in columns)
    for column in unmet.values():
        problems.add(uri, f"no row has a {column.role}", **column.missing(keys))


def _object(line: str, where: str, problems: Problems) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        problems.add(where, "not valid JSON", expected="one object a line", found=f"{shorten(line)} ({reason})")
        return None
    if not isinstance(value, dict):
        problems.add(where, "not a JSON object", expected="one object a line", found=shorten(line))
        return None
    return value


def _delimited(uri: str, columns: tuple[Column, ...], problems: Problems) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """A header line, then a row a line."""
    of_commas = uri.partition("?")[0].removesuffix(".gz").endswith(".csv")
    rows = _comma_rows(uri, problems) if of_commas else _tab_rows(uri, problems)
    _, header = next(rows, (1, []))
    names = _named(uri, columns, header)
    places = {role: header.index(name) for role, name in names.items()}
    for number, row in rows:
        if len(row) == len(header):
            yield number, tuple(row[places[c.role]] if c.role in places else c.default for c in columns)
        else:
            expected, found = f"{len(header)}: {', '.join(header)[:200]}", f"{len(row)}: {shorten(', '.join(row))}"
            problems.add(f"{uri}:{number}", "wrong number of columns", expected=expected, found=found)


def _tab_rows(uri: str, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """TSV, in which a quotation mark is a character like others."""
    for first, lines in read_lines(uri, problems):
        yield from enumerate((line.split("\t") for line in lines), first)


def _comma_rows(uri: str, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """CSV as RFC 4180 has it; a quoted field may span lines, and the number is that of the first."""
    csv.field_size_limit(_LONGEST_FIELD)
    rows = csv.reader((f"{line}\n" for _, lines in read_lines(uri, problems) for line in lines), strict=True)
    number = 1
    try:
        for row in rows:
            yield number, row
            number = rows.line_num + 1
    except csv.Error as error:
        raise unreadable(f"{uri}:{number}", error) from None
