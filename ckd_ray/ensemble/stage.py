"""Scores of every training query's candidates by further scorers: the encoder as it is (cosine of pooled vectors) and
BM25. Ray Data works through parts of the queries; the scores lie on disk in the form of a cross-encoder's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ckd_ray.arrays import Float32Array, Int64Array
from ckd_ray.cross_encoder.candidates import CandidateReader
from ckd_ray.cross_encoder.scores import CrossScores, write_scores
from ckd_ray.data.collection import collection_once
from ckd_ray.ensemble.bm25 import Statistics, collection_statistics
from ckd_ray.ensemble.weights import SPLIT, WEIGHTS, ScorerWeight, fit_weights, spreads
from ckd_ray.evaluate.bm25 import words
from ckd_ray.files import join, make_folder, write_json_atomic
from ckd_ray.ray_util.parts import finish_parts, part_file, parts_present, query_spans
from ckd_ray.retrieve.rankings import read_ranking_part
from ckd_ray.runs.artifact import MANIFEST
from ckd_ray.runs.directory import passage_store, query_store
from ckd_ray.store.embeddings import open_once

_QUERIES_TO_FIT = 2000


@dataclass(frozen=True)
class EnsembleJob:
    """Score the candidates of the training queries of `run` into `out`; the same in every process.

    Attributes:
        scorers: of `encoder` and `bm25`.
        vectors: the folder of the encoder's stores `passages` and `queries.train`, one row a text.
        depth: passages of a query's ranking that are scored, besides its labelled ones.
        similarity: of the teacher, `l2` or `cosine`.
    """

    run: str
    out: str
    rankings: str
    scorers: tuple[str, ...]
    vectors: str
    positive_grade: float
    depth: int
    similarity: str


def score_ensemble(job: EnsembleJob, num_queries: int) -> dict[str, ScorerWeight]:
    """Write the missing parts of every scorer, and the weights. Returns the weights by scorer."""
    statistics = collection_statistics(job.run, job.out) if "bm25" in job.scorers else None
    for name in job.scorers:
        folder = join(job.out, name)
        make_folder(folder)
        arguments = {"job": job, "scorer": name, "statistics": statistics}
        present = parts_present(folder)
        spans = finish_parts(f"ensemble {name}", SPLIT, num_queries, present, _score_part, arguments)
        size = spans[0][1] if spans else 1
        write_json_atomic(join(folder, MANIFEST), {"queries_per_part": size, "split": SPLIT})
    return _write_weights(job, num_queries)


def _score_part(batch: dict[str, Any], job: EnsembleJob, scorer: str, statistics: Statistics | None) -> pa.Table:
    part, first, stop = (int(batch[name][0]) for name in ("part", "first", "stop"))
    wanted = _candidates(job).read(first, stop).all()
    if scorer == "encoder":
        scores = _cosines(job, first, stop, wanted)
    else:
        assert statistics is not None
        scores = _bm25(job, statistics, first, stop, wanted)
    collection = collection_once(job.run)
    write_scores(
        join(job.out, scorer),
        SPLIT,
        part,
        query_ids=collection.queries_between(SPLIT, first, stop).ids,
        passages=wanted,
        scores=scores,
        passage_ids=collection.passage_ids(np.concatenate([*wanted, np.empty(0, np.int64)]).astype(np.int64)),
    )
    return pa.table({"queries": [stop - first]})


@lru_cache(maxsize=2)
def _candidates(job: EnsembleJob) -> CandidateReader:
    # Queries without a label are not trained on; their scores are for the labels that leave the run (export).
    return CandidateReader(job.run, job.positive_grade, job.depth, unlabelled=True)


def _unique(wanted: Sequence[Int64Array]) -> tuple[Int64Array, list[Int64Array]]:
    """The different passages, and where each query's candidates stand among them: neighbours share candidates."""
    unique, where = np.unique(np.concatenate([*wanted, np.empty(0, np.int64)]).astype(np.int64), return_inverse=True)
    return unique, np.split(where, np.cumsum([len(w) for w in wanted])[:-1])


