"""`ckd-ray export RUN --what labels`: the collective scores of every training query's candidates, as a training set of
other libraries.

A query's candidates are its labelled passages and the top of its ranking. Labelled passages come first, then the others
by falling score. A query without a label has the teacher's scores alone; where a format asks for a positive, it is the
passage that the teacher scores highest. Every query has the same number of candidates, which readers of list columns
want; queries with fewer are left out and counted, and so are, in formats with positives and negatives, queries whose
candidates are all labelled: the libraries draw a negative for every query, and fail without one.

Blocks of queries are scored one after another in this process, or by tasks of Ray where there are many; one block is in
memory at a time. Shapes: B queries of a block, W candidates a query.
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
from ckd_ray.files import join, new_folder, write_json_atomic
from ckd_ray.inspection.labelled_run import LabelledRun, labelled_run_once
from ckd_ray.inspection.labels_card import labels_card
from ckd_ray.progress import Progress
from ckd_ray.ray_util.parts import part_tables, query_spans
from ckd_ray.runs.exports import LABELS_FILE, check_place

FORMATS = ("sentence-transformers", "pylate", "colbert", "flagembedding", "tevatron", "triples")
SCALINGS = ("auto", "minmax", "raw")
# Their trainers take the softmax of the scores as they are; of scores of 0 to 1 it would be nearly flat.
_RAW = ("flagembedding", "colbert")
_WITH_POSITIVES = ("flagembedding", "tevatron", "triples")
QUERIES_A_BLOCK = 256
# Above so many queries, tasks of Ray score them: below, to start Ray takes longer than it saves.
_QUERIES_IN_PROCESS = 20_000


@dataclass(frozen=True)
class Block:
    """The candidates of B queries.

    Attributes:
        queries_B, passages_BW: dense indices. scores_BW: scaled as asked for.
        positives_B: how many of a query's first candidates are labelled; 0 for a query without a label.
    """

    queries_B: Int64Array
    positives_B: Int64Array
    passages_BW: Int64Array
    scores_BW: Float64Array

    def to_table(self) -> pa.Table:
        """As a task returns it."""
        width = self.passages_BW.shape[1]
        lists = {"passages": self.passages_BW, "scores": self.scores_BW}
        columns = {name: pa.FixedSizeListArray.from_arrays(v.reshape(-1), width) for name, v in lists.items()}
        return pa.table({"query": self.queries_B, "positives": self.positives_B, **columns})

    @classmethod
    def from_table(cls, table: pa.Table, width: int) -> Block:
        """`to_table`'s form."""

        def values(name: str) -> Any:
            column = table[name].combine_chunks()
            return column.flatten().to_numpy().reshape(-1, width)

        return cls(table["query"].to_numpy(), table["positives"].to_numpy(), values("passages"), values("scores"))


@dataclass(frozen=True)
class _Row:
    """A query with the ids and texts of its candidates; `positives` is 1 where none is labelled."""

    query_id: str
    query: str
    ids: list[str]
    texts: list[str]
    scores: list[float]
    positives: int


def export_labels(
    run: str, fmt: str, *, out: str | None = None, width: int = 32, scaling: str = "auto"
) -> dict[str, Any]:
    """Write the labels of a run as a training set.

    Args:
        run: a run, or a variant of one, as `open_finished` takes it.
        fmt: of `FORMATS`. `sentence-transformers` and `pylate` share one layout.
        out: the folder to write; `exports/labels-FORMAT` inside the run when None.
        width: candidates a query, the labelled ones included.
        scaling: `minmax` brings the scores of a query to 0 .. 1, as PyLate's loss expects them; `raw` keeps them;
            `auto` is `raw` for flagembedding and colbert, else `minmax`.

    Returns:
        `out`, `format`, `queries`, `unlabelled` (of them), `left_out` (queries with fewer candidates, or with
        none to serve as a negative), `width`, `scaling`.

    Raises:
        UserError: no labels there, an option is wrong, `out` holds something else, or no query has `width`
            candidates.
    """
    if fmt not in FORMATS:
        raise UserError("unknown format of labels", where="--format", expected=", ".join(FORMATS), found=fmt)
    if scaling not in SCALINGS:
        raise UserError("unknown scaling", where="--scores", expected=", ".join(SCALINGS), found=scaling)
    if width < 2:
        raise UserError("too few candidates", where="--width", expected="2 or more", found=str(width))
    if scaling == "auto":
        scaling = "raw" if fmt in _RAW else "minmax"
    opened = LabelledRun.open(run)
    target = out or join(opened.paths.exports, f"labels-{fmt}")
    if out is not None:
        check_place(target)
    writer = {"sentence-transformers": _lists, "pylate": _lists}.get(fmt) or _LINES[fmt]
    total, counts = len(opened.queries.ids), {"queries": 0, "unlabelled": 0}
    with new_folder(target) as folder, Progress("export", total, "queries") as progress:
        blocks = _blocks(opened, width, scaling)
        blocks = _with_negatives(blocks) if fmt in _WITH_POSITIVES else blocks
        writer(Path(folder), opened, _counted(blocks, counts, progress))
        if not counts["queries"]:
            raise UserError(
                "every query would be left out: none has so many candidates, one of them unlabelled",
                where="--width",
                expected=f"about {opened.rankings.shape[1]} at most here",
                found=str(width),
                fix="lower --width, or retrieve deeper (retrieve.depth)",
            )
        counts["left_out"] = total - counts["queries"]
        card = labels_card(opened.config, fmt, width, scaling, counts, positives=fmt in _WITH_POSITIVES)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")
        write_json_atomic(join(folder, LABELS_FILE), {"what": "labels", "format": fmt, "width": width, **counts})
    return {"out": target, "format": fmt, **counts, "width": width, "scaling": scaling}


