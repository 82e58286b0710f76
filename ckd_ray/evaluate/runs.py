"""Runs in TREC form: query Q0 passage rank score tag."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
import pyarrow as pa

from ckd_ray.errors import UserError
from ckd_ray.store.files import filesystem_of, write_atomic


def falling_scores(run: pd.DataFrame) -> pd.DataFrame:
    """The run with scores that fall strictly with the rank.

    trec_eval ignores ranks and orders equal scores by passage id, descending; so a tie would be measured in another
    order than we show. Each score that does not fall is lowered by the least that a reader of the file can see.
    """
    run = run.sort_values(["query_id", "rank"], kind="stable")
    scores = run["score"].to_numpy(dtype="float64", copy=True)
    queries = run["query_id"].to_numpy()
    for i in range(1, len(scores)):
        if queries[i] == queries[i - 1] and scores[i] > scores[i - 1] - 1e-6:
            scores[i] = scores[i - 1] - 1e-6
    return run.assign(score=scores)


def write_trec_run(uri: str, run: pd.DataFrame, tag: str) -> None:
    """Write a run (query_id, doc_id, rank, score), atomically. Ids may not hold white space: it is the separator."""
    for column in ("query_id", "doc_id"):
        odd = run[column].astype(str).str.contains(r"\s", regex=True)
        if odd.any():
            # Percent-encoding keeps the file readable by trec_eval; ids without white space stay as they are.
            run = run.assign(**{column: run[column].str.replace(r"\s", lambda m: f"%{ord(m[0]):02X}", regex=True)})

    def write(stream: pa.NativeFile) -> None:
        for rows in (run.iloc[i : i + 65536] for i in range(0, len(run), 65536)):
            stream.write("".join(_lines(rows, tag)).encode())

    write_atomic(uri, write)


def _lines(rows: pd.DataFrame, tag: str) -> Iterable[str]:
    columns = (rows["query_id"], rows["doc_id"], rows["rank"], rows["score"])
    for query, passage, rank, score in zip(*columns, strict=True):
        yield f"{query} Q0 {passage} {rank} {score:.6f} {tag}\n"


def read_trec_run(uri: str) -> pd.DataFrame:
    """Read a run: columns query_id, doc_id, rank, score.

    Raises:
        UserError: a line has not six columns, or its rank or score is no number; with file and line.
    """
    fs, path = filesystem_of(uri)
    rows = []
    with fs.open_input_stream(path) as stream:
        for number, line in enumerate(stream.read().decode("utf-8").splitlines(), 1):
            columns = line.split()
            try:
                query, _, passage, rank, score, _ = columns
                rows.append((query, passage, int(rank), float(score)))
            except ValueError:
                raise UserError(
                    "not a line of a TREC run",
                    where=f"{uri}:{number}",
                    expected="query Q0 passage rank score tag",
                    found=line[:80],
                ) from None
    return pd.DataFrame(rows, columns=["query_id", "doc_id", "rank", "score"])
