"""Scores of (query, passage) pairs on disk, and what a batch of training sees of them.

A part holds consecutive queries of a split: `train-000012.parquet` for people (query_id, passage_id, score) and
`train-000012.npy` for training, (queries, K) pairs of passage index and score sorted by passage, filled up with
`NO_PASSAGE`. Shapes: b queries, N passages of a batch, K pairs of the query that has most.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ckd_ray.files import filesystem_of, is_local, join, read_json, write_atomic
from ckd_ray.ray_util.parts import part_name

PAIR = np.dtype([("passage", "<i4"), ("score", "<f4")])
NO_PASSAGE = 2**31 - 1
_OPEN_PARTS = 256  # each memory map holds a file handle

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


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
    """Write one part; the Parquet file comes last and is what says that the part is there.

    Args:
        passages: for each query the dense indices of its scored passages, each once, in any order.
        scores: as `passages`.
        passage_ids: the outside ids of all passages, query after query.
    """
    width = max((len(p) for p in passages), default=0)
    table_BK = np.zeros((len(query_ids), width), PAIR)
    table_BK["passage"] = NO_PASSAGE
    for row, (indices, values) in enumerate(zip(passages, scores, strict=True)):
        order = np.argsort(indices, kind="stable")
        table_BK["passage"][row, : len(order)] = indices[order]
        table_BK["score"][row, : len(order)] = values[order]
    buffer = io.BytesIO()
    np.save(buffer, table_BK, allow_pickle=False)
    name = part_name(split, part)
    write_atomic(join(folder, f"{name}.npy"), lambda stream: stream.write(buffer.getbuffer()))
    counts = [len(p) for p in passages]
    rows = pa.table(
        {
            "query_id": pa.array(query_ids, pa.string()).take(pa.array(np.repeat(np.arange(len(counts)), counts))),
            "passage_id": pa.array(passage_ids, pa.string()),
            "score": pa.array(np.concatenate([*scores, np.empty(0, np.float32)]), pa.float32()),
        }
    )
    write_atomic(join(folder, f"{name}.parquet"), lambda stream: pq.write_table(rows, stream, compression="zstd"))


class CrossScores:
    """Random access to the scores of a split, by dense query index."""

    def __init__(self, folder: str, split: str, queries_per_part: int) -> None:
        self.folder, self.split, self.queries_per_part = folder, split, queries_per_part
        self._parts: OrderedDict[int, npt.NDArray[Any]] = OrderedDict()

    @classmethod
    def open(cls, folder: str, split: str = "train") -> CrossScores:
        """Open the scores of a finished cross_encoder stage."""
        manifest: dict[str, Any] = read_json(join(folder, "manifest.json"))
        return cls(folder, split, manifest["queries_per_part"])

    def _part(self, part: int) -> npt.NDArray[Any]:
        if part in self._parts:
            self._parts.move_to_end(part)
            return self._parts[part]
        uri = join(self.folder, part_name(self.split, part) + ".npy")
        fs, path = filesystem_of(uri)
        if is_local(uri):
            table = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with fs.open_input_stream(path) as stream:
                table = np.load(io.BytesIO(stream.read()), allow_pickle=False)
        self._parts[part] = table
        if len(self._parts) > _OPEN_PARTS:
            self._parts.popitem(last=False)
        return table

    def of_query(self, query: int) -> tuple[Int64Array, Float32Array]:
        """The scored passages of a query, ascending, and their scores."""
        row = self._part(query // self.queries_per_part)[query % self.queries_per_part]
        count = int(np.searchsorted(row["passage"], NO_PASSAGE))
        return row["passage"][:count].astype(np.int64), np.array(row["score"][:count])

    def scores_and_mask(self, queries_b: Int64Array, passages_N: Int64Array) -> tuple[Tensor, Tensor]:
        """scores_bN, float32, and scored_bN, bool: False (and 0.0) where the pair has no score."""
        scores_bN = np.zeros((len(queries_b), len(passages_N)), np.float32)
        scored_bN = np.zeros(scores_bN.shape, bool)
        for row, query in enumerate(queries_b.tolist()):
            known, values = self.of_query(query)
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


def keep_scored(scores_bN: Tensor, scored_bN: Tensor, positives_b: Tensor, valid_bN: Tensor) -> tuple[Tensor, Tensor]:
    """(scores_bN, valid_bN) in which only pairs that the cross-encoder has scored count.

    All passages of a batch count for all its queries, but a cross-encoder has seen a query's own candidates alone. A
    pair without a score leaves the row's softmax on both sides: what the teacher has not judged the student is not told
    about. Filling in the row's minimum instead would share out real probability to dozens of strangers as soon as the
    candidates score alike (T = 0.25 sharpens differences, not ties), and calling them irrelevant would be contrastive
    training, whose false negatives distillation is there to avoid. So a row compares its positive with its own
    `distill.negatives` and with whatever else of the batch happens to be among its candidates.

    The labelled positive always counts. Without a score of its own it has its row's maximum, which `raise_positives`
    would lift it to anyhow; a row in which nothing is scored has its positive alone, and loss 0.
    """
    valid_bN = valid_bN & scored_bN
    highest_b = scores_bN.masked_fill(~valid_bN, -torch.inf).amax(1, keepdim=True)
    highest_b = torch.where(valid_bN.any(1, keepdim=True), highest_b, 0.0)
    column_b = positives_b[:, None]
    own_b = torch.where(scored_bN.gather(1, column_b), scores_bN.gather(1, column_b), highest_b)
    return scores_bN.scatter(1, column_b, own_b), valid_bN.scatter(1, column_b, True)