def score_block(opened: LabelledRun, first: int, stop: int, width: int, scaling: str) -> Block:
    """The candidates of the queries from `first` to `stop` that have at least `width` of them."""
    queries, positives, passages, scores = [], [], [], []
    for query in range(first, stop):
        ranking = opened.rankings[query]
        found = opened.with_labelled(query, ranking[: opened.settings.negatives_depth])
        if len(found) < width:
            continue
        scores_N = opened.collective_scores(query, found).numpy()
        labelled_N = np.isin(found, opened.positives.of(query))
        order_W = np.lexsort((found, -scores_N, ~labelled_N))[:width]
        queries.append(query)
        positives.append(int(labelled_N[order_W].sum()))
        passages.append(found[order_W])
        scores.append(_scaled(scores_N[order_W], scaling))
    return Block(
        np.array(queries, np.int64),
        np.array(positives, np.int64),
        np.array(passages, np.int64).reshape(-1, width),
        np.array(scores, np.float64).reshape(-1, width),
    )


def _blocks(opened: LabelledRun, width: int, scaling: str) -> Iterator[Block]:
    spans = query_spans(len(opened.queries.ids), QUERIES_A_BLOCK)
    if len(opened.queries.ids) <= _QUERIES_IN_PROCESS:
        for first, stop in spans:
            yield score_block(opened, first, stop, width, scaling)
        return
    from ckd_ray.ray_util.session import connected

    with connected(None):
        arguments = {"run": opened.paths.folder, "width": width, "scaling": scaling}
        for table in part_tables(spans, _part, arguments):
            if len(table):  # a block may have no query with so many candidates
                yield Block.from_table(table, width)


def _part(batch: dict[str, Any], run: str, width: int, scaling: str) -> pa.Table:
    first, stop = int(batch["first"][0]), int(batch["stop"][0])
    return score_block(labelled_run_once(run), first, stop, width, scaling).to_table()


def _with_negatives(blocks: Iterator[Block]) -> Iterator[Block]:
    """Without the queries whose candidates are all labelled."""
    for block in blocks:
        kept = block.positives_B < block.passages_BW.shape[1]
        yield Block(block.queries_B[kept], block.positives_B[kept], block.passages_BW[kept], block.scores_BW[kept])


def _counted(blocks: Iterator[Block], counts: dict[str, int], progress: Progress) -> Iterator[Block]:
    for block in blocks:
        counts["queries"] += len(block.queries_B)
        counts["unlabelled"] += int((block.positives_B == 0).sum())
        yield block
        progress.advance(len(block.queries_B))


def _scaled(scores: Float64Array, scaling: str) -> Float64Array:
    if scaling == "raw":
        return scores
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else np.ones_like(scores)


def _with_texts(opened: LabelledRun, blocks: Iterator[Block]) -> Iterator[_Row]:
    collection, queries = opened.collection, opened.queries
    for block in blocks:
        unique, at = np.unique(block.passages_BW.reshape(-1), return_inverse=True)
        ids, texts = collection.passage_ids(unique), collection.texts(unique)
        at_BW: Any = at.reshape(block.passages_BW.shape).tolist()
        lines = zip(block.queries_B.tolist(), at_BW, block.scores_BW.tolist(), block.positives_B.tolist(), strict=True)
        for query, places, scores, positives in lines:
            yield _Row(
                query_id=queries.ids[query],
                query=queries.texts[query],
                ids=[ids[i] for i in places],
                texts=[texts[i] for i in places],
                scores=scores,
                positives=positives or 1,
            )


