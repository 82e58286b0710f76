"""Which queries the student answers better than the teacher, which worse, and what both put on top."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow.compute as pc

from ckd_ray.data import Collection
from ckd_ray.evaluate.runs import without_own_passage
from ckd_ray.files import join, list_files
from ckd_ray.retrieve.rankings import read_ranking_part

SHOWN = 3


@dataclass
class Example:
    """A query with its values and results under both systems.

    Attributes:
        labelled: the relevant passages of highest grade: (passage id, text, grade, rank of the teacher, rank of the
            student); None: not within the depth.
        tops: system -> the first few (rank, passage id, text, labelled).
    """

    query_id: str
    text: str
    teacher: float
    student: float
    labelled: list[tuple[str, str, int, int | None, int | None]] = field(default_factory=list)
    tops: dict[str, list[tuple[int, str, str, bool]]] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """Student minus teacher."""
        return self.student - self.teacher


def extremes(teacher: dict[str, float], student: dict[str, float], count: int) -> tuple[list[str], list[str]]:
    """(ids won, ids lost), the largest difference first, at most `count` each; ties in the order of the queries."""
    gains = [(q, student[q] - teacher[q]) for q in student if q in teacher]
    won = sorted((g for g in gains if g[1] > 0), key=lambda g: -g[1])[:count]
    lost = sorted((g for g in gains if g[1] < 0), key=lambda g: g[1])[:count]
    return [q for q, _ in won], [q for q, _ in lost]


def examples(
    collection: Collection,
    split: str,
    chosen: list[str],
    values: dict[str, dict[str, float]],
    rankings: dict[str, str],
    *,
    skip_same_id: bool,
    relevance_threshold: int = 1,
    length: int = 360,
) -> list[Example]:
    """The chosen queries with texts; only what is shown is read.

    Args:
        values: system -> query id -> value; rankings: system -> folder of its rankings.
        relevance_threshold: the grade from which a passage counts as labelled, as in the measures.
        length: characters of a passage.
    """
    queries = collection.queries(split)
    text_of = dict(zip(queries.ids, queries.texts, strict=True))
    wanted = set(chosen)
    qrels = collection.qrels(split)
    labels: dict[str, list[tuple[str, int, int]]] = {}
    for query, passage, index, grade in zip(
        qrels.query_ids, qrels.passage_ids, qrels.passage_index.tolist(), qrels.relevance.tolist(), strict=True
    ):
        if query in wanted and grade >= relevance_threshold:
            labels.setdefault(query, []).append((passage, index, grade))
    ranked = {system: _rankings(folder, split, wanted, skip_same_id) for system, folder in rankings.items()}
    found = []
    for query in chosen:
        example = Example(query, text_of[query], values["teacher"][query], values["student"][query])
        relevant = sorted(labels.get(query, []), key=lambda label: -label[2])
        positive = {passage for passage, _, _ in relevant}
        for system, by_query in ranked.items():
            rows = by_query.get(query)
            top = rows[rows["rank"] <= SHOWN] if rows is not None else None
            if top is None:
                continue
            texts = _texts(collection, top["passage_index"].tolist(), length)
            example.tops[system] = [
                (int(rank), str(passage), text, passage in positive)
                for rank, passage, text in zip(top["rank"], top["doc_id"], texts, strict=True)
            ]
        shown = relevant[:SHOWN]
        texts = _texts(collection, [index for _, index, _ in shown], length)
        for (passage, _, grade), text in zip(shown, texts, strict=True):
            ranks = [_rank_of(ranked.get(system, {}).get(query), passage) for system in ("teacher", "student")]
            example.labelled.append((passage, text, grade, ranks[0], ranks[1]))
        found.append(example)
    return found


def _texts(collection: Collection, indices: list[int], length: int) -> list[str]:
    texts = (" ".join(text.split()) for text in collection.texts(indices))
    return [text if len(text) <= length else text[:length].rsplit(" ", 1)[0] + " …" for text in texts]


def _rank_of(rows: pd.DataFrame | None, passage: str) -> int | None:
    if rows is None:
        return None
    at = rows.loc[rows["doc_id"] == passage, "rank"]
    return int(at.iloc[0]) if len(at) else None


def _rankings(folder: str, split: str, wanted: set[str], skip_same_id: bool) -> dict[str, pd.DataFrame]:
    """query id -> its results (doc_id, rank, passage_index), reading one part at a time until all are found."""
    found: dict[str, pd.DataFrame] = {}
    for name in _parts(folder, split):
        table = read_ranking_part(join(folder, name), ["query_id", "passage_id", "rank", "passage_index"])
        rows: Any = table.filter(pc.is_in(table["query_id"], value_set=_as_array(wanted))).to_pandas()
        rows = rows.rename(columns={"passage_id": "doc_id"})
        if skip_same_id:
            rows = without_own_passage(rows, int(rows["rank"].max()) if len(rows) else 1)
        for query, group in rows.groupby("query_id"):
            found[str(query)] = group.sort_values("rank")
        if len(found) == len(wanted):
            break
    return found


def _parts(folder: str, split: str) -> Iterable[str]:
    return [n for n in list_files(folder, ".parquet") if n.rpartition("-")[0] == split]


def _as_array(values: set[str]) -> Any:
    import pyarrow as pa

    return pa.array(sorted(values), pa.string())