def _cosines(job: EnsembleJob, first: int, stop: int, wanted: Sequence[Int64Array]) -> list[Float32Array]:
    unique, where = _unique(wanted)
    queries = open_once(query_store(job.vectors, SPLIT)).gather(np.arange(first, stop)).embeddings_TD.float()
    passages = open_once(passage_store(job.vectors)).gather(unique).embeddings_TD.float()
    return [(passages[at] @ query).numpy() for query, at in zip(queries, where, strict=True)]


def _bm25(
    job: EnsembleJob, statistics: Statistics, first: int, stop: int, wanted: Sequence[Int64Array]
) -> list[Float32Array]:
    unique, where = _unique(wanted)
    collection = collection_once(job.run)
    passages = [words(text) for text in collection.texts(unique)]
    queries = [words(text) for text in collection.queries_between(SPLIT, first, stop).texts]
    return [
        statistics.scores(query, [passages[i] for i in at.tolist()]) for query, at in zip(queries, where, strict=True)
    ]


def _write_weights(job: EnsembleJob, num_queries: int) -> dict[str, ScorerWeight]:
    """Fit the weights on up to 2,000 queries whose label is in their ranking, which has the teacher's own score."""
    readers = [CrossScores.open(join(job.out, name), SPLIT, "ensemble") for name in job.scorers]
    positives = _candidates(job).positives
    rows: list[npt.NDArray[np.float64]] = []
    spans = query_spans(num_queries)
    # Whole parts, evenly over the split: a part is one file.
    parts = min(len(spans), -(-_QUERIES_TO_FIT // max(1, spans[0][1]))) if spans else 0
    for part in np.unique(np.linspace(0, len(spans) - 1, parts).astype(int)):
        table = read_ranking_part(join(job.rankings, part_file(SPLIT, part)), ["query_index", "passage_index", "score"])
        columns = [table[name].to_numpy() for name in ("query_index", "passage_index", "score")]
        cuts = np.flatnonzero(np.diff(columns[0])) + 1
        for queries, passages, scores in zip(*(np.split(column, cuts) for column in columns), strict=True):
            if len(queries):
                rows += _features(int(queries[0]), passages, scores, readers, positives.of(int(queries[0])))
    features_BKF, valid_BK = _padded(rows, 1 + len(readers))
    if job.similarity == "l2":
        features_BKF[:, :, 0] *= 2  # rankings hold sums of cosines, and -|q - d|^2 = 2 cos - 2
    found = fit_weights(features_BKF, np.zeros(len(rows), np.int64), valid_BK)
    spread_F = spreads(features_BKF, valid_BK)
    own = found[0] if len(found) and found[0] > 0 else np.inf  # inf: the fitted weight of the teacher is 0
    weights = {
        name: ScorerWeight(float(found[1 + i] / own), float(spread_F[1 + i])) for i, name in enumerate(job.scorers)
    }
    record = {name: vars(weight) for name, weight in weights.items()}
    write_json_atomic(
        join(job.out, WEIGHTS), {"scorers": record, "teacher_spread": float(spread_F[0]), "queries": len(rows)}
    )
    return weights


def _features(
    query: int, passages: Int64Array, scores: Float32Array, readers: Sequence[CrossScores], positives: Int64Array
) -> list[npt.NDArray[np.float64]]:
    """(K, F) of a query, a labelled passage first, for each of its labelled passages that is ranked."""
    columns, scored = [scores.astype(np.float64)], np.ones(len(passages), bool)
    for reader in readers:
        values_1K, scored_1K = reader.scores_and_mask(np.array([query]), passages)
        columns.append(values_1K[0].double().numpy())
        scored &= scored_1K[0].numpy()
    matrix_KF, labelled = np.stack(columns, 1)[scored], np.isin(passages[scored], positives)
    return [np.concatenate([matrix_KF[[i]], matrix_KF[~labelled]]) for i in np.flatnonzero(labelled).tolist()]


def _padded(rows: Sequence[npt.NDArray[np.float64]], features: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[Any]]:
    width = max((len(row) for row in rows), default=1)
    padded_BKF, valid_BK = np.zeros((len(rows), width, features)), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        padded_BKF[i, : len(row)], valid_BK[i, : len(row)] = row, True
    return padded_BKF, valid_BK
