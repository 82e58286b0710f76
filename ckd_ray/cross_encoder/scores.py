"""Scores of (query, passage) pairs on disk (`ckd_ray.labels.array_parts`), and what a batch of training sees of them.

The Parquet file of a part has the columns query_id, passage_id and score. Its array is (queries, K) pairs of passage
index and score, sorted by passage and padded with `NO_PASSAGE`. Shapes: b queries, N passages of a batch, K the largest
number of pairs of a query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from ckd_ray.arrays import Float32Array, Int64Array
from ckd_ray.files import read_json
from ckd_ray.labels.array_parts import ArrayParts, parquet_bytes, write_part
from ckd_ray.runs.artifact import manifest_file

PAIR = np.dtype([("passage", "<i4"), ("score", "<f4")])
NO_PASSAGE = 2**31 - 1


def write_scores(
    folder: str,
    split: str,
    part: int,
    *,
    query_ids: Sequence[str],
    passages: Sequence[Int64Array],
    scores: Sequence[Float32Array],
    passage_ids: Sequence[str],
) -> None:
    """Write one part.

    Args:
        passages: for each query the dense indices of its scored passages, each once, in any order.
        scores: as `passages`.
        passage_ids: the outside ids of all passages, query after query.
    """
    counts = [len(p) for p in passages]
    table_BK = np.zeros((len(query_ids), max(counts, default=0)), PAIR)
    table_BK["passage"] = NO_PASSAGE
    for row, (indices, values) in enumerate(zip(passages, scores, strict=True)):
        order = np.argsort(indices, kind="stable")
        table_BK["passage"][row, : len(order)] = indices[order]
        table_BK["score"][row, : len(order)] = values[order]
    rows = pa.table(
        {
            "query_id": pa.array(query_ids, pa.string()).take(pa.array(np.repeat(np.arange(len(counts)), counts))),
            "passage_id": pa.array(passage_ids, pa.string()),
            "score": pa.array(np.concatenate([*scores, np.empty(0, np.float32)]), pa.float32()),
        }
    )
    write_part(folder, split, part, table_BK, parquet_bytes(rows))


class CrossScores:
    """Random access to the scores of a split, by dense query index."""

    def __init__(self, folder: str, split: str, queries_per_part: int, stage: str = "cross_encoder") -> None:
        self._parts = ArrayParts(folder, split, queries_per_part, stage)

    @classmethod
    def open(cls, folder: str, split: str = "train", stage: str = "cross_encoder") -> CrossScores:
        """Open the scores that a finished `stage` has written."""
        manifest: dict[str, Any] = read_json(manifest_file(folder))
        return cls(folder, split, manifest["queries_per_part"], stage)

    def scores_and_mask(self, queries_b: Int64Array, passages_N: Int64Array) -> tuple[Tensor, Tensor]:
        """scores_bN, float32, and scored_bN, bool: False (and 0.0) where the pair has no score."""
        scores_bN = np.zeros((len(queries_b), len(passages_N)), np.float32)
        scored_bN = np.zeros(scores_bN.shape, bool)
        for row, pairs in enumerate(self._parts.read(queries_b)):
            known, values = _scored(pairs)
            if len(known):
                at = np.minimum(np.searchsorted(known, passages_N), len(known) - 1)
                scored_bN[row] = known[at] == passages_N
                scores_bN[row] = np.where(scored_bN[row], values[at], 0.0)
        return torch.from_numpy(scores_bN), torch.from_numpy(scored_bN)

    def of_batch(
        self, queries_b: Int64Array, passages_N: Int64Array, positives_b: Tensor, valid_bN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(scores_bN, valid_bN) for the objective: `scores_and_mask`, then `keep_scored`."""
        return keep_scored(*self.scores_and_mask(queries_b, passages_N), positives_b, valid_bN)


def _scored(pairs: npt.NDArray[Any]) -> tuple[Int64Array, Float32Array]:
    """A row without its padding."""
    count = int(np.searchsorted(pairs["passage"], NO_PASSAGE))
    return pairs["passage"][:count].astype(np.int64), pairs["score"][:count]


def keep_scored(scores_bN: Tensor, scored_bN: Tensor, positives_b: Tensor, valid_bN: Tensor) -> tuple[Tensor, Tensor]:
    """(scores_bN, valid_bN) in which only pairs count that the cross-encoder has scored.

    All passages of a batch count for all its queries, but a cross-encoder scores only a query's own candidates. A pair
    without a score leaves the row's softmax on both sides: the student learns nothing from a pair that the teacher has
    not judged. The alternatives are worse. The row's minimum as its score would give dozens of unrelated passages real
    probability where the candidates score alike (T = 0.25 sharpens differences, not ties). Calling such pairs
    irrelevant would be contrastive training, with the false negatives that distillation avoids. So a row compares its
    positive with its own `distill.negatives`, and with other passages of the batch that are among its candidates.

    The labelled positive always counts. Without a score of its own it has its row's maximum, to which
    `raise_positives` would lift it. A row without any score has its positive alone, and loss 0.
    """
    valid_bN = valid_bN & scored_bN
    highest_b = scores_bN.masked_fill(~valid_bN, -torch.inf).amax(1, keepdim=True)
    highest_b = torch.where(valid_bN.any(1, keepdim=True), highest_b, 0.0)
    column_b = positives_b[:, None]
    own_b = torch.where(scored_bN.gather(1, column_b), scores_bN.gather(1, column_b), highest_b)
    return scores_bN.scatter(1, column_b, own_b), valid_bN.scatter(1, column_b, True)