def _lists(folder: Path, opened: LabelledRun, blocks: Iterator[Block]) -> None:
    """`train.parquet` (query_id, document_ids, scores), `queries.parquet` and `documents.parquet` (id, text)."""
    schema = pa.schema(
        {"query_id": pa.string(), "document_ids": pa.list_(pa.string()), "scores": pa.list_(pa.float32())}
    )
    with pq.ParquetWriter(folder / "train.parquet", schema, compression="zstd") as file:
        for block in blocks:
            rows, width = block.passages_BW.shape
            unique, at = np.unique(block.passages_BW.reshape(-1), return_inverse=True)
            ids = pa.array(opened.collection.passage_ids(unique), pa.string()).take(pa.array(at))
            starts = pa.array(np.arange(0, rows * width + 1, width), pa.int32())
            scores = pa.array(block.scores_BW.reshape(-1).astype(np.float32))
            columns = [
                pa.array([opened.queries.ids[q] for q in block.queries_B.tolist()], pa.string()),
                pa.ListArray.from_arrays(starts, ids),
                pa.ListArray.from_arrays(starts, scores),
            ]
            file.write_table(pa.table(columns, schema=schema))
    queries = opened.queries
    pq.write_table(pa.table({"query_id": queries.ids, "text": queries.texts}), folder / "queries.parquet")
    schema = pa.schema({"document_id": pa.string(), "text": pa.string()})
    with pq.ParquetWriter(folder / "documents.parquet", schema, compression="zstd") as file:
        for first, passages in opened.collection.text_blocks():
            ids = opened.collection.passage_ids(np.arange(first, first + len(passages)))
            file.write_table(pa.table({"document_id": ids, "text": passages}, schema))


def _colbert(folder: Path, opened: LabelledRun, blocks: Iterator[Block]) -> None:
    """`train.jsonl` of [qid, [pid, score], ...], where ids are line numbers of `queries.tsv` and `collection.tsv`."""
    with ExitStack() as stack:
        files = {n: stack.enter_context(_open(folder / n)) for n in ("train.jsonl", "queries.tsv", "collection.tsv")}
        for block in blocks:
            lines = zip(block.queries_B.tolist(), block.passages_BW.tolist(), block.scores_BW.tolist(), strict=True)
            for query, passages, scores in lines:
                pairs = [[p, s] for p, s in zip(passages, scores, strict=True)]
                files["train.jsonl"].write(json.dumps([query, *pairs]) + "\n")
        for number, text in enumerate(opened.queries.texts):
            files["queries.tsv"].write(f"{number}\t{_one_line(text)}\n")
        for first, passages in opened.collection.text_blocks():
            for number, text in enumerate(passages, first):
                files["collection.tsv"].write(f"{number}\t{_one_line(text)}\n")


def _json_lines(entries: Callable[[_Row], Iterator[dict[str, Any]]]) -> Callable[..., None]:
    def write(folder: Path, opened: LabelledRun, blocks: Iterator[Block]) -> None:
        with _open(folder / "train.jsonl") as file:
            for row in _with_texts(opened, blocks):
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries(row))

    return write


def _flagembedding(row: _Row) -> Iterator[dict[str, Any]]:
    yield {
        "query": row.query,
        "pos": row.texts[: row.positives],
        "neg": row.texts[row.positives :],
        "pos_scores": row.scores[: row.positives],
        "neg_scores": row.scores[row.positives :],
    }


def _tevatron(row: _Row) -> Iterator[dict[str, Any]]:
    """The ids that Tevatron documents, and passages with text and score. Its readers prefer the passages; ids alone
    need a separate corpus and have no scores."""
    pairs = zip(row.ids, row.texts, row.scores, strict=True)
    passages = [{"docid": name, "text": text, "score": score} for name, text, score in pairs]
    yield {
        "query_id": row.query_id,
        "query_text": row.query,
        "positive_document_ids": row.ids[: row.positives],
        "negative_document_ids": row.ids[row.positives :],
        "query": row.query,
        "positive_passages": passages[: row.positives],
        "negative_passages": passages[row.positives :],
    }


def _triples(row: _Row) -> Iterator[dict[str, Any]]:
    """One for each pair of a positive and another passage; `margin` is the difference of their scores."""
    for a in range(row.positives):
        for b in range(row.positives, len(row.ids)):
            yield {
                "query": row.query,
                "positive": row.texts[a],
                "negative": row.texts[b],
                "margin": row.scores[a] - row.scores[b],
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
