"""Runs in TREC format: query Q0 passage rank score tag."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import numpy as np
import pandas as pd
import pyarrow as pa

from ckd_ray.data.lines import read_lines
from ckd_ray.data.problems import Problems, shorten
from ckd_ray.files import write_atomic

# The smallest difference that stays visible in the six decimals of a run file.
_LEAST_STEP = 2e-6


def falling_scores(run: pd.DataFrame) -> pd.DataFrame:
    """The run with scores that fall strictly with the rank.

    trec_eval ignores ranks, keeps scores in single precision, and orders equal ones by passage id, descending. So it
    would measure ties in another order than that of the ranks. A score that does not fall is lowered by the smallest
    step that is visible in single precision and in six decimals: a_i = min(s_i, a_(i-1) - step) in each query.
    """
    run = run.sort_values(["query_id", "rank"], kind="stable")
    scores = run["score"].to_numpy(dtype="float64", copy=True)
    if not len(scores):
        return run
    queries = pd.Series(pd.factorize(run["query_id"])[0], index=run.index)
    largest = np.abs(scores).max()
    step = max(_LEAST_STEP, 2 * float(np.spacing(np.float32(largest))))
    place = queries.groupby(queries).cumcount().to_numpy() * step
    lowered = (pd.Series(scores + place, index=run.index).groupby(queries).cummin().to_numpy()) - place
    # Scores that already fall stay the same to the last bit.
    return run.assign(score=np.where(lowered < scores - step / 4, lowered, scores))


def without_own_passage(run: pd.DataFrame, depth: int) -> pd.DataFrame:
    """The run without passages that have the query's own id, with consecutive ranks, at most `depth` a query.

    For collections whose queries are also passages (ArguAna, Quora), where a query would find itself first.
    """
    kept = run[run["query_id"] != run["doc_id"]].sort_values(["query_id", "rank"], kind="stable")
    kept = kept.assign(rank=kept.groupby("query_id", sort=False).cumcount() + 1)
    return kept[kept["rank"] <= depth]


def write_trec_run(uri: str, parts: Iterable[pd.DataFrame], tag: str) -> None:
    """Write a run atomically, with one part (query_id, doc_id, rank, score) in memory at a time.

    White space separates the columns, so white space in ids is percent-encoded.
    """

    def write(stream: pa.NativeFile) -> None:
        for part in parts:
            part = part.assign(**{name: _without_space(part[name]) for name in ("query_id", "doc_id")})
            for rows in (part.iloc[i : i + 65536] for i in range(0, len(part), 65536)):
                stream.write("".join(_lines(rows, tag)).encode())

    write_atomic(uri, write)


def without_space(text: str) -> str:
    """The id with its white space percent-encoded (UTF-8), so that it is one column of a run or of qrels."""
    return re.sub(r"\s", lambda m: "".join(f"%{b:02X}" for b in m[0].encode()), text)


def _without_space(ids: pd.Series) -> pd.Series:
    ids = ids.astype(str)
    return ids.map(without_space) if ids.str.contains(r"\s", regex=True).any() else ids


def _lines(rows: pd.DataFrame, tag: str) -> Iterable[str]:
    columns = (rows["query_id"], rows["doc_id"], rows["rank"], rows["score"])
    for query, passage, rank, score in zip(*columns, strict=True):
        yield f"{query} Q0 {passage} {rank} {score:.6f} {tag}\n"


def read_trec_run(uri: str) -> pd.DataFrame:
    """Read a run: columns query_id, doc_id, rank, score.

    Raises:
        InputError: a line does not have six columns, or its rank or score is not a finite number; with file and line.
        UserError: the file cannot be read.
    """
    problems = Problems(of="the run")
    rows = []
    for first, lines in read_lines(uri, problems):
        for number, line in enumerate(lines, first):
            try:
                query, _, passage, rank, score, _ = line.split()
                if not math.isfinite(float(score)):
                    raise ValueError("no finite number")
                rows.append((query, passage, int(rank), float(score)))
            except ValueError:
                expected = "query Q0 passage rank score tag"
                problems.add(f"{uri}:{number}", "not a line of a TREC run", expected=expected, found=shorten(line))
    problems.check()
    return pd.DataFrame(rows, columns=["query_id", "doc_id", "rank", "score"])
