"""Rows of a file of scores, in blocks: Parquet, TSV, or JSON lines of (query, [passage, score], ...)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ckd_ray.data.lines import read_lines, unreadable
from ckd_ray.data.problems import Problems, shorten
from ckd_ray.errors import UserError, first_line
from ckd_ray.files import filesystem_of

_ROWS_A_BLOCK = 1 << 18
_COLUMNS = ("query_id", "passage_id", "score")
_Parser = Callable[[str, str, Problems], list[tuple[str, str, float]]]


@dataclass(frozen=True)
class ScoreRows:
    """Rows with ids, scores and, for messages, their lines (in a Parquet file their row numbers from 1)."""

    query_ids: list[str]
    passage_ids: list[str]
    scores: npt.NDArray[np.float64]
    lines: npt.NDArray[np.int64]


def read_scores(uri: str, problems: Problems) -> Iterator[ScoreRows]:
    """The rows of `uri`, in blocks. A row that cannot be read is added to `problems` with its line, and left out.

    Raises:
        UserError: the file is missing, cannot be read, or has none of the three forms.
    """
    name = uri.removesuffix(".gz")
    if uri.endswith(".parquet"):
        yield from _parquet(uri, problems)
    elif name.endswith((".tsv", ".txt")):
        yield from _blocks(uri, problems, _tsv_line)
    elif name.endswith((".jsonl", ".json")):
        yield from _blocks(uri, problems, _json_line)
    else:
        raise UserError(
            "unknown form of scores",
            where="cross_encoder.scores",
            expected="a name that ends in .parquet, .tsv, .txt or .jsonl (the last three also with .gz)",
            found=uri,
        )


def _parquet(uri: str, problems: Problems) -> Iterator[ScoreRows]:
    fs, path = filesystem_of(uri)
    try:
        file = pq.ParquetFile(path, filesystem=fs)
    except FileNotFoundError:
        raise UserError("this file does not exist", where=uri) from None
    except (OSError, pa.ArrowException, ValueError) as error:  # ValueError: a type of Ray's with strange contents
        raise unreadable(uri, error) from None
    missing = [name for name in _COLUMNS if name not in file.schema_arrow.names]
    if missing:
        raise UserError(
            f"no column {', '.join(missing)}",
            where=uri,
            expected="the columns query_id, passage_id and score",
            found=", ".join(file.schema_arrow.names[:12]),
        )
    row = 1
    for batch in _batches(uri, file):
        try:
            ids = [batch[name].cast(pa.string()) for name in _COLUMNS[:2]]
            for column in ids:
                column.validate(full=True)  # undecodable bytes: Arrow takes them, Python does not
            scores = batch["score"].cast(pa.float64()).to_numpy(zero_copy_only=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(
                "a column has another type",
                where=f"{uri}, rows {row} and on",
                expected="ids that can be read as strings and scores that are numbers",
                found=first_line(error),
            ) from None
        lines = np.arange(row, row + len(batch))
        empty = np.flatnonzero(ids[0].is_null().to_numpy(False) | ids[1].is_null().to_numpy(False))
        for i in empty.tolist():
            problems.add(f"{uri}:{row + i}", "an empty id", expected="a query id and a passage id", found="null")
        kept = np.setdiff1d(np.arange(len(batch)), empty)
        yield _finite(
            uri, problems, [ids[0].take(pa.array(kept)).to_pylist(), ids[1].take(pa.array(kept)).to_pylist()],
            scores[kept], lines[kept],
        )  # fmt: skip
        row += len(batch)


def _batches(uri: str, file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """The batches of a file that may be damaged in the middle."""
    row = 1
    try:
        for batch in file.iter_batches(_ROWS_A_BLOCK, columns=list(_COLUMNS)):
            yield batch
            row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise unreadable(f"{uri}: after row {row - 1}", error) from None


def _blocks(uri: str, problems: Problems, parse: _Parser) -> Iterator[ScoreRows]:
    rows: list[tuple[str, str, float, int]] = []
    for first, texts in read_lines(uri, problems):
        for number, text in enumerate(texts, first):
            if text.strip():
                rows += [(*row, number) for row in parse(f"{uri}:{number}", text, problems)]
            if len(rows) >= _ROWS_A_BLOCK:
                yield _of_rows(uri, rows, problems)
                rows = []
    yield _of_rows(uri, rows, problems)


def _of_rows(uri: str, rows: list[tuple[str, str, float, int]], problems: Problems) -> ScoreRows:
    queries, passages, scores, lines = zip(*rows, strict=True) if rows else ((), (), (), ())
    ids = [list(queries), list(passages)]
    return _finite(uri, problems, ids, np.array(scores, np.float64), np.array(lines, np.int64))


def _finite(
    uri: str, problems: Problems, ids: list[list[str]], scores: npt.NDArray[np.float64], lines: npt.NDArray[np.int64]
) -> ScoreRows:
    """The rows whose score fits a float32; the others are added to `problems`."""
    sound = np.abs(scores) <= np.finfo(np.float32).max  # False for NaN
    for i in np.flatnonzero(~sound).tolist():
        problems.add(
            f"{uri}:{lines[i]}", "a score that is not finite", expected="a finite number", found=str(scores[i])
        )
    kept = np.flatnonzero(sound).tolist()
    if len(kept) == len(sound):
        return ScoreRows(ids[0], ids[1], scores, lines)
    return ScoreRows([ids[0][i] for i in kept], [ids[1][i] for i in kept], scores[kept], lines[kept])


def _tsv_line(where: str, text: str, problems: Problems) -> list[tuple[str, str, float]]:
    fields = text.split("\t")
    if len(fields) != 3 or not fields[0].strip() or not fields[1].strip():
        problems.add(where, "not a row of scores", expected="query id TAB passage id TAB score", found=shorten(text))
        return []
    try:
        return [(fields[0], fields[1], float(fields[2]))]
    except ValueError:
        problems.add(where, "a score that is no number", expected="a finite number", found=shorten(fields[2]))
        return []


def _json_line(where: str, text: str, problems: Problems) -> list[tuple[str, str, float]]:
    """[query, [passage, score], [passage, score], ...]: the form of ColBERT's published distillation sets."""
    try:
        row = json.loads(text)
        if not isinstance(row, list):
            raise TypeError("a row is a list")
        query, *pairs = row
        return [(_id(query), _id(passage), _number(score)) for passage, score in pairs]
    except (ValueError, TypeError, RecursionError, OverflowError):
        problems.add(where, "not a row of scores", expected="[query id, [passage id, score], ...]", found=shorten(text))
        return []


def _id(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise TypeError("an id is a string or a whole number")
    str(value).encode()  # half a surrogate pair has no UTF-8 form: UnicodeEncodeError is a ValueError
    return str(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError("a score is a number")
    return float(value)
