"""Files of a folder as tables: TSV, CSV, JSON lines and Parquet, with the names of their columns and first rows."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal

import pyarrow as pa

from ckd_ray.data.lines import read_lines
from ckd_ray.data.problems import Problems, shorten
from ckd_ray.data.tables import is_text, parquet_batches
from ckd_ray.errors import UserError
from ckd_ray.files import is_folder, join, last_part, list_files, list_folders

Kind = Literal["tsv", "csv", "jsonl", "parquet"]
Row = tuple[str, ...]
_SAMPLE = 200
_MOST_FILES = 500
_DEPTH = 2
_ENDINGS: dict[str, Kind] = {".tsv": "tsv", ".txt": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl"}
_DELIMITERS = ",;\t|"
# A first line may name columns when its cells look like this.
_NAME = re.compile(r"_?[A-Za-z][\w .-]{0,39}$")
# Names of columns, in lower case with underscores, the likelier ones first.
PASSAGE_IDS = ("passage_id", "pid", "doc_id", "docid", "docno", "document_id", "corpus_id", "answer_id", "article_id")
QUERY_IDS = ("query_id", "qid", "queryid", "topic_id", "question_id")
IDS = ("id", "uuid", "key")
PASSAGE_TEXTS = ("text", "contents", "content", "body", "passage", "document", "abstract", "answer", "paragraph")
QUERY_TEXTS = ("text", "query", "question", "title", "topic")
GRADES = ("relevance", "score", "grade", "label", "rel", "relevant", "rating", "judgment", "judgement")
_KNOWN = {*PASSAGE_IDS, *QUERY_IDS, *IDS, *PASSAGE_TEXTS, *QUERY_TEXTS, *GRADES, "title", "url", "iteration"}


@dataclass(frozen=True)
class Table:
    """A file, or a folder whose files stand for one.

    Attributes:
        uri: the file or the folder, and `parts`, its files in order.
        name: the path below the folder that is looked at, for messages.
        columns: their names; "1", "2", ... without a header.
        header: whether the first line of each part names the columns.
        sample: the first rows.
        separator: between the cells of a line; None stands for any white space.
    """

    uri: str
    parts: tuple[str, ...]
    name: str
    kind: Kind
    columns: tuple[str, ...]
    header: bool
    sample: tuple[Row, ...] = field(repr=False)
    separator: str | None = "\t"

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """The cells of these columns in every row, as strings; what is null or missing is empty.

        Raises:
            UserError: lists rows that cannot be read, with file and line.
        """
        at = [self.columns.index(column) for column in columns]
        problems = Problems(of=self.name)
        for part in self.parts:
            for row in self._read(part, problems):
                yield tuple([row[i] for i in at])
        problems.check()

    def _read(self, part: str, problems: Problems) -> Iterator[Row]:
        if self.kind == "parquet":
            return _parquet_rows(part, partial(self._present, part))
        if self.kind == "jsonl":
            return _json_rows(part, self.columns, problems)
        return islice(_cells(part, self.kind, self.separator, len(self.columns), problems), int(self.header), None)

    def _present(self, part: str, schema: pa.Schema) -> tuple[str, ...]:
        """The columns, all of which a part in Parquet has to have."""
        if missing := [column for column in self.columns if column not in schema.names]:
            expected, found = ", ".join(missing), ", ".join(schema.names)
            raise UserError("a part has other columns than the first", where=part, expected=expected, found=found)
        return self.columns

    def values(self, column: str) -> list[str]:
        """The column in the first rows."""
        at = self.columns.index(column)
        return [row[at] for row in self.sample]

    def shown(self) -> str:
        """The name and the columns, for messages."""
        if not self.header and self.kind in ("tsv", "csv"):
            return f"{self.name} ({len(self.columns)} columns without a header)"
        return f"{self.name} (columns {', '.join(self.columns[:8])}{', ...' if len(self.columns) > 8 else ''})"


def spelled(column: str) -> str:
    """A column's name in lower case with underscores: `query-id` and `Query ID` are query_id."""
    return re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_")


def scan(folder: str, without: Callable[[str], bool]) -> tuple[list[Table], dict[str, str]]:
    """The tables in the folder and two levels below it, and (name, reason) of the files that are none.

    Args:
        without: says which files and folders not to look at.

    Raises:
        UserError: the folder is not there, or holds too many files.
    """
    if not is_folder(folder):
        raise UserError("this is no folder", where=f"DIR {folder}", expected="a folder of files", found=_there(folder))
    tables: list[Table] = []
    aside: dict[str, str] = {}
    for name, uri, parts in _sources(folder, "", _DEPTH, without):
        if len(tables) + len(aside) >= _MOST_FILES:
            fix = "name the files with --corpus, --queries and --qrels, or give the folder that holds them alone"
            found = f"more than {_MOST_FILES} files"
            raise UserError("too many files to look at", where=folder, found=found, fix=fix)
        try:
            tables.append(open_table(uri, name, parts))
        except UserError as error:
            aside[name] = error.problem if error.found is None else f"{error.problem}: {error.found}"
    return tables, aside


