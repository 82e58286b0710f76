"""`ckd-ray export RUN --what labels`: the collective scores of every training query's candidates, as a training set of
other libraries. Needs no Ray; one block of queries is in memory at a time.

A query's candidates are its labelled passages and the top of its ranking. Labelled passages come first, then the others
by falling score. A query without a label has the teacher's scores alone; where a format asks for a positive, it is the
passage that the teacher scores highest. Every query has the same number of candidates, which readers of list columns
want; queries with fewer are left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ckd_ray.arrays import Float64Array, Int64Array
from ckd_ray.errors import UserError
from ckd_ray.files import join, new_folder
from ckd_ray.inspection.labelled_run import LabelledRun

FORMATS = ("sentence-transformers", "pylate", "colbert", "flagembedding", "tevatron", "triples")
SCALINGS = ("minmax", "raw")
_WITH_POSITIVES = ("flagembedding", "tevatron", "triples")
_QUERIES_A_BLOCK = 256


@dataclass(frozen=True)
class Row:
    """A query's candidates, (width,): dense passage indices and scores.

    Attributes:
        positives: how many of the first ones are labelled; 1 where none is, which is the teacher's best.
    """

    query: int
    passages: Int64Array
    scores: Float64Array
    positives: int


@dataclass(frozen=True)
class _Texts:
    """Ids and texts of the queries and passages of a block."""

    query_ids: dict[int, str]
    queries: dict[int, str]
    passage_ids: dict[int, str]
    passages: dict[int, str]


def export_labels(
    run: str, fmt: str, *, out: str | None = None, width: int = 32, scaling: str = "minmax"
) -> dict[str, Any]:
    """Write the labels of a run as a training set.

    Args:
        run: a run, or a variant of one, as `open_finished` takes it.
        fmt: of `FORMATS`. `sentence-transformers` and `pylate` share one layout.
        out: the folder to write; `exports/labels-FORMAT` inside the run when None.
        width: candidates a query, the labelled ones included.
        scaling: `minmax` brings the scores of a query to 0 .. 1, as PyLate's loss expects them; `raw` keeps them.

    Returns:
        `out`, `format`, `queries`, `unlabelled` (of them), `left_out` (queries with fewer candidates), `width`,
        `scaling`.

    Raises:
        UserError: no labels there, or an option is wrong.
    """
    if fmt not in FORMATS:
        raise UserError("unknown format of labels", where="--format", expected=", ".join(FORMATS), found=fmt)
    if scaling not in SCALINGS:
        raise UserError("unknown scaling", where="--scores", expected=" or ".join(SCALINGS), found=scaling)
    if width < 2:
        raise UserError("too few candidates", where="--width", expected="2 or more", found=str(width))
    opened = LabelledRun.open(run)
    target = out or join(opened.paths.exports, f"labels-{fmt}")
    writer = {"sentence-transformers": _lists, "pylate": _lists}.get(fmt) or _LINES[fmt]
    counts = {"queries": 0, "unlabelled": 0, "left_out": 0}
    with new_folder(target) as folder:
        writer(Path(folder), opened, _rows(opened, width, scaling, counts))
        (Path(folder) / "README.md").write_text(_card(opened, fmt, width, scaling, counts), encoding="utf-8")
    return {"out": target, "format": fmt, **counts, "width": width, "scaling": scaling}


def _rows(opened: LabelledRun, width: int, scaling: str, counts: dict[str, int]) -> Iterator[Row]:
    for query in range(len(opened.queries.ids)):
        ranking = opened.rankings[query]
        passages = opened.with_labelled(query, ranking[: opened.settings.negatives_depth])
        if len(passages) < width:
            counts["left_out"] += 1
            continue
        scores = opened.distributions(query, passages).collective_scores.numpy()
        labelled = np.isin(passages, opened.positives.of(query))
        order = np.lexsort((passages, -scores, ~labelled))[:width]
        known = int(labelled[order].sum())
        counts["queries"] += 1
        counts["unlabelled"] += not known
        yield Row(query, passages[order], _scaled(scores[order], scaling), known or 1)


def _scaled(scores: Float64Array, scaling: str) -> Float64Array:
    if scaling == "raw":
        return scores
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else np.ones_like(scores)


def _blocks(opened: LabelledRun, rows: Iterator[Row]) -> Iterator[tuple[list[Row], _Texts]]:
    block: list[Row] = []
    for row in rows:
        block.append(row)
        if len(block) == _QUERIES_A_BLOCK:
            yield block, _texts(opened, block)
            block = []
    if block:
        yield block, _texts(opened, block)


def _texts(opened: LabelledRun, rows: list[Row]) -> _Texts:
    unique = np.unique(np.concatenate([row.passages for row in rows]))
    collection, queries = opened.collection, opened.queries
    wanted = [row.query for row in rows]
    return _Texts(
        {q: queries.ids[q] for q in wanted},
        {q: queries.texts[q] for q in wanted},
        dict(zip(unique.tolist(), collection.passage_ids(unique), strict=True)),
        dict(zip(unique.tolist(), collection.texts(unique), strict=True)),
    )


def _lists(folder: Path, opened: LabelledRun, rows: Iterator[Row]) -> None:
    """`train.parquet` (query_id, document_ids, scores), `queries.parquet` and `documents.parquet` (id, text)."""
    schema = pa.schema(
        {"query_id": pa.string(), "document_ids": pa.list_(pa.string()), "scores": pa.list_(pa.float32())}
    )
    with pq.ParquetWriter(folder / "train.parquet", schema, compression="zstd") as file:
        for block, texts in _blocks(opened, rows):
            columns = {
                "query_id": [texts.query_ids[row.query] for row in block],
                "document_ids": [[texts.passage_ids[p] for p in row.passages.tolist()] for row in block],
                "scores": [row.scores.tolist() for row in block],
            }
            file.write_table(pa.table(columns, schema))
    queries = opened.queries
    pq.write_table(pa.table({"query_id": queries.ids, "text": queries.texts}), folder / "queries.parquet")
    schema = pa.schema({"document_id": pa.string(), "text": pa.string()})
    with pq.ParquetWriter(folder / "documents.parquet", schema, compression="zstd") as file:
        for first, passages in opened.collection.text_blocks():
            ids = opened.collection.passage_ids(np.arange(first, first + len(passages)))
            file.write_table(pa.table({"document_id": ids, "text": passages}, schema))


def _colbert(folder: Path, opened: LabelledRun, rows: Iterator[Row]) -> None:
    """`train.jsonl` of [qid, [pid, score], ...], where ids are line numbers of `queries.tsv` and `collection.tsv`."""
    with ExitStack() as stack:
        files = {n: stack.enter_context(_open(folder / n)) for n in ("train.jsonl", "queries.tsv", "collection.tsv")}
        for row in rows:
            pairs = [[p, s] for p, s in zip(row.passages.tolist(), row.scores.tolist(), strict=True)]
            files["train.jsonl"].write(json.dumps([row.query, *pairs]) + "\n")
        for number, text in enumerate(opened.queries.texts):
            files["queries.tsv"].write(f"{number}\t{_one_line(text)}\n")
        for first, passages in opened.collection.text_blocks():
            for number, text in enumerate(passages, first):
                files["collection.tsv"].write(f"{number}\t{_one_line(text)}\n")


def _json_lines(entry: Callable[[Row, _Texts], Iterator[dict[str, Any]]]) -> Callable[..., None]:
    def write(folder: Path, opened: LabelledRun, rows: Iterator[Row]) -> None:
        with _open(folder / "train.jsonl") as file:
            for block, texts in _blocks(opened, rows):
                for row in block:
                    file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in entry(row, texts))

    return write


def _flagembedding(row: Row, texts: _Texts) -> Iterator[dict[str, Any]]:
    shown, scores = [texts.passages[p] for p in row.passages.tolist()], row.scores.tolist()
    yield {
        "query": texts.queries[row.query],
        "pos": shown[: row.positives],
        "neg": shown[row.positives :],
        "pos_scores": scores[: row.positives],
        "neg_scores": scores[row.positives :],
    }


def _tevatron(row: Row, texts: _Texts) -> Iterator[dict[str, Any]]:
    ids = [texts.passage_ids[p] for p in row.passages.tolist()]
    yield {
        "query_id": texts.query_ids[row.query],
        "query_text": texts.queries[row.query],
        "positive_document_ids": ids[: row.positives],
        "negative_document_ids": ids[row.positives :],
    }


def _triples(row: Row, texts: _Texts) -> Iterator[dict[str, Any]]:
    """One for each pair of a positive and another passage; `margin` is the difference of their scores."""
    for a in range(row.positives):
        for b in range(row.positives, len(row.passages)):
            yield {
                "query": texts.queries[row.query],
                "positive": texts.passages[int(row.passages[a])],
                "negative": texts.passages[int(row.passages[b])],
                "margin": float(row.scores[a] - row.scores[b]),
            }


_LINES: dict[str, Callable[..., None]] = {
    "colbert": _colbert,
    "flagembedding": _json_lines(_flagembedding),
    "tevatron": _json_lines(_tevatron),
    "triples": _json_lines(_triples),
}


def _open(path: Path) -> IO[str]:
    return path.open("w", encoding="utf-8", newline="\n")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _card(opened: LabelledRun, fmt: str, width: int, scaling: str, counts: dict[str, int]) -> str:
    scaled = "each query's scores are brought to 0 .. 1" if scaling == "minmax" else "scores are the teacher's own"
    settings = json.dumps(
        {key: opened.config[key] for key in ("label", "distill") if key in opened.config}, indent=2, ensure_ascii=False
    )
    unlabelled = ""
    if counts["unlabelled"]:
        best = ", and the passage that it scores highest is their positive" if fmt in _WITH_POSITIVES else ""
        unlabelled = f"\n{counts['unlabelled']:,} of the queries have no label: their order is the teacher's{best}."
    return f"""# Collective relevance labels

Written by ckd-ray in the form of {fmt}: {counts["queries"]:,} queries with {width} candidates each, the labelled
passages first and the others by falling score.{unlabelled}
{counts["left_out"]:,} queries have fewer candidates and are left out.
A score is the teacher's, with the expansion of its feedback passages and the ensemble; {scaled}. A labelled passage
keeps its own score: losses that want it highest have to raise it.

```json
{settings}
```
"""
