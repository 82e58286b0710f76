"""The pairs that a cross-encoder scores: a query's labelled passages, and the hard negatives that training draws from.

Shapes: B queries, K = depth results a query.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckd_ray.data import Collection
from ckd_ray.data.positives import Int64Array
from ckd_ray.files import join
from ckd_ray.ray_util.parts import part_file, query_spans
from ckd_ray.retrieve.rankings import part_matrix, read_ranking_part
from ckd_ray.runs.directory import RunDir


@dataclass(frozen=True)
class Candidates:
    """Dense passage indices for each query of a span; negatives are in the order of the ranking."""

    labelled: list[Int64Array]
    negatives: list[Int64Array]

    def all(self) -> list[Int64Array]:
        """Both, the labelled ones first."""
        return [np.concatenate(pair) for pair in zip(self.labelled, self.negatives, strict=True)]


class CandidateReader:
    """Candidates of the training queries of a run.

    Args:
        unlabelled: whether a query without a label, on which nothing is trained, has candidates, too.
    """

    def __init__(self, run: str, positive_grade: float, depth: int, *, unlabelled: bool = False) -> None:
        collection = Collection.open(run)
        self.num_queries = collection.num_queries("train")
        self.positives = collection.positives("train", positive_grade)
        self.rankings, self.depth, self.unlabelled = RunDir(run).rankings, depth, unlabelled

    def read(self, first: int, stop: int) -> Candidates:
        """The candidates of the queries [first, stop). As in batches, labelled passages do not count for the depth."""
        labelled = [self.positives.of(query) for query in range(first, stop)]
        negatives = []
        for row, known in zip(self._top(first, stop), labelled, strict=True):
            depth = self.depth if len(known) or self.unlabelled else 0
            negatives.append(row[(row >= 0) & ~np.isin(row, known)][:depth])
        return Candidates(labelled, negatives)

    def _top(self, first: int, stop: int) -> list[Int64Array]:
        rows: list[Int64Array] = []
        for part, (low, high) in enumerate(query_spans(self.num_queries)):
            if low < stop and first < high:
                table = read_ranking_part(
                    join(self.rankings, part_file("train", part)), ["query_index", "rank", "passage_index"]
                )
                depth = int(table["rank"].to_numpy().max(initial=0))
                matrix = part_matrix(table, low, high - low, depth).astype(np.int64)
                rows += list(matrix[max(first, low) - low : min(stop, high) - low])
        return rows
