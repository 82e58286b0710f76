"""Queries in blocks of about equal length, whose rows are multiplied at a time.

Shapes: B queries, b queries of a block, Q rows of the longest query, R rows of a block, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ckd_ray.arrays import Int64Array


@dataclass(frozen=True)
class QueryBlock:
    """Queries whose first `length` rows are multiplied; shorter ones have rows of zeros there.

    Attributes:
        queries: (b,) their numbers, or a slice where they are consecutive, which is faster to write to.
        length: Rows of the longest of them.
    """

    queries: Tensor | slice
    length: int

    def rows_of(self, queries_BQD: Tensor) -> Tensor:
        """(R, D) the rows of the block, query after query; R = b * length."""
        return queries_BQD[self.queries, : self.length].reshape(-1, queries_BQD.shape[2])


def rows_until_last(queries_BQD: Tensor) -> Int64Array:
    """(B,) the rows of each query up to the last one that is not zero."""
    counts_BQ = (queries_BQD != 0).any(2) * torch.arange(1, queries_BQD.shape[1] + 1, device=queries_BQD.device)
    return counts_BQ.amax(1).cpu().numpy() if counts_BQ.numel() else np.zeros(len(queries_BQD), np.int64)


def blocks_of(lengths_B: Int64Array, most_rows: int) -> list[QueryBlock]:
    """All queries in blocks of at most `most_rows` rows (one query at least) of about equal size, the longest first.

    Rows of products whose addresses differ by a multiple of 4096 bytes share places in the first-level cache, and
    maxima over them take twice as long. Such a block gets one query less or more.
    """
    lengths_B = np.maximum(1, lengths_B)
    order = np.argsort(-lengths_B, kind="stable")
    left = int(lengths_B.sum())
    blocks, start = [], 0
    while start < len(order):
        length = int(lengths_B[order[start]])
        most = max(1, most_rows // length)
        blocks_left = -(-left // most_rows)
        width = min(most, -(-left // (blocks_left * length)), len(order) - start)
        if width * length % 1024 == 0:
            width += 1 if width < most and start + width < len(order) else -1
        chosen = np.sort(order[start : start + max(1, width)])
        first, last = int(chosen[0]), int(chosen[-1])
        consecutive = last - first == len(chosen) - 1
        blocks.append(QueryBlock(slice(first, last + 1) if consecutive else torch.from_numpy(chosen), length))
        start, left = start + len(chosen), left - int(lengths_B[chosen].sum())
    return blocks