def _there(uri: str) -> str:
    return "a file" if list_files(uri.rpartition("/")[0] or ".", last_part(uri)) else "nothing"


def _sources(
    folder: str, prefix: str, depth: int, without: Callable[[str], bool]
) -> Iterator[tuple[str, str, list[str]]]:
    """(name, uri, parts) of every file; a folder of `part-00000`, `part-00001`, ... is one."""
    names = [name for name in list_files(folder) if _kind(name) and not without(join(folder, name))]
    if prefix and len(names) > 1 and all(re.match(r"part\b|\d+\b|shard\b", name) for name in names):
        yield prefix.rstrip("/"), folder, [join(folder, name) for name in names]
        return
    for name in names:
        yield prefix + name, join(folder, name), [join(folder, name)]
    for name in list_folders(folder) if depth else ():
        inner = join(folder, name)
        if not name.startswith((".", "_")) and not without(inner):
            yield from _sources(inner, f"{prefix}{name}/", depth - 1, without)


def _kind(name: str) -> Kind | None:
    if name.startswith((".", "_")):
        return None
    if name.endswith(".parquet"):
        return "parquet"
    return _ENDINGS.get("." + name.removesuffix(".gz").rpartition(".")[2])


def open_table(uri: str, name: str, parts: Sequence[str] = ()) -> Table:
    """The table in a file, or in the files of a folder.

    Raises:
        UserError: it is empty, or nothing that we can read.
    """
    files = list(parts) or ([join(uri, n) for n in list_files(uri) if _kind(n)] if is_folder(uri) else [uri])
    kind = _kind(last_part(files[0])) if files else None
    if kind is None:
        expected = "a name that ends with .tsv, .txt, .csv, .jsonl, .json (each also with .gz) or .parquet"
        raise UserError("this is no table", where=uri, expected=expected, found=last_part(uri))
    make = {"parquet": _open_parquet, "jsonl": _open_json}.get(kind, _open_cells)
    table = make(Table(uri, tuple(files), name, kind, (), False, ()))
    if not table.sample:
        raise UserError("the file is empty", where=uri, expected="rows", found="none")
    return table


# -- cells: TSV and CSV -----------------------------------------------------------------------------------------------


def _open_cells(table: Table) -> Table:
    """The number of columns, the separator, and whether the first line is a header."""
    path = table.parts[0]
    problems = Problems(of=table.name)
    _, lines = next(read_lines(path, problems), (1, []))
    problems.check()
    lines = lines[: _SAMPLE + 1]
    if table.kind == "csv":
        separator: str | None = max(_DELIMITERS, key=lines[0].count) if lines else ","
        rows = list(islice(_cells(path, "csv", separator, 0, problems), _SAMPLE + 1))
    else:
        separator = "\t" if any("\t" in line for line in lines) else None
        rows = [tuple(line.split(separator)) for line in lines]
        if separator is None and ({len(row) for row in rows} - {3, 4} or len({len(row) for row in rows}) > 1):
            expected = "tabs between the columns, or the three or four columns of qrels"
            raise UserError("this is no table", where=path, expected=expected, found=shorten(lines[0]) if lines else "")
    rows = [row for row in rows if row]
    if not rows:
        raise UserError("the file is empty", where=table.uri, expected="rows", found="none")
    header = is_header(rows[0], rows[1:])
    count = len(rows[0]) if header else min(len(row) for row in rows)
    if table.kind == "tsv" and not header and any(" " in cell for row in rows for cell in row[1:]):
        count = min(count, 2)  # as the pipeline reads it: what follows the first tab is text
    if count < 2:
        raise UserError("this is no table", where=path, expected="two columns or more", found=shorten(lines[0]))
    names = tuple(rows[0]) if header else tuple(str(i + 1) for i in range(count))
    full = _cells(path, table.kind, separator, count, problems)
    sample = tuple(islice(full, int(header), _SAMPLE + int(header)))
    return Table(table.uri, table.parts, table.name, table.kind, names, header, sample, separator)


