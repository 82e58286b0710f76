"""Which queries the student answers better than another system, which worse, and the top results of both."""

from __future__ import annotations

from collections.abc import Collection as Some, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from ckd_ray.data import Collection
from ckd_ray.evaluate.runs import without_space
from ckd_ray.evaluate.table import STUDENT
from ckd_ray.files import exists, filesystem_of, join, read_json
from ckd_ray.runs.directory import RunDir
from ckd_ray.runs.finished import FinishedRun

SHOWN = 3  # passages of a system, and labelled ones
_EXAMPLES = 15  # won and lost queries, each, of a split and another system
_LENGTH = 360  # characters of a passage

Values = Mapping[str, float]  # query id -> value of a measure
Ranked = Mapping[str, Sequence[str]]  # query id -> passage ids, best first


class Labelled(NamedTuple):
    """A relevant passage, with its rank under both systems; None where it is not in the ranking."""

    passage_id: str
    text: str
    grade: float
    other_rank: int | None
    student_rank: int | None


class Hit(NamedTuple):
    """One of the first results of a system."""

    rank: int
    passage_id: str
    text: str
    labelled: bool


@dataclass(frozen=True)
class Example:
    """A query with its values under the other system and the student, its relevant passages of highest grade, and the
    first results of each system."""

    query_id: str
    text: str
    other: float
    student: float
    labelled: list[Labelled]
    tops: dict[str, list[Hit]]

    @property
    def gain(self) -> float:
        """Student minus the other system."""
        return self.student - self.other


@dataclass(frozen=True)
class SplitWins:
    """Differences of the student from `other` on a split, under one measure: of all queries, and the extreme ones with
    their texts."""

    split: str
    measure: str
    other: str
    gains: list[float]
    won: list[Example]
    lost: list[Example]


def wins_of(run: FinishedRun, measures: Mapping[str, Any]) -> list[SplitWins]:
    """The student against the encoder as it is and against the teacher, on each split, the last one first.

    Args:
        measures: `evaluation/measures.json`.
    """
    collection, own = Collection.open(run.paths.root), run.paths.evaluation
    # A variant measures its student alone; the teacher was measured by the comparison or by the run.
    places = {
        "encoder": [run.paths.baseline("encoder")],
        "teacher": [own, join(run.paths.compare, "teacher"), RunDir(run.paths.root).evaluation],
        STUDENT: [own],
    }
    threshold = float(measures.get("settings", {}).get("relevance_threshold", 1))
    found = []
    for split in reversed(list(measures["splits"])):
        if split not in collection.splits:
            continue
        files = {name: [join(folder, f"{name}.{split}") for folder in folders] for name, folders in places.items()}
        stems = {name: next((s for s in some if exists(f"{s}.per_query.json")), None) for name, some in files.items()}
        values = {name: read_json(f"{stem}.per_query.json") for name, stem in stems.items() if stem}
        compared = []
        for other in [name for name in values if name != STUDENT and STUDENT in values]:
            measure = next((m for m in values[STUDENT] if m in values[other]), None)
            if measure is not None:
                pair = {name: values[name][measure] for name in (other, STUDENT)}
                compared.append((other, measure, pair, extremes(pair[other], pair[STUDENT], _EXAMPLES)))
        wanted = {query for *_, (won, lost) in compared for query in (*won, *lost)}
        ranked = {name: read_ranked(f"{stem}.run", wanted) for name, stem in stems.items() if stem}
        for other, measure, pair, (won, lost) in compared:
            two = {name: ranked[name] for name in (other, STUDENT)}
            shown = examples(collection, split, won + lost, pair, two, relevance_threshold=threshold)
            gains = [pair[STUDENT][q] - pair[other][q] for q in pair[STUDENT] if q in pair[other]]
            found.append(SplitWins(split, measure, other, gains, shown[: len(won)], shown[len(won) :]))
    return found


