"""Rows of a file of scores, in blocks: Parquet, TSV, or JSON lines of (query, [passage, score], ...), of Tevatron, of
FlagEmbedding or of triples; the last two hold texts in the place of ids (`text_rows`).

Parquet has a row a pair, or a row a query with a list of passages and a list of scores: the layout in which
sentence-transformers and PyLate keep sets for distillation. Some of those hold their lists as text.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from ckd_ray.arrays import Float64Array, Int64Array
from ckd_ray.cross_encoder.text_rows import TextLines, has_texts, number
from ckd_ray.data.lines import read_lines
from ckd_ray.data.problems import Problems, shorten
from ckd_ray.data.tables import parquet_batches
from ckd_ray.errors import UserError, first_line

_ROWS_A_BLOCK = 1 << 18
_PARQUET_ROWS = 1 << 16
_LISTS_A_BLOCK = 1 << 12
# The names of the columns of pairs and of lists: query, passages, scores.
_QUERY = ("query_id", "qid", "query-id")
_PAIRS = (_QUERY, ("passage_id", "pid", "document_id", "doc_id", "corpus-id"), ("score",))
_LISTS = (_QUERY, ("document_ids", "passage_ids", "doc_ids", "pids"), ("scores",))
_Parser = Callable[[str, str, Problems], list[tuple[str, str, float]]]


@dataclass(frozen=True)
class ScoreRows:
    """Rows with ids, scores and, for messages, their lines (in a Parquet file their row numbers from 1). With `by_text`
    the ids are texts."""

    query_ids: list[str]
    passage_ids: list[str]
    scores: Float64Array
    lines: Int64Array
    by_text: bool = False


def read_scores(uri: str, problems: Problems) -> Iterator[ScoreRows]:
    """The rows of `uri`, in blocks. A row that cannot be read is added to `problems` with its line, and left out.

    Raises:
        UserError: the file is missing, cannot be read, or has none of these forms.
    """
    name = uri.removesuffix(".gz")
    if uri.endswith(".parquet"):
        yield from _parquet(uri, problems)
    elif name.endswith((".tsv", ".txt")):
        yield from _blocks(uri, problems, _tsv_line)
    elif name.endswith((".jsonl", ".json")):
        yield from _blocks(uri, problems, None)
    else:
        raise UserError(
            "unknown form of scores",
            where="cross_encoder.scores",
            expected="a name that ends in .parquet, .tsv, .txt or .jsonl (the last three also with .gz)",
            found=uri,
        )


def _parquet(uri: str, problems: Problems) -> Iterator[ScoreRows]:
    of_lists = False

    def chosen(schema: pa.Schema) -> dict[int, str]:
        nonlocal of_lists
        for of_lists in (False, True):
            names = {
                i: name
                for i, spellings in enumerate(_LISTS if of_lists else _PAIRS)
                for name in spellings[::-1]
                if name in schema.names
            }
            if len(names) == 3:
                return names
        raise UserError(
            "no columns of scores",
            where=uri,
            expected="query_id, passage_id and score, or lists of them: query_id, document_ids and scores",
            found=", ".join(schema.names[:12]) or "no columns",
        )

    for row, batch in parquet_batches(uri, chosen, _PARQUET_ROWS):
        if of_lists:
            for start in range(0, len(batch[0]), _LISTS_A_BLOCK):
                columns = [batch[i].slice(start, _LISTS_A_BLOCK).to_pylist() for i in range(3)]
                yield _of_lists(uri, columns, row + start, problems)
        else:
            yield _of_pairs(uri, [batch[i] for i in range(3)], row, problems)


def _of_pairs(uri: str, columns: list[pa.Array], row: int, problems: Problems) -> ScoreRows:
    try:
        ids = [column.cast(pa.string()) for column in columns[:2]]
        scores = columns[2].cast(pa.float64()).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(
            "a column has another type",
            where=f"{uri}, rows {row} and on",
            expected="ids that can be read as strings and scores that are numbers",
            found=first_line(error),
        ) from None
    lines = np.arange(row, row + len(scores))
    empty = np.flatnonzero(ids[0].is_null().to_numpy(False) | ids[1].is_null().to_numpy(False))
    for i in empty.tolist():
        problems.add(f"{uri}:{row + i}", "an empty id", expected="a query id and a passage id", found="null")
    kept = np.setdiff1d(np.arange(len(scores)), empty)
    return _finite(
        uri, problems, [ids[0].take(pa.array(kept)).to_pylist(), ids[1].take(pa.array(kept)).to_pylist()],
        scores[kept], lines[kept],
    )  # fmt: skip


def _of_lists(uri: str, columns: list[list[Any]], first: int, problems: Problems) -> ScoreRows:
    """The pairs of rows of (query, passages, scores); a row whose lists do not fit one another is noted."""
    rows: list[tuple[str, str, float, int]] = []
    for row, (query, passages, scores) in enumerate(zip(*columns, strict=True), first):
        rows += [(*pair, row) for pair in _listed(f"{uri}:{row}", query, passages, scores, problems)]
    return _of_rows(uri, rows, problems)


def _listed(
    where: str, query: object, passages: object, scores: object, problems: Problems
) -> list[tuple[str, str, float]]:
    try:
        passages, scores = _list(passages), _list(scores)
        if len(passages) != len(scores):
            found = f"{len(passages)} and {len(scores)}, of query {shorten(str(query))}"
            problems.add(where, "lists of different lengths", expected="a score for every passage", found=found)
            return []
        return [(_id(query), _id(passage), number(score)) for passage, score in zip(passages, scores, strict=True)]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, OverflowError):
        expected = "an id, a list of ids and a list of numbers"
        problems.add(where, "not a row of scores", expected=expected, found=shorten(f"{query}, {passages}, {scores}"))
        return []


def _list(value: object) -> list[Any]:
    """A list, also one that is written as text, in JSON or as Python writes it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = ast.literal_eval(str(value))
    if not isinstance(value, list | tuple):
        raise TypeError("neither a list nor the text of one")
    return list(value)