def is_header(first: Row, rest: Sequence[Row]) -> bool:
    """Whether the first row names the columns: by known names, or because it has no digits, and what follows has ids
    with digits and texts or grades."""
    if not all(_NAME.match(cell) for cell in first) or len(set(first)) < len(first):
        return False
    known = [spelled(cell) in _KNOWN for cell in first]
    if all(known) or (sum(known) >= 2 and known[0]):
        return True
    columns = list(zip(*(row for row in rest if len(row) >= len(first)), strict=False))
    if not columns or any(re.search(r"\d", cell) for cell in first):
        return False
    share = [sum(re.search(r"\d", other) is not None for other in column) / len(column) for column in columns]
    texts = [
        " " not in c and sum(" " in o for o in col) > 0.9 * len(col) for c, col in zip(first, columns, strict=False)
    ]
    return max(share) > 0.9 and (any(texts) or any(all(map(is_whole, column)) for column in columns))


def is_whole(text: str) -> bool:
    """A whole number, also written 1.0."""
    return re.fullmatch(r"-?\d{1,18}(\.0+)?", text.strip()) is not None


def _cells(path: str, kind: Kind, separator: str | None, count: int, problems: Problems) -> Iterator[Row]:
    """Rows of `count` cells; with 0 of as many as there are."""
    if kind == "csv":
        yield from _csv_cells(path, separator or ",", count, problems)
        return
    for first, lines in read_lines(path, problems):
        for number, line in enumerate(lines, first):
            row = line.split(separator, count - 1) if separator else line.split()
            if len(row) < count:
                expected = f"{count} columns"
                problems.add(f"{path}:{number}", "a short line", expected=expected, found=shorten(line))
                continue
            yield tuple(row[:count])


def _csv_cells(path: str, separator: str, count: int, problems: Problems) -> Iterator[Row]:
    lines = (f"{line}\n" for _, block in read_lines(path, problems) for line in block)
    csv.field_size_limit(64 << 20)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        for row in reader:
            if row and len(row) < count:
                where, expected = f"{path}:{reader.line_num}", f"{count} columns"
                problems.add(where, "a short line", expected=expected, found=shorten(separator.join(row)))
            elif row:
                yield tuple(row[:count] if count else row)
    except csv.Error as error:
        fix = "a quotation mark inside a cell is written twice; a file without quoting is named .tsv"
        raise UserError("not valid CSV", where=f"{path}:{reader.line_num}", found=str(error), fix=fix) from None


# -- JSON lines -------------------------------------------------------------------------------------------------------


def _open_json(table: Table) -> Table:
    problems = Problems(of=table.name)
    _, lines = next(read_lines(table.parts[0], problems), (1, []))
    problems.check()
    if lines and lines[0].lstrip().startswith("["):
        fix = "write one object a line: jq -c '.[]' FILE"
        raise UserError("a JSON list", where=table.uri, expected="one object a line", fix=fix)
    objects = [_object(line) for line in lines[:_SAMPLE]]
    if any(found is None for found in objects):
        at = next(i for i, found in enumerate(objects) if found is None)
        where = f"{table.parts[0]}:{at + 1}"
        raise UserError("not JSON lines", where=where, expected="one object a line", found=shorten(lines[at]))
    columns = tuple(dict.fromkeys(key for found in objects if found for key in found))
    sample = tuple(tuple(_text((found or {}).get(column)) for column in columns) for found in objects)
    return Table(table.uri, table.parts, table.name, table.kind, columns, True, sample)


def _json_rows(path: str, columns: Sequence[str], problems: Problems) -> Iterator[Row]:
    for first, lines in read_lines(path, problems):
        for number, line in enumerate(lines, first):
            found = _object(line)
            if found is None:
                problems.add(f"{path}:{number}", "not JSON", expected="one object a line", found=shorten(line))
                continue
            yield tuple(_text(found.get(column)) for column in columns)


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _text(value: Any) -> str:
    """A value as text; what is no text and no number is empty. Half a surrogate pair becomes a question mark."""
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return ""
    return str(value).encode("utf-8", "replace").decode()


# -- Parquet ----------------------------------------------------------------------------------------------------------


def _open_parquet(table: Table) -> Table:
    columns: list[str] = []

    def plain(schema: pa.Schema) -> list[str]:
        columns.extend(name for name in schema.names if _is_plain(schema.field(name).type))
        return columns

    sample = tuple(islice(_parquet_rows(table.parts[0], plain), _SAMPLE))
    return Table(table.uri, table.parts, table.name, table.kind, tuple(columns), True, sample)


def _is_plain(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _parquet_rows(uri: str, chosen: Callable[[pa.Schema], Iterable[str]]) -> Iterator[Row]:
    for _, batch in parquet_batches(uri, lambda schema: {name: name for name in chosen(schema)}):
        yield from zip(*([_text(value) for value in column.to_pylist()] for column in batch.values()), strict=True)