def extremes(other: Values, student: Values, count: int) -> tuple[list[str], list[str]]:
    """(ids won, ids lost), the largest difference first, at most `count` each; ties in the order of the queries."""
    gains = [(q, student[q] - other[q]) for q in student if q in other]
    won = sorted((g for g in gains if g[1] > 0), key=lambda g: -g[1])[:count]
    lost = sorted((g for g in gains if g[1] < 0), key=lambda g: g[1])[:count]
    return [q for q, _ in won], [q for q, _ in lost]


def examples(
    collection: Collection,
    split: str,
    chosen: Sequence[str],
    values: Mapping[str, Values],
    ranked: Mapping[str, Ranked],
    *,
    relevance_threshold: float = 1,
) -> list[Example]:
    """The chosen queries with texts.

    Args:
        values, ranked: the other system first, then the student; ids of passages as in a TREC run.
        relevance_threshold: the grade from which a passage counts as labelled, as in the measures.
    """
    queries, qrels = collection.queries(split), collection.qrels(split)
    text_of = dict(zip(queries.ids, queries.texts, strict=True))
    relevant: dict[str, list[tuple[str, float]]] = {query: [] for query in chosen}
    for query, passage, grade in zip(qrels.query_ids, qrels.passage_ids, qrels.relevance.tolist(), strict=True):
        if query in relevant and grade >= relevance_threshold:
            relevant[query].append((passage, grade))
    for labels in relevant.values():
        labels.sort(key=lambda label: -label[1])
    tops = {name: {q: list(found.get(q, ()))[:SHOWN] for q in chosen} for name, found in ranked.items()}
    ids = {p for found in tops.values() for top in found.values() for p in (*top, *map(unquote, top))}
    ids |= {p for labels in relevant.values() for p, _ in labels[:SHOWN]}
    passages = _texts(collection, ids)
    other, student = values

    def rank(system: str, query: str, passage: str) -> int | None:
        found = list(ranked.get(system, {}).get(query, ()))
        return found.index(without_space(passage)) + 1 if without_space(passage) in found else None

    def hit(place: int, written: str, query: str) -> Hit:
        passage = written if written in passages else unquote(written)
        return Hit(place, passage, passages.get(passage, ""), passage in dict(relevant[query]))

    return [
        Example(
            query,
            text_of[query],
            values[other][query],
            values[student][query],
            [Labelled(p, passages[p], g, rank(other, query, p), rank(student, query, p)) for p, g in labels[:SHOWN]],
            {name: [hit(i, p, query) for i, p in enumerate(top[query], 1)] for name, top in tops.items() if top[query]},
        )
        for query, labels in relevant.items()
    ]


def _texts(collection: Collection, ids: Some[str]) -> dict[str, str]:
    """Passage id -> the beginning of its text."""
    index = collection.passage_index(ids)
    texts = [" ".join(text.split()) for text in collection.texts(list(index.values()))]
    cut = [text if len(text) <= _LENGTH else text[:_LENGTH].rsplit(" ", 1)[0] + " …" for text in texts]
    return dict(zip(index, cut, strict=True))


def read_ranked(uri: str, wanted: Some[str]) -> dict[str, list[str]]:
    """Query id -> passage ids as they are written in a TREC run, best first, of the `wanted` queries. Reads in blocks,
    until all are found; empty where there is no such file."""
    query_of = {without_space(query): query for query in wanted}
    fs, path = filesystem_of(uri)
    if not query_of or not exists(uri) or not fs.get_file_info(path).size:
        return {}
    names, found = ["query_id", "q0", "doc_id", "rank", "score", "tag"], dict[str, list[str]]()
    with (
        fs.open_input_stream(path) as stream,
        csv.open_csv(
            stream,
            csv.ReadOptions(column_names=names),
            csv.ParseOptions(delimiter=" ", quote_char=False),
            csv.ConvertOptions(include_columns=["query_id", "doc_id"], column_types=dict.fromkeys(names, pa.string())),
        ) as blocks,
    ):
        for block in blocks:
            rows = block.filter(pc.is_in(block["query_id"], value_set=pa.array(list(query_of), pa.string())))
            for query, passage in zip(*(column.to_pylist() for column in rows.columns), strict=True):
                found.setdefault(query_of[query], []).append(passage)
            if len(found) == len(query_of) and not len(rows):
                break  # the lines of a query stand together
    return found
