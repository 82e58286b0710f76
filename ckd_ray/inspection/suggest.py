"""`ckd-ray label --suggest FILE`: unlabelled passages that the labels call relevant, for annotators.

The score of a passage for a query is its collective probability: the soft label that training gives it, over the top
`distill.negatives_depth` of the ranking and the labelled passages (see `LabelledRun.distributions`). The pairs of
highest score over all queries are kept. Each part of the rankings is reduced where it is read, so that memory does not
grow with the number of queries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ckd_ray.errors import UserError
from ckd_ray.evaluate.runs import without_space
from ckd_ray.files import join, write_atomic
from ckd_ray.inspection.labelled_run import SPLIT, LabelledRun, labelled_run_once
from ckd_ray.ray_util.parts import part_file
from ckd_ray.retrieve.rankings import part_matrix, read_ranking_part

_SCHEMA = pa.schema(
    {"query": pa.int64(), "passage": pa.int64(), "score": pa.float64(), "query_id": pa.string(), "id": pa.string()}
)


@dataclass(frozen=True)
class SuggestSettings:
    """The `top` pairs (query, passage) of at least the probability `least`."""

    top: int = 10_000
    least: float = 0.1

    def check(self) -> None:
        """Raises UserError for a setting out of range."""
        if self.top < 1:
            raise UserError("must be 1 or more", where="--suggest-top", found=str(self.top))
        if not 0 <= self.least <= 1:
            raise UserError("must be a probability, from 0 to 1", where="--suggest-min", found=str(self.least))


def suggestions_of_part(run: LabelledRun, part: int, first: int, stop: int, settings: SuggestSettings) -> pa.Table:
    """The most probable unlabelled passages of the queries [first, stop), which ranking part `part` holds."""
    columns = ["query_index", "rank", "passage_index"]
    table = read_ranking_part(join(run.paths.rankings, part_file(SPLIT, part)), columns)
    depth = run.settings.negatives_depth
    rankings = part_matrix(table, first, stop - first, depth)
    rows: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
    for query, ranking in zip(range(first, stop), rankings, strict=True):
        labelled, passages = run.positives.of(query), run.with_labelled(query, ranking)
        if ranking[0] < 0 or not len(labelled):
            continue  # training does not read the labels of a query without a labelled passage
        score = run.distributions(query, passages).collective.numpy()
        chosen = np.flatnonzero((score >= settings.least) & ~np.isin(passages, labelled))
        rows["query"] += [query] * len(chosen)
        rows["passage"] += passages[chosen].tolist()
        rows["score"] += score[chosen].tolist()
        rows["query_id"] += [run.queries.ids[query]] * len(chosen)
    rows["id"] = run.collection.passage_ids(rows["passage"])
    return best(pa.table(rows, _SCHEMA), settings.top)


def best(table: pa.Table, top: int) -> pa.Table:
    """The `top` rows of highest score; equal scores in the order of queries and passages."""
    order = np.lexsort((table["passage"].to_numpy(), table["query"].to_numpy(), -table["score"].to_numpy()))
    return table.take(pa.array(order[:top]))


def merge(parts: Iterable[pa.Table], top: int) -> pa.Table:
    """The best rows of all parts; holds at most twice `top` rows and one part."""
    kept = _SCHEMA.empty_table()
    for part in parts:
        kept = pa.concat_tables([kept, part])
        if kept.num_rows > 2 * top:
            kept = best(kept, top)
    return best(kept, top)


def write_suggestions(uri: str, table: pa.Table) -> None:
    """Write lines `query 0 passage score`, atomically. White space in ids is percent-encoded, as in runs."""
    columns = (table[name].to_pylist() for name in ("query_id", "id", "score"))
    lines = [f"{without_space(q)} 0 {without_space(p)} {score:.6f}\n" for q, p, score in zip(*columns, strict=True)]
    write_atomic(uri, lambda stream: stream.write("".join(lines).encode()))


def suggest(run: str, file: str, settings: SuggestSettings) -> int:
    """Read a labelled run with Ray Data and write `file`. Returns the number of suggestions.

    Raises:
        UserError: the run has no labels, or a setting is out of range.
    """
    from ckd_ray.progress import Progress
    from ckd_ray.ray_util.parts import query_spans, run_parts

    settings.check()
    opened = LabelledRun.open(run)
    count = len(opened.queries.ids)
    spans = query_spans(count)

    def parts(progress: Progress) -> Iterator[pa.Table]:
        arguments = {"run": opened.paths.folder, "settings": settings}
        for row in run_parts(list(range(len(spans))), spans, _part, arguments):
            progress.advance(int(row["queries"]))
            with pa.ipc.open_stream(row["rows"]) as reader:
                yield reader.read_all()

    with Progress("suggest", count, "queries") as progress:
        found = merge(parts(progress), settings.top)
    write_suggestions(file, found)
    return int(found.num_rows)


def _part(batch: dict[str, Any], run: str, settings: SuggestSettings) -> pa.Table:
    part, first, stop = (int(batch[name][0]) for name in ("part", "first", "stop"))
    found = suggestions_of_part(labelled_run_once(run), part, first, stop, settings)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, found.schema) as writer:
        writer.write_table(found)
    return pa.table({"queries": [stop - first], "rows": pa.array([sink.getvalue().to_pybytes()], pa.large_binary())})