def _blocks(uri: str, problems: Problems, parse: _Parser | None) -> Iterator[ScoreRows]:
    """Without a parser, the first line says whether the file holds ids or texts."""
    rows: list[tuple[str, str, float, int]] = []
    by_text = False
    for first, texts in read_lines(uri, problems):
        for line, text in enumerate(texts, first):
            if text.strip():
                if parse is None:
                    by_text = has_texts(text)
                    parse = TextLines() if by_text else _json_line
                rows += [(*row, line) for row in parse(f"{uri}:{line}", text, problems)]
            if len(rows) >= _ROWS_A_BLOCK:
                yield replace(_of_rows(uri, rows, problems), by_text=by_text)
                rows = []
    yield replace(_of_rows(uri, rows, problems), by_text=by_text)


def _of_rows(uri: str, rows: list[tuple[str, str, float, int]], problems: Problems) -> ScoreRows:
    queries, passages, scores, lines = zip(*rows, strict=True) if rows else ((), (), (), ())
    ids = [list(queries), list(passages)]
    return _finite(uri, problems, ids, np.array(scores, np.float64), np.array(lines, np.int64))


def _finite(uri: str, problems: Problems, ids: list[list[str]], scores: Float64Array, lines: Int64Array) -> ScoreRows:
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
    """[query, [passage, score], [passage, score], ...], the form of ColBERT's published distillation sets; or an object
    with the columns of lists, or with the passages of Tevatron, each with its score."""
    try:
        row = json.loads(text)
        if isinstance(row, dict) and "positive_passages" in row:
            passages = [*row["positive_passages"], *row["negative_passages"]]
            return [(_id(row["query_id"]), _id(p["docid"]), number(p["score"])) for p in passages]
        if isinstance(row, dict):
            found = [name for names in _LISTS for name in names if name in row]
            if len(found) != len(_LISTS):
                raise TypeError("an object has the three columns of lists")
            return _listed(where, row[found[0]], row[found[1]], row[found[2]], problems)
        if not isinstance(row, list):
            raise TypeError("a row is a list or an object")
        query, *pairs = row
        return [(_id(query), _id(passage), number(score)) for passage, score in pairs]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        expected = (
            "[query id, [passage id, score], ...], or an object with query_id, document_ids and scores, or with texts:"
            " query, pos, neg, pos_scores, neg_scores"
        )
        problems.add(where, "not a row of scores", expected=expected, found=shorten(text))
        return []


def _id(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise TypeError("an id is a string or a whole number")
    str(value).encode()  # half a surrogate pair has no UTF-8 form: UnicodeEncodeError is a ValueError
    return str(value)
